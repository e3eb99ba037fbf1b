from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qatbench.bench.assemble import assemble
from qatbench.bench.quant import quant_layers
from qatbench.bench.testing import TinyNet, float_net, ready
from torch import nn

Plug = Callable[..., Path]


def test_modules_are_replaced_the_inner_method_first(plug: Plug) -> None:
    """A wrapper would not see what the method inside it put there; or layers would be quantized before they are replaced."""
    plug("""
    class Wrap(nn.Module):
        def __init__(self, old, who):
            super().__init__()
            self.old, self.who = old, who
        def forward(self, *x): return self.old(*x)
    class Inner(LSQ):
        name = "inner"
        def replace(self, site, module, scope): return Wrap(module, "inner") if site.kind in ("norm", "joint") else module
    class Outer(Wrapper):
        name = "outer"
        alters = frozenset({"norm"})
        def replace(self, site, module, scope): return Wrap(module, "outer") if site.kind == "norm" else module
    """)
    method, _ = ready("outer+inner")
    for site in method.sites:
        module = method.net.get_submodule(site.name)
        if site.kind == "norm":
            assert (module.who, module.old.who) == ("outer", "inner")
        if site.kind == "joint":
            assert module.who == "inner"


def test_layers_of_a_replacement_are_quantized_too(plug: Plug) -> None:
    """A joint or a head with weights of its own would stay in float, and its cost would be missing."""
    plug("""
    class Mix(nn.Module):
        def __init__(self, joint, width):
            super().__init__()
            self.joint, self.mix = joint, nn.Conv2d(width, width, 1)
        def forward(self, *branches): return self.mix(self.joint(*branches))
    class Mixes(LSQ):
        name = "mixes"
        def replace(self, site, module, scope): return Mix(module, site.channels[0]) if site.kind == "joint" else module
    """)
    method, _ = ready("mixes")
    placed = dict(quant_layers(method.net))
    own = [name for name in placed if name.endswith(".mix")]
    assert len(own) == sum(site.kind == "joint" for site in method.sites) == 3
    assert set(own) < {site.name for site in method.sites if site.kind == "layer"}
    assert set(own) < set(method.bit_plan)


def test_quantizers_are_fitted_before_training_on_the_probe() -> None:
    """Ranks of a distributed run would start from different grids."""
    method, _ = ready("lsq")
    stem = method.net.conv1.act_quantizer
    x = method.probe.x
    assert stem.step.item() == pytest.approx(2 * x.abs().mean().item() / stem.qmax**0.5)
    assert all(layer.act_quantizer.step.item() != 1.0 for _, layer in quant_layers(method.net))


def test_a_plan_from_a_checkpoint_repeats_the_surgery_and_fits_nothing(plug: Plug) -> None:
    """A resumed run would measure a new plan, or calibrate on trained weights."""
    plug("""
    class Mixed(LSQ):
        name = "mixed"
        def plan(self, sites, bits, probe):
            assert not getattr(type(self), "planned", False), "planned twice"
            type(self).planned = True
            layers = [s for s in sites if s.kind == "layer"]
            return {s.name: Bits(2 + k % 3, 4) for k, s in enumerate(layers)}
    """)
    method, data = ready("mixed")
    again = assemble(method.spec, float_net(), data.task, data.probe(48), method.bit_plan)
    assert again.bit_plan == method.bit_plan
    assert {n: q.weight_quantizer.bits for n, q in quant_layers(again.net)} == {
        n: b.w for n, b in method.bit_plan.items()
    }
    assert all(layer.act_quantizer.step.item() == 1.0 for _, layer in quant_layers(again.net))
    assert again.state_dict().keys() == method.state_dict().keys()


@pytest.mark.parametrize(
    ("bits", "first_last", "inner", "edge"),
    [
        ("w2a4", "8bit", (2, 4), (8, 8)), ("w2a4", "fp", (2, 4), None), ("w2a4", "same", (2, 4), (2, 4)),
        ("w2a32", "8bit", (2, None), (8, None)), ("w32a4", "same", (None, 4), (None, 4)),
    ],
)  # fmt: skip
def test_bits_reach_the_layers(bits: str, first_last: str, inner: tuple, edge: tuple | None) -> None:
    """The table would say other bits than the network has."""
    method, _ = ready("lsq", bits=bits, first_last=first_last)
    placed = dict(quant_layers(method.net))
    for site in method.sites:
        if site.kind != "layer":
            continue
        expected = edge if site.edge else inner
        if expected is None:
            assert site.name not in placed
            continue
        quantizers = placed[site.name].weight_quantizer, placed[site.name].act_quantizer
        assert tuple(None if q is None else q.bits for q in quantizers) == expected
        if quantizers[0] is not None:
            assert quantizers[0].signed
        if quantizers[1] is not None:
            assert quantizers[1].signed == site.signed_input


def test_the_networks_own_weights_are_trained_and_the_teacher_has_copies() -> None:
    """Training would move a copy of the weights, or the teacher along with the student."""
    net = float_net()
    weights = {id(p) for p in net.parameters()}
    method, data = ready("kd+lsq")
    method = assemble(method.spec, net, data.task, data.probe(48))
    assert weights <= {id(p) for p in method.net.parameters()}
    teacher = method._float_teacher[0]
    assert not weights & {id(p) for p in teacher.parameters()}
    assert isinstance(teacher, TinyNet)
    assert not list(quant_layers(teacher))


def test_assembling_is_deterministic_and_draws_nothing() -> None:
    """A method that is built with one random number more would train on other batches than its rivals."""
    torch.manual_seed(5)
    net = TinyNet(3, 4).to(memory_format=torch.channels_last)
    method, data = ready("kd+lsq")
    before = torch.get_rng_state()
    assembled = assemble(method.spec, net, data.task, data.probe(48))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(assembled.net, nn.Module)
    assert assembled.net.training == net.training


@pytest.mark.parametrize("name", ["emaq", "alignq", "climbq"])
def test_what_is_averaged_starts_from_what_training_sees(name: str) -> None:
    """Running statistics would start from activations that explode, and a short run be tested with those: loss 20,000 for 1.5."""
    method, data = ready(name, bits="w4a4")
    batch, losses = next(iter(data.train_dataloader())), []
    for training in (False, True):
        method.train(training)
        with torch.no_grad():
            losses.append(float(method.compute_losses(batch, track=False)["task"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.3)
