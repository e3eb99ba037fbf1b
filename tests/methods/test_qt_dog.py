from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.models.resnet import ResNet8
from qatbench.bench.quant import Bits, audit, quant_layers
from qatbench.bench.resolve import resolve
from qatbench.bench.site import LAYERS
from qatbench.bench.spec import RunSpec
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, same, state, train
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.lsq_channel import ChannelStep
from qatbench.methods.qt_dog import quantizes

SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)


class TestQTDoG(MethodContract):
    method = "qt-dog+lsq"


def starting(start: float, **changes: object):
    """QT-DoG over LSQ that starts at this share of the steps."""
    return ready("qt-dog+lsq", params={"qt-dog": {"start": start}}, **changes)


def steps_of(method) -> dict[str, float]:
    return {name: layer.weight_quantizer.step.item() for name, layer in quant_layers(method.net)}


@given(st.integers(1, 5000), st.floats(0, 1))
@SMALL
def test_qt_dog_start(steps: int, start: float) -> None:
    """Quantization would begin at another step than the share says: 2000 of 5000 in the authors' runs."""
    begun = [quantizes(t, steps, start) for t in range(steps + 1)]
    assert begun == sorted(begun)
    assert begun[-1]
    assert abs(begun.index(True) - start * steps) <= 0.5
    assert [quantizes(t, 5000, 0.4) for t in (1999, 2000)] == [False, True]


def test_qt_dog_start_0_is_the_inner_method_with_float_inputs(tmp_path: Path) -> None:
    """The wrapper would change training by being there."""
    alone, data = ready("lsq", epochs=1, bits="w3a32")
    train(alone, data, tmp_path / "alone")
    wrapped, data = starting(0.0, epochs=1)
    assert wrapped.bit_plan == alone.bit_plan
    train(wrapped, data, tmp_path / "wrapped")
    assert same(state(alone), state(wrapped)) == []


def test_qt_dog_before_the_start_is_float_training() -> None:
    """Before the start the network would feel its grid: the method would be plain QAT, or a step would move that nobody uses."""
    plain, data = ready("fp32")
    late, _ = starting(1.0)
    before = steps_of(late)
    batches = list(data.train_dataloader())[:3]
    losses = Loop(plain, data).epoch(batches), Loop(late, data).epoch(batches)
    assert losses[0] == losses[1]
    ours, theirs = dict(late.net.named_parameters()), dict(plain.net.named_parameters())
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    assert steps_of(late) == before


def test_qt_dog_is_quantized_in_use_at_any_time() -> None:
    """A network would be validated that is not the one the table's bits are of."""
    late, data = starting(1.0)
    Loop(late, data).epoch(list(data.train_dataloader())[:2])
    late.scope.step = 2
    batch = all_train(data)
    levels = audit(late.net, batch.x)
    assert all(w <= 2 ** late.bit_plan[name].w and a is None for name, (w, a) in levels.items())
    quantized = logits(late, late.net, batch)
    for _, layer in quant_layers(late.net):
        layer.weight_quantizer = None
    assert not torch.equal(quantized, logits(late, late.net, batch))


def test_qt_dog_fits_again_when_it_starts() -> None:
    """Quantization would start on the grid of the weights of long ago; or a step that was learned would be thrown away later."""
    method, data = starting(3 / 28)  # of 4 epochs of 7 steps
    loop, batches, fitted = Loop(method, data), list(data.train_dataloader()), []
    calls = {id(layer.weight_quantizer): layer for _, layer in quant_layers(method.net)}
    original = LearnedStep.fit

    def fit(self: LearnedStep, x: torch.Tensor) -> None:
        fitted.append((method.scope.step, torch.equal(x, calls[id(self)].weight)))
        original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnedStep, "fit", fit)
        before = steps_of(method)
        loop.epoch(batches[:2])
        assert steps_of(method) == before
        loop.epoch(batches[:3])
        moved = steps_of(method)
        assert all(moved[name] != before[name] for name in before)
        loop.epoch(batches[:6])
    assert fitted == [(2, True)] * len(calls) * 2  # after the third step of each epoch of three or more; never else
    assert steps_of(method) != moved  # learned from then on


def test_qt_dog_resumes_across_its_start() -> None:
    """A run that was killed around the start would fit its grid twice, or never, and end with other weights."""
    for start in (6 / 28, 7 / 28, 8 / 28):  # the last float step ends an epoch of 7 steps, or is next to it
        one, data = starting(start)
        batches, loop = list(data.train_dataloader()), Loop(one, data)
        assert len(batches) == 7
        loop.epoch(batches)
        middle = copy.deepcopy({"state": one.state_dict(), "opt": loop.run.opt.state_dict()})
        loop.epoch(batches[:3], 1)
        other, data = starting(start)
        again = Loop(other, data)
        other.load_state_dict(middle["state"])
        again.run.opt.load_state_dict(middle["opt"])
        again.epoch(batches[:3], 1)
        assert same(state(one), state(other)) == [], start


def test_the_first_learned_steps_are_of_ordinary_size() -> None:
    """Adam's averages would be over many zeros: of a long run the fitted grid would be left by jumps of three times the lr."""
    method, data = starting(6 / 28, optimizer="adam", lr=1e-4)
    loop, batches = Loop(method, data), list(data.train_dataloader())
    loop.epoch(batches[:6])
    before = steps_of(method)
    loop.epoch(batches[:1], 1)  # step 7
    moved = [abs(step - before[name]) for name, step in steps_of(method).items()]
    assert max(moved) == pytest.approx(
        1e-4, rel=0.01
    )  # Adam's first step is lr; after six zeros it would be half of that


def test_a_start_beyond_the_last_step_still_fits(tmp_path: Path) -> None:
    """A run too short to start would be quantized on the grid of the float network that it began with."""
    method, data = starting(1.0, epochs=1)
    train(method, data, tmp_path)
    for name, layer in quant_layers(method.net):
        fresh = copy.deepcopy(layer.weight_quantizer)
        fresh.fit(layer.weight)
        assert torch.equal(fresh.step, layer.weight_quantizer.step), name


def test_inputs_stay_in_float_whatever_is_asked(tmp_path: Path) -> None:
    """A table would show w4a4 for a network whose inputs are float, beside networks that really have 4 bits there."""
    for bits in ("w4a4", "w4a32", "avg3"):
        method, _ = starting(0.4, bits=bits)
        assert {b.a for b in method.bit_plan.values()} == {32}
        assert all(layer.act_quantizer is None for _, layer in quant_layers(method.net))

    def resolved(method: str, bits: str, **more: object) -> tuple[str, str]:
        found = resolve(RunSpec(method=method, bits=bits, **more), data_root=None, cache=tmp_path)
        return found.spec.bits, found.run_id

    assert resolved("qt-dog", "w4a4") == resolved("qt-dog+lsq-channel", "w4a8") == resolved("qt-dog", "w4a32")
    assert resolved("qt-dog", "w7a7")[0] == "w7a32"
    assert resolved("qt-dog", "avg2.5")[0] == "avg2.5a32"
    assert resolved("kd+qt-dog", "w4a4")[0] == "w4a32"
    assert resolved("lsq", "w4a4")[0] == "w4a4"


def test_the_default_is_the_authors_quantizer_and_policy(tmp_path: Path) -> None:
    """Under the name of the method there would be another one: a step for a tensor, or 8 bits in the first and the last layer."""
    names = ("qt-dog", "qt-dog+lsq-channel")
    specs = [RunSpec(method=name, bits="w7a32", first_last="native") for name in names]
    assert len({resolve(spec, data_root=None, cache=tmp_path).run_id for spec in specs}) == 1
    method, _ = ready("qt-dog+lsq-channel", bits="w3a32", first_last="native")
    bits = list(method.bit_plan.values())
    assert {b.w for b in bits[:-1]} == {3}
    assert bits[-1] == Bits(32, 32)
    quantizers = [layer.weight_quantizer for _, layer in quant_layers(method.net)]
    assert {type(q) for q in quantizers} == {ChannelStep}


@pytest.mark.parametrize("chain", ["qt-dog+lsq", "sam+qt-dog+lsq-channel", "qt-dog+adq"])
def test_the_published_trainer_stands_still_once_it_quantizes(chain: str) -> None:
    """The setting would be without effect, or norms and classifier stand still, too, which train on in the published runs."""
    params = {"qt-dog": {"start": 2 / 28, "train_quantized": False}, "adq": {"period": 1}}
    own = {name: value for name, value in params.items() if name in chain}
    method, data = ready(chain, params=own, first_last="native", weight_decay=0.1)
    loop, batches = Loop(method, data), list(data.train_dataloader())
    start = state(method)
    loop.epoch(batches[:2])
    frozen = {f"net.{name}." for name, _ in quant_layers(method.net)}
    before = state(method)
    assert any(name.startswith(tuple(frozen)) for name in start if not torch.equal(start[name], before[name]))
    loop.epoch(batches[:5], 1)
    moved = {name for name, value in state(method).items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith(tuple(frozen))}
    assert {"net.head.weight", "net.bn1.weight"} <= moved


def test_bad_requests(tmp_path: Path) -> None:
    """A user would get inputs of four bits under the name of a method that has none, or a run that quantizes nothing."""

    def answer(**more: object) -> str:
        with pytest.raises(UserError) as caught:
            resolve(RunSpec(method="qt-dog", **more), data_root=None, cache=tmp_path)
        return str(caught.value)

    assert "quantizes nothing" in answer(bits="w32a4")

    layers = [name for name, module in ResNet8(3, 10).named_modules() if isinstance(module, LAYERS)]
    assert "leaves inputs in float; give conv1 w4a32" in answer(plan=dict.fromkeys(layers, Bits(4, 4)))
    assert "start" in answer(params={"qt-dog": {"start": 1.5}})
    method, data = ready("qt-dog+fp32")
    assert "no quantizers" in str(method.skip(data.task))
