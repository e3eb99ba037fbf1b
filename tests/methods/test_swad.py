from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import RunFailed
from qatbench.bench.method import Method, Run
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, train
from qatbench.methods.swad import SWAD, averaged_state, flat, load_flat, valley
from torch import Tensor, nn

SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=200)


class TestSWAD(MethodContract):
    method = "swad+lsq"


def wrapper(epochs: int, **params: Any) -> SWAD:
    method, _ = ready("swad+lsq", epochs=epochs, params={"swad": params})
    assert isinstance(method, SWAD)
    return method


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3, 2, 1, 2, 3, 4, 5, 6, 7, 8], (2, 4)),  # level 2, at most 2.6
        ([5, 4, 3, 2, 1], None),
        ([1, 1, 1], (0, 3)),  # of equals the first
        ([1, 1], None),
        ([1, 1, 1, 9, 9, 9, 9, 9, 1, 1], (0, 10)),  # five too large are not six
        ([1, 1, 1, 9, 9, 9, 9, 9, 9, 1, 1], (0, 3)),
        ([1, 1, 1, 9, 9], (0, 3)),  # the end comes before six of them
        ([2, 1, 1.5, 1.2, 0.9, 0.8], (1, 6)),
    ],
)
def test_valley(losses: list[float], found: tuple[int, int] | None) -> None:
    """Weights would be averaged that are on the way down, or that fit the training images alone."""
    assert valley(losses, 3, 6, 0.3) == found


@given(st.lists(st.floats(0, 5), min_size=1, max_size=14), st.integers(1, 5), st.integers(1, 7), st.floats(0, 1))
@SMALL
def test_epoch_by_epoch_it_is_the_mean_over_the_valley(
    losses: list[float], converged: int, patience: int, tolerance: float
) -> None:
    """What is decided while training goes on, with few copies kept, would not be what the whole curve says."""
    swad = LIGHT
    swad.params = SWAD.Params(converged=converged, patience=patience, tolerance=tolerance)
    swad.recent, swad.average = torch.full((max(converged, patience), 1), -1.0), torch.zeros(1)
    swad.averaged = torch.zeros((), dtype=torch.int64)
    swad.losses_by_epoch = torch.tensor(losses, dtype=torch.float64)
    for t in range(len(losses)):
        swad.recent[t % len(swad.recent)] = float(t)
        swad._average(t + 1, last=t + 1 == len(losses))
    found = valley(losses, converged, patience, tolerance)
    expected = len(losses) - 1 if found is None else sum(range(*found)) / (found[1] - found[0])
    assert float(swad.average) == pytest.approx(expected, abs=1e-4)


LIGHT = wrapper(1)


class Spy:
    """Notes the weights after each step, and hands the method other losses than were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
        self.weights: list[list[Tensor]] = [[] for _ in losses]
        self.state: dict[str, Tensor] = {}
        step, look = SWAD.after_update, SWAD.validated

        def after_update(method: SWAD, run: Any) -> None:
            step(method, run)
            self.weights[method.scope.epoch].append(flat(run.net))

        def validated(method: SWAD, run: Any, metrics: Any) -> None:
            look(method, run, {**metrics, "val/loss": losses[method.scope.epoch]})

        monkeypatch.setattr(SWAD, "after_update", after_update)
        monkeypatch.setattr(SWAD, "validated", validated)


def mean_of(epochs: list[list[Tensor]]) -> Tensor:
    steps = [step for epoch in epochs for step in epoch]
    return torch.stack(steps).double().mean(0).float()


def others_than_norms(net: nn.Module) -> Tensor:
    """Mask over `flat`: all but the BatchNorms' statistics, which are measured anew."""
    names = [k for k, v in net.state_dict(keep_vars=True).items() if v.is_floating_point()]
    parts = zip(names, averaged_state(net), strict=True)
    return torch.cat([torch.full((v.numel(),), "running" not in name) for name, v in parts])


@pytest.mark.parametrize(
    ("losses", "start", "epochs"),
    [
        ([3.0, 1.0, 1.1, 1.2, 9.0, 9.0], 0.0, (1, 4)),
        ([0.1, 1.0, 1.1, 1.2, 1.0, 1.0], 1 / 6, (1, 6)),  # the first epoch is not looked at
        ([3.0, 2.0, 1.0], 0.0, (2, 3)),  # never converged
        ([3.0, 2.0], 1.0, (1, 2)),  # the last epoch is always looked at
    ],
)
def test_the_network_ends_with_the_mean_of_every_step(
    losses: list[float], start: float, epochs: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean would be of one step an epoch, of other epochs, or not be what is measured in the end."""
    spy = Spy(monkeypatch, losses)
    params = {"swad": {"converged": 2, "patience": 2, "start": start}}
    method, data = ready("swad+lsq", epochs=len(losses), params=params)
    train(method, data, tmp_path)
    assert all(len(weights) == data.steps for weights in spy.weights)
    mask, expected = others_than_norms(method.net), mean_of(spy.weights[slice(*epochs)])
    torch.testing.assert_close(flat(method.net)[mask], expected[mask], rtol=1e-4, atol=1e-6)


def test_a_later_stage_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier that ``crt`` draws anew would be averaged with the one that it has thrown away."""
    spy = Spy(monkeypatch, [1.0] * 4)
    method, data = ready("swad+crt+lsq", epochs=4, params={"swad": {"converged": 1, "patience": 2}})
    first = method.stages(4)[0].epochs
    assert 0 < first < 4
    train(method, data, tmp_path)
    mask, expected = others_than_norms(method.net), mean_of(spy.weights[first:])
    torch.testing.assert_close(flat(method.net)[mask], expected[mask], rtol=1e-4, atol=1e-6)


def test_norms_are_measured_with_the_mean(tmp_path: Path) -> None:
    """The mean of the weights would be used with the statistics of other weights: far off, most of all after few steps."""
    method, data = ready("swad+lsq", epochs=2)
    train(method, data, tmp_path)
    seen: list[Tensor] = []
    norm = method.net.get_submodule("bn1")
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    method.eval()
    with torch.no_grad():
        for batch in data.train_dataloader():
            method.scope.domain, method.scope.track = batch.domain, False
            method.net(batch.x)
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


@pytest.mark.parametrize("inner", ["ldam-drw", "tau-norm"])
def test_what_is_noted_of_the_head_is_of_the_mean(inner: str, tmp_path: Path) -> None:
    """What is exported would divide by the norms of other rows than it has."""
    method, data = ready(f"swad+{inner}+lsq", epochs=2)
    train(method, data, tmp_path)
    method.eval()
    batch = all_train(data)
    shipped = method.deploy(Run(method))
    torch.testing.assert_close(logits(method, shipped, batch), logits(method, method.net, batch), rtol=1e-3, atol=1e-3)


def test_a_network_without_batchnorm(tmp_path: Path) -> None:
    """It would need a pass for nothing, or fail."""
    method, data = ready("swad+lsq", epochs=1, norm="group")
    train(method, data, tmp_path)
    assert torch.isfinite(flat(method.net)).all()


def test_flat_and_back() -> None:
    """Weights in channels_last would come back in another order, or state of a quantizer be left out."""
    method = wrapper(1)
    before = {k: v.clone() for k, v in method.net.state_dict().items()}
    values = flat(method.net)
    load_flat(method.net, values + 1)
    assert torch.equal(flat(method.net), values + 1)
    load_flat(method.net, values)
    assert all(torch.equal(v, before[k]) for k, v in method.net.state_dict().items())
    floats = sum(v.numel() for v in before.values() if v.is_floating_point())
    assert len(values) == floats


def test_nothing_to_choose_by_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A run would end with the best epoch's weights, or the first ones, under the name of SWAD."""

    def reason(**settings: Any) -> str:
        method, data = ready("swad+lsq", **settings)
        with pytest.raises(RunFailed) as caught:
            Loop(method, data).epoch([])
        return str(caught.value)

    assert "selection=best cannot; use selection=last" in reason(selection="best")

    class NoVal:
        val_domains = ()

    method, data = ready("swad+lsq")
    loop = Loop(method, data)
    loop.datamodule = NoVal()  # type: ignore[assignment]
    with pytest.raises(RunFailed, match="validation images"):
        method.start(loop.run, method.stages(1)[0])


def test_it_says_what_was_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A user could not tell a mean over a valley from that of the last epoch."""
    method, data = ready("swad+lsq", epochs=1)
    with caplog.at_level(logging.INFO, "qatbench"):
        train(method, data, tmp_path)
    assert any("has not converged" in message for message in caplog.messages)
    assert isinstance(method, Method)
