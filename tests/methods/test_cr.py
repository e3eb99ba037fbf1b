from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qatbench.bench.data import Batch, DataModule
from qatbench.bench.method import EMA_DECAY, Out
from qatbench.bench.testing import Loop, MethodContract, ready, same, state, train
from qatbench.methods.kd import distillation_loss
from torch import Tensor
from torch.nn import functional as F


class TestCR(MethodContract):
    method = "cr+lsq"


class TestCRTowardsItself(MethodContract):
    """The other target has no average that a checkpoint could hold."""

    method = "cr+lsq"

    @pytest.fixture(autouse=True)
    def _target(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qatbench.methods.cr.CR.test_params", {"ramp": 0.5, "target": "student"})


def settings(**params: object) -> dict:
    return {"cr": {"ramp": 0.0, **params}}


def first(data: DataModule) -> Batch:
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("target", ["ema", "student"])
def test_cr_1_without_weight_it_is_the_inner_method(target: str, tmp_path: Path) -> None:
    """The wrapper would change training by being there: by the second view, a random number, or a moved statistic."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = ready("cr+lsq", epochs=1, params=settings(weight=0.0, target=target))
    train(wrapped, data, tmp_path / "wrapped")
    assert same(state(alone), {k: v for k, v in state(wrapped).items() if not k.startswith("ema.")}) == []
    assert wrapped.losses_seen["task"] == alone.losses_seen["task"]
    assert wrapped.losses_seen["cr"] == 0


@pytest.mark.parametrize("target", ["ema", "student"])
def test_cr_2_no_divergence_if_views_and_networks_are_equal(target: str) -> None:
    """A network that is consistent already would be pushed away; or the target would see another image."""
    method, data = ready("cr+lsq", params=settings(target=target))
    batch = first(data)
    method.train()
    if target == "ema":
        method.net.eval()  # with the statistics that the average uses
    alike = Batch(batch.x, batch.y, batch.domain, (batch.x,))
    losses = method.compute_losses(alike, track=False)
    assert losses["cr"].abs().item() < 1e-6
    losses["cr"].backward()
    assert max(p.grad.abs().max() for p in method.net.parameters() if p.grad is not None) < 1e-4
    assert method.compute_losses(batch, track=False)["cr"] > 1e-4


def test_cr_3_the_average_is_never_trained() -> None:
    """The target would run to the student instead of averaging it, or have gradients."""
    method, data = ready("cr+lsq", params=settings())
    loop = Loop(method, data)
    expected = {n: p.detach().clone() for n, p in method.ema.named_parameters()}
    optimized = {id(p) for g in loop.run.opt.param_groups for p in g["params"]}
    assert not optimized & {id(p) for p in method.ema.parameters()}
    for epoch, batch in enumerate(list(data.train_dataloader())[:3]):
        loop.epoch([batch], epoch)
        for name, p in method.net.named_parameters():
            expected[name] = expected[name] * EMA_DECAY + p.detach() * (1 - EMA_DECAY)
    for name, p in method.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], msg=name)
        assert p.grad is None
        assert not p.requires_grad
    assert not hasattr(ready("cr+lsq", params=settings(target="student"))[0], "ema")


@pytest.mark.parametrize("target", ["ema", "student"])
def test_the_loss_is_that_of_the_targets_answer_to_the_second_view(target: str) -> None:
    """The divergence would be the other way round, of one view only, or have gradients on both sides."""
    method, data = ready("cr+lsq", params=settings(target=target, weight=0.5, temperature=2.0))
    batch = first(data)
    method.train()
    network = method.ema if target == "ema" else method.net
    with torch.no_grad():
        answer = network(batch.views[0])
    student = method.net(batch.x)
    expected = distillation_loss(student, answer, 2.0) * 0.5
    expected_gradient = torch.autograd.grad(expected, method.net.conv1.weight)[0]
    losses = method.compute_losses(batch, track=False)
    assert set(losses) == {"task", "cr"}
    torch.testing.assert_close(losses["cr"], expected)
    torch.testing.assert_close(losses["task"], F.cross_entropy(student, batch.y))
    gradient = torch.autograd.grad(losses["cr"], method.net.conv1.weight)[0]
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("ramp", "epochs", "step", "expected"),
    [
        (5.0, 20, 0, 0.0),
        (5.0, 20, 25, 0.5),
        (5.0, 20, 50, 1.0),
        (5.0, 20, 170, 1.0),
        (5.0, 2, 19, 0.38),  # the run is over before the weight has risen
        (0.25, 4, 2, 0.8),
        (0.0, 4, 0, 1.0),
    ],
)
def test_the_weight_rises_linearly_over_epochs(ramp: float, epochs: int, step: int, expected: float) -> None:
    """The weight would depend on the number of epochs or of steps in them, be there at once, or never."""
    method, _ = ready("cr+lsq", params={"cr": {"ramp": ramp, "weight": 3.0}})
    method.scope.epochs, method.scope.steps, method.scope.step = epochs, 10 * epochs, step
    assert method.weight() == pytest.approx(3.0 * expected)


def test_each_head_is_compared_on_its_own() -> None:
    """Classes and superclasses would compete in one softmax."""
    method, data = ready("cr+lsq", params=settings(weight=0.25, temperature=2.0))
    for member in method.members:
        member.task = replace(data.task, superclasses=("a", "b"), superclass=(0, 0, 1, 1))
    batch = first(data)
    student, target = torch.randn(len(batch), 6), torch.randn(len(batch), 6)
    losses = method.losses(Out(student, {}, {"ema": Out(target, {})}), batch)
    fine = distillation_loss(student[:, :4], target[:, :4], 2.0)
    coarse = distillation_loss(student[:, 4:], target[:, 4:], 2.0)
    assert set(losses) == {"task", "coarse", "cr"}
    assert losses["cr"].item() == pytest.approx(0.25 * (fine + coarse).item())


def test_distillation_around_or_inside_shows_each_teacher_its_view() -> None:
    """In kd+cr the float network would see other pixels than the student, or its answer be taken for the average's."""
    for chain in ("kd+cr+lsq", "cr+kd+lsq"):
        method, data = ready(chain, params={**settings(), "kd": {"weight": 0.5, "temperature": 1.0}})
        batch = first(data)
        method.train()
        logits: dict[str, Tensor] = {"student": method.net(batch.x)}
        with torch.no_grad():
            logits["float"] = method._float_teacher[0](batch.x)
            logits["ema"] = method.ema(batch.views[0])
        losses = method.compute_losses(batch, track=False)
        share = 0.5 if chain.startswith("kd") else 1.0
        torch.testing.assert_close(losses["kd"], 0.5 * distillation_loss(logits["student"], logits["float"], 1.0))
        torch.testing.assert_close(losses["cr"], share * distillation_loss(logits["student"], logits["ema"], 1.0))
