from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from qatbench.bench.chain import build, members
from qatbench.bench.errors import RunFailed, UserError
from qatbench.bench.fit import fit
from qatbench.bench.method import Stage, Wrapper
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.testing import Loop, MethodContract, ready, recorder, same, state, train
from qatbench.methods.crt import CRT
from tails import without_linear_head


class TestCRT(MethodContract):
    method = "crt+lsq"


HALF = {"crt": {"share": 0.5}}


class States(L.Callback):
    """Keeps the state at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.states.append(state(module))


def trained(chain: str, folder: Path, epochs: int = 2, params: dict[str, Any] = HALF, **settings: Any) -> States:
    """Half of the epochs train everything, the other half the classifier."""
    folder.mkdir(exist_ok=True)
    method, data = ready(chain, epochs=epochs, params=params, **settings)
    states = States()
    fit(method, data, recorder(folder, method), callbacks=[states])
    return states


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "share", "parts"),
    [(10, 0.2, (8, 2)), (4, 0.2, (3, 1)), (3, 0.01, (2, 1)), (2, 0.2, (1, 1)), (2, 0.99, (1, 1)), (7, 0.5, (3, 4))],
)
def test_crt_stages_share_the_runs_epochs(epochs: int, share: float, parts: tuple[int, int]) -> None:
    """It would get more training than the methods beside it, or no second stage."""
    method = build("crt+lsq", {"crt": {"share": share, "lr": 0.5}})
    assert method.stages(epochs) == [
        Stage("train", parts[0]),
        Stage("classifier", parts[1], "class_balanced", 0.5),
    ]


@pytest.mark.parametrize("epochs", [0, 1])
def test_crt_a_run_too_short_for_two_stages(epochs: int) -> None:
    """A run of one epoch would train a fresh classifier on an untrained network, or end in a traceback."""
    assert build("crt+lsq", {}).stages(epochs) == [Stage("train", epochs)]


# --- what moves -------------------------------------------------------------------------------------------------------


def chains() -> list[str]:
    """Every method that trains, inside of cRT; a wrapper over ``lsq``."""
    found = []
    for plugin in plugins("methods"):
        if plugin.cls is None or plugin.cls is CRT or not plugin.origin.startswith(str(ROOT)):
            continue
        text = f"crt+{plugin.name}" + ("+lsq" if issubclass(plugin.cls, Wrapper) else "")
        try:
            members(text)
        except UserError:
            continue
        if build(text, {}).trains:
            found.append(text)
    return found


@pytest.mark.parametrize("chain", chains())
def test_crt_backbone_stays_to_the_bit(chain: str, tmp_path: Path) -> None:
    """Features would drift while the classifier learns, or a norm, a codebook or a step would: then it is no cRT."""
    after_one, after_two = trained(chain, tmp_path).states
    moved = [name for name in same(after_one, after_two) if name.startswith("net.")]
    assert [name for name in moved if not name.startswith("net.head")] == []
    assert any(name.startswith("net.head") for name in moved)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_crt_backbone_stays_under_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    """Weight decay or momentum would go on moving parameters without a gradient."""
    states = trained("crt+adq", tmp_path, optimizer=optimizer, weight_decay=0.1, clip=1.0, epochs=4).states
    for one, other in itertools.pairwise(states[1:]):
        moved = [name for name in same(one, other) if name.startswith("net.")]
        assert moved
        assert all(name.startswith("net.head") for name in moved)


def test_crt_first_stage_trains_everything(tmp_path: Path) -> None:
    """The backbone would be frozen from the start."""
    wrapped, alone = trained("crt+lsq", tmp_path / "crt").states, trained("lsq", tmp_path / "lsq", 1, {}).states
    ours = {name: value for name, value in wrapped[0].items() if name.startswith("net.")}
    theirs = {name: value for name, value in alone[0].items() if name.startswith("net.")}
    assert same(ours, theirs) == []


# --- the new classifier -----------------------------------------------------------------------------------------------


def at_second_stage(chain: str = "crt+lsq", seed: int = 0, **settings: Any) -> tuple[Any, Loop]:
    """A method that has trained an epoch, when its second stage has just begun."""
    method, data = ready(chain, epochs=2, params=HALF, seed=seed, **settings)
    loop = Loop(method, data)
    loop.epoch(list(data.train_dataloader())[:3])
    method.scope.epoch = 1
    with torch.no_grad():
        for member in method.members:
            member.start(loop.run, method.stages(2)[1])
    return method, loop


def test_crt_head_starts_anew() -> None:
    """The old classifier, biased to frequent classes, would be trained on; or seeds would share one classifier."""
    one, again, other = (at_second_stage(seed=seed)[0].net.head for seed in (0, 0, 1))
    before = ready("crt+lsq")[0].net.head
    bound = before.weight.shape[1] ** -0.5
    for name in ("weight", "bias"):
        fresh = getattr(one, name)
        assert not torch.equal(fresh, getattr(before, name))
        assert torch.equal(fresh, getattr(again, name))
        assert not torch.equal(fresh, getattr(other, name))
        assert fresh.abs().max() <= bound
    assert one.weight.std() > 0.4 * bound


@pytest.mark.parametrize("inner", ["lsq", "adq"])
def test_crt_heads_quantizer_is_fitted_to_the_new_weights(inner: str) -> None:
    """The new weights would meet a step that was learned for others, and most of them lie beyond the grid."""
    method, _ = at_second_stage(f"crt+{inner}", first_last="same")
    head = method.net.head
    found = {name: value.clone() for name, value in head.weight_quantizer.state_dict().items()}
    head.weight_quantizer.fit(head.weight)
    assert same(found, head.weight_quantizer.state_dict()) == []


def test_crt_new_head_has_no_momentum_from_the_old_one() -> None:
    """The first steps of the new classifier would go where the old one was going."""
    method, loop = at_second_stage()
    state_of = loop.run.opt.state
    assert all(p not in state_of for p in method.net.head.parameters())
    assert all(p in state_of for p in method.net.layer1.parameters())


def test_crt_second_stage_keeps_modes() -> None:
    """Running statistics would follow the class-balanced images."""
    method, loop = at_second_stage()
    method.train()
    method.epoch_start(loop.run)
    assert not method.net.bn1.training
    assert not method.net.conv1.weight_quantizer.training
    assert method.net.head.training
    assert method.net.head.act_quantizer.training


def test_crt_norms_of_the_frozen_network_may_train() -> None:
    """``norms="train"``, the authors' code, would do nothing; or parameters would move with the statistics."""
    method, data = ready("crt+lsq", epochs=2, params={"crt": {"share": 0.5, "norms": "train"}})
    loop, batches = Loop(method, data), list(data.train_dataloader())[:2]
    loop.epoch(batches)
    before = state(method)
    loop.epoch(batches, 1)
    assert method.net.bn1.training
    assert not method.net.conv1.weight_quantizer.training
    moved = {name for name in same(before, state(method)) if not name.startswith("net.head")}
    assert moved
    assert all("running" in name or "batches" in name for name in moved)


class Killed(Exception):
    """Stands for the kill."""


class Killer(L.Callback):
    """Ends the run in the middle of an epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 3 and batch_idx == 1:
            raise Killed


def test_crt_resumes_in_the_middle_of_the_second_stage(tmp_path: Path) -> None:
    """A run killed in the second stage would begin it once more, or go on with the whole network."""
    whole = trained("crt+adq", tmp_path / "whole", epochs=4).states[-1]
    method, data = ready("crt+adq", epochs=4, params=HALF)
    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        fit(method, data, recorder(tmp_path / "killed", method), callbacks=[Killer()])
    again, data = ready("crt+adq", epochs=4, params=HALF)
    train(again, data, tmp_path / "killed")
    assert same(whole, state(again)) == []


@pytest.mark.parametrize("chain", ["crt+ldam-drw+lsq", "ldam-drw+crt+lsq"])
def test_crt_head_is_what_a_method_put_there(chain: str, tmp_path: Path) -> None:
    """The cosine classifier would not be found, or count as backbone."""
    one, other = trained(chain, tmp_path).states
    moved = [name for name in same(one, other) if name.startswith("net.")]
    assert "net.head.linear.weight" in moved
    assert all(name.startswith("net.head.") for name in moved)


def test_crt_without_a_linear_head() -> None:
    """The run would end in a traceback, or train everything in its second stage."""
    with pytest.raises(RunFailed, match=r"crt acts on the classifier.*does not end in a linear layer"):
        without_linear_head("crt+lsq")
