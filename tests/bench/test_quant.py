from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.assemble import assemble
from qatbench.bench.chain import build
from qatbench.bench.data import Batch
from qatbench.bench.errors import RunFailed
from qatbench.bench.method import Wrapper
from qatbench.bench.models.resnet import CifarResNet
from qatbench.bench.quant import (
    Bits,
    CdfQuantizer,
    IntegerLayer,
    Quantizer,
    QuantLayer,
    RunningCdfQuantizer,
    Scope,
    UniformQuantizer,
    audit,
    calibrate,
    cost,
    deployed,
    quant_layers,
    round_ste,
    snap,
    swap,
)
from qatbench.bench.quant.layer import _joined
from qatbench.bench.quant.quantizer import finite_state, step_of
from qatbench.bench.registry import ROOT, find, plugins
from qatbench.bench.site import Site
from qatbench.bench.spec import RunSpec
from qatbench.bench.task import Task
from qatbench.bench.testing import check_codes
from qatbench.methods.dorefa import TanhWeight, UnitActivation
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.lsqplus import LearnedStepOffset, SpreadStep
from qatbench.methods.n2uq import LearnedThresholds
from qatbench.methods.pact import LearnedClip
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), macs=288, weights=36, inputs=72)
ONE_DOMAIN = Task("classification", tuple("0123456789"), (1,) * 10, ("all",))
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)

MAKERS: dict[str, Callable[[int], Quantizer]] = {
    "minmax signed": lambda b: UniformQuantizer(b, SITE, Scope(), True),
    "minmax unsigned": lambda b: UniformQuantizer(b, SITE, Scope(), False),
    "percentile signed": lambda b: UniformQuantizer(b, SITE, Scope(), True, "percentile", 90.0),
    "percentile unsigned": lambda b: UniformQuantizer(b, SITE, Scope(), False, "percentile", 90.0),
    "lsq signed": lambda b: LearnedStep(b, SITE, Scope(), True, 36),
    "lsq unsigned": lambda b: LearnedStep(b, SITE, Scope(), False, 72),
    "lsqplus": lambda b: LearnedStepOffset(b, SITE, Scope(), 72, 20),
    "lsqplus spread": lambda b: SpreadStep(b, SITE, Scope(), True, 36),
    "pact signed": lambda b: LearnedClip(b, SITE, Scope(), True, 8.0),
    "pact unsigned": lambda b: LearnedClip(b, SITE, Scope(), False, 8.0),
    "dorefa activation": lambda b: UnitActivation(b, SITE, Scope()),
    "dorefa weight max": lambda b: TanhWeight(b, SITE, Scope(), "max"),
    "dorefa weight none": lambda b: TanhWeight(b, SITE, Scope(), "none"),
    "n2uq signed": lambda b: LearnedThresholds(b, SITE, Scope(), True),
    "n2uq unsigned": lambda b: LearnedThresholds(b, SITE, Scope(), False),
    "cdf weight": lambda b: CdfQuantizer(b, SITE, Scope()),
    "cdf activation": lambda b: RunningCdfQuantizer(b, SITE, Scope()),
}
# Their output goes through tanh or a CDF again, so quantizing twice is not quantizing once.
FIXED_GRID = [name for name in MAKERS if "dorefa weight" not in name and "cdf" not in name]


def built_in() -> Iterator[tuple[str, Callable[[int], Quantizer]]]:
    """Weight and activation quantizers of every built-in method, as the method itself makes them, for both kinds of input."""
    for plugin in plugins("methods"):
        if not plugin.origin.startswith(str(ROOT)) or (
            issubclass(plugin.cls, Wrapper) and plugin.cls.default_inner is None
        ):
            continue
        if tuple(plugin.cls.bits) == (32,):
            continue
        for kind, signed in (("weight", True), ("act", True), ("act", False)):

            def make(bits: int, name: str = plugin.name, kind: str = kind, signed: bool = signed) -> Quantizer:
                method = build(name, {})
                for member in method.members:
                    member.spec, member.scope, member.task = RunSpec(method=name), Scope(), ONE_DOMAIN
                place = replace(SITE, signed_input=signed)
                return getattr(method, f"{kind}_quantizer")(bits, place, Scope())

            yield f"{plugin.name} {kind} {'signed' if signed else 'unsigned'}", make


EVERY = {**MAKERS, **dict(built_in())}

# Numbers that a float32 tensor may hold and that a step fitted to it can divide: none so small that the step would be zero.
sizes = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)
number = st.one_of(
    st.just(0.0), sizes, sizes.map(lambda v: -v), st.floats(-4, 4, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0)
)
tensors = st.one_of(
    st.lists(number, min_size=1, max_size=40).map(torch.tensor),
    st.just(torch.zeros(7)),
    st.just(torch.full((5,), 2.0**100)),
    st.just(torch.full((5,), -(2.0**100))),
    st.just(torch.full((5,), 2.0**-100)),
    st.integers(0, 10**6).map(lambda s: torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(s)) * 0.1),
)


def fitted(make: Callable[[int], Quantizer], bits: int, x: Tensor) -> Quantizer:
    quantizer = make(bits)
    quantizer.fit(x)
    return quantizer.eval()


@pytest.mark.parametrize("name", EVERY)
@given(st.integers(2, 8), tensors, tensors)
@SMALL
def test_codes_are_few_and_decode_to_the_output(name: str, bits: int, seen: Tensor, x: Tensor) -> None:
    """A width would be a claim, or the deployed integers would not be the numbers that were measured, for some strange tensor."""
    quantizer = fitted(EVERY[name], bits, seen)
    for value in (seen, x, -x, torch.cat([x.flatten(), seen.flatten()])):
        check_codes(name, quantizer, value)
        assert bool(torch.isfinite(quantizer(value)).all())
        codes = quantizer.encode(value)[0]
        assert codes.dtype == torch.int32
        assert codes.shape == value.shape
        assert int(codes.min()) >= quantizer.qmin
        assert int(codes.max()) <= quantizer.qmax


@pytest.mark.parametrize("name", MAKERS)
@given(st.integers(2, 8), tensors, tensors)
@SMALL
def test_monotone(name: str, bits: int, seen: Tensor, x: Tensor) -> None:
    """A larger input would give a smaller output: the grid would be folded."""
    quantizer = fitted(MAKERS[name], bits, seen)
    values = quantizer(x.flatten().sort().values)
    assert bool((values[1:] >= values[:-1]).all())


@pytest.mark.parametrize("name", FIXED_GRID)
@given(st.integers(2, 8), tensors, tensors)
@SMALL
def test_idempotent(name: str, bits: int, seen: Tensor, x: Tensor) -> None:
    """A value on the grid would be moved to another place of the grid."""
    quantizer = fitted(MAKERS[name], bits, seen)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_finite(name: str) -> None:
    """One strange tensor would turn the weights into NaN."""
    for x in (torch.zeros(8), torch.full((8,), 1e30), torch.linspace(-3, 3, 50), torch.full((8,), -1e-30)):
        quantizer = fitted(MAKERS[name], 3, x)
        leaf = x.clone().requires_grad_()
        quantizer(leaf).sum().backward()
        gradients = [leaf.grad, *(p.grad for p in quantizer.parameters())]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "cdf weight"])  # which has its own: test_cdf.py
def test_all_codes_are_used(name: str) -> None:
    """A 4-bit quantizer would be a 3-bit one: a mistake that "at most 2^bits codes" does not show."""
    for bits in (2, 4, 8):
        x = torch.linspace(-1, 1, 4001)
        quantizer = fitted(MAKERS[name], bits, x)
        wide = x if "weight" in name else torch.linspace(-20, 20, 80_001)
        codes = quantizer.encode(wide)[0].unique()
        # Symmetric, so the lowest two's complement code stays unused.
        lowest = -quantizer.qmax if name == "pact signed" else quantizer.qmin
        assert codes.tolist() == list(range(lowest, quantizer.qmax + 1))


def test_snap_stays_on_the_grid_where_the_usual_idiom_leaves_it() -> None:
    """A 16-entry codebook would take 18 values, and the deployed integers would not be what was measured."""
    rng = torch.Generator().manual_seed(0)
    codebook = torch.randn(16, generator=rng)
    x = torch.randn(20_000, generator=rng)
    q = codebook[(x[:, None] - codebook).abs().argmin(1)]
    assert q.unique().numel() == 16
    assert (x + (q - x).detach()).unique().numel() > 16
    assert torch.equal(snap(x, q), q)


def test_snaps_gradient_is_that_of_x() -> None:
    """Nothing below a quantizer would learn; or a codebook's own gradient would leak in."""
    x = torch.randn(9, requires_grad=True)
    q = torch.randn(9, requires_grad=True)
    snap(3 * x, 2 * q).mul(torch.arange(9.0)).sum().backward()
    assert torch.equal(x.grad, 3 * torch.arange(9.0))
    assert q.grad is None


def test_round_ste() -> None:
    """Halves would be rounded up, not to even, unlike in every exported runtime; or the rounding would stop the gradient."""
    x = torch.tensor([-1.5, -0.5, 0.4, 0.5, 1.5, 2.5], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, 0, 0, 0, 2, 2]
    y.sum().backward()
    assert x.grad.tolist() == [1] * 6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_fills_the_range(bits: int) -> None:
    """The largest value would be clipped, or part of the grid would be wasted."""
    x = torch.tensor([-2.0, 0.5, 1.75])
    signed = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), True), bits, x)
    assert float(signed.step) == pytest.approx(2.0 / (2 ** (bits - 1) - 1))
    assert float(signed(x)[0]) == pytest.approx(-2.0)
    unsigned = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), False), bits, x.relu())
    assert float(unsigned.step) == pytest.approx(1.75 / (2**bits - 1))
    assert unsigned(x)[0] == 0


def test_percentile_cuts_the_tail() -> None:
    """One outlier would set the range, which is what percentile calibration is for."""
    x = torch.cat([torch.linspace(0, 1, 999), torch.tensor([1000.0])])
    percentile = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), False, "percentile", 99.0), 4, x)
    minmax = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), False), 4, x)
    assert float(percentile.step) == pytest.approx(0.99 / 15, rel=0.01)
    assert float(minmax.step) == pytest.approx(1000 / 15)
    whole = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), False, "percentile", 100.0), 4, x)
    assert float(whole.step) == float(minmax.step)


def test_percentile_of_mostly_zeros_is_not_zero() -> None:
    """After a ReLU most values may be zero; a step of zero would turn the layer's output into NaN."""
    x = torch.zeros(1000)
    x[0] = 3.0
    quantizer = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), False, "percentile", 99.0), 4, x)
    assert float(quantizer.step) == pytest.approx(3.0 / 15)


def test_uniform_gradient_is_one_inside_and_zero_outside() -> None:
    """Clipped values would go on growing, or nothing would learn."""
    quantizer = fitted(lambda b: UniformQuantizer(b, SITE, Scope(), True), 4, torch.tensor([1.4]))
    x = torch.tensor([-5.0, -1.0, 0.3, 1.3, 9.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 1, 0])


def test_broken_state_is_found() -> None:
    """A run whose step is NaN or has collapsed would be recorded as done."""
    quantizer = LearnedStep(4, SITE, Scope(), True, 9)
    assert finite_state(quantizer) is None
    for value, words in (
        (float("nan"), "step is not finite"),
        (float("inf"), "not finite"),
        (1e-9, "collapsed"),
        (0.0, "collapsed"),
    ):
        with torch.no_grad():
            quantizer.step.fill_(value)
        assert words in str(finite_state(quantizer))
    step = step_of(LearnedClip(4, SITE, Scope(), False, 6.0))
    assert step is not None
    assert step.item() == pytest.approx(6.0 / 15)
    assert step_of(UnitActivation(4, SITE, Scope())).item() == pytest.approx(1 / 15)  # type: ignore[union-attr]
    assert step_of(TanhWeight(4, SITE, Scope(), "max")) is None


# --- layers -----------------------------------------------------------------------------------------------------------


def layers() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=True), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2, bias=False), torch.randn(2, 4, 7, 7)),
        (nn.Linear(5, 3), torch.randn(4, 5)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_quant_layer_is_the_float_layer_but_for_the_quantizers(which: int) -> None:
    """Stride, padding, groups or bias would be lost in surgery; or a float weight would not load; or a copy would be trained."""
    layer, x = layers()[which]
    plain = QuantLayer(layer, None, None)
    assert torch.equal(plain(x), layer(x))
    assert plain.weight is layer.weight
    assert plain.bias is layer.bias
    full = QuantLayer(layer, MAKERS["lsq signed"](4), MAKERS["lsq signed"](4))
    assert set(layer.state_dict()) < set(full.state_dict())
    full.weight_quantizer.fit(layer.weight)
    full.act_quantizer.fit(x)
    with torch.no_grad():
        layer_q = layers()[which][0]
        layer_q.weight.copy_(full.weight_quantizer(layer.weight))
    assert torch.equal(full(x), layer_q(full.act_quantizer(x)))


def test_padding_that_cannot_be_kept_is_refused() -> None:
    """A convolution that pads by reflection would silently pad with zeros after surgery."""
    with pytest.raises(ValueError, match="reflect"):
        QuantLayer(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), None, None)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
@pytest.mark.parametrize("which", range(3))
def test_integer_layer_is_the_quantized_layer(which: int, kind: str, bits: int) -> None:
    """What is shipped would not be what was measured; 8-bit unsigned codes reach 255, which int8 does not hold."""
    layer, x = layers()[which]
    weight = LearnedStep(bits, SITE, Scope(), True, 9) if kind == "signed" else TanhWeight(bits, SITE, Scope(), "max")
    quantized = QuantLayer(layer, weight, None)
    with torch.no_grad():
        layer.weight.view(-1)[0], layer.weight.view(-1)[1] = -9.0, 9.0  # so that the outermost codes occur
    weight.fit(layer.weight)
    if isinstance(weight, LearnedStep):
        with torch.no_grad():
            weight.step.fill_(9.0 / 2 ** (bits - 1))
    codes = weight.encode(layer.weight)[0]
    assert (int(codes.min()), int(codes.max())) == (weight.qmin, weight.qmax)
    shipped = IntegerLayer(quantized)
    assert shipped.codes.dtype == torch.int8
    assert "weight" not in shipped.state_dict()
    assert torch.equal(shipped(x), quantized(x))


def test_a_float_weight_has_no_integer_form() -> None:
    """A layer in float would be counted among the deployed integers."""
    with pytest.raises(ValueError, match="float weight"):
        IntegerLayer(QuantLayer(nn.Linear(2, 2), None, None))


class Small(CifarResNet):
    blocks, width = 1, 4


def quantized_net(bits: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = Small(3, 4)
    for name, layer in [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]:
        swap(net, name, QuantLayer(layer, MAKERS["lsq signed"](bits), MAKERS["lsq signed"](bits)))
    return net


def test_calibration_moves_nothing_but_the_quantizers() -> None:
    """Every method's BatchNorm statistics would start from another place than the float network's; modes would be left changed."""
    net = quantized_net()
    net.train()
    net.bn1.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = {name: m.training for name, m in net.named_modules() if name != "bn1"}
    rng = torch.get_rng_state()
    calibrate(net, torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.endswith("quantizer.step")}
    assert {name: m.training for name, m in net.named_modules() if name != "bn1"} == modes
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(rng, torch.get_rng_state())


def test_calibration_sees_what_the_quantized_layers_before_make() -> None:
    """A step would be fitted to the float network's activations, which the quantized network does not have."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    net = nn.Sequential(
        QuantLayer(first, UniformQuantizer(2, SITE, Scope(), True), None),
        QuantLayer(second, None, UniformQuantizer(4, SITE, Scope(), True)),
    )
    x = torch.randn(16, 4)
    calibrate(net, x)
    seen = net[0](x).detach().abs().max()
    assert float(net[1].act_quantizer.step) == pytest.approx(float(seen) / 7)
    assert float(seen) != pytest.approx(first(x).abs().max().item(), rel=1e-3)


def test_an_error_in_calibration_leaves_no_hook_behind() -> None:
    """Every later pass would refit the quantizers."""
    net = quantized_net().train()
    with pytest.raises(RuntimeError):
        calibrate(net, torch.randn(2, 5, 8, 8))
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net.training


def test_audit_counts_codes() -> None:
    """The audit that "2-bit" is 2 bits would count values (a step a channel has many) or look at the wrong layer."""
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    net = nn.Sequential()
    net.add_module(
        "one", QuantLayer(layer, UniformQuantizer(8, SITE, Scope(), True), UniformQuantizer(2, SITE, Scope(), False))
    )
    net.add_module("two", QuantLayer(nn.Linear(2, 2), None, UniformQuantizer(8, SITE, Scope(), True)))
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.1, 1.1, 2.1, 2.9]])
    calibrate(net, x)
    net.train()
    levels = audit(net, x)
    assert levels["one"] == (3, 4)
    assert levels["two"][0] is None
    assert levels["two"][1] == net[1].act_quantizer.encode(net[0](x))[0].unique().numel()
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


class Cheat(UniformQuantizer):
    """Two bits on paper."""

    def __init__(self, how: str) -> None:
        super().__init__(2, SITE, Scope(), False)
        self.how = how

    def quantize(self, x: Tensor) -> Tensor:
        q = super().quantize(x)
        return q + 0.001 * torch.arange(x.numel()).view(x.shape) if self.how else q

    def encode(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        codes, decode = super().encode(x)
        if self.how == "hidden":
            return codes, decode
        return codes, lambda k: decode(k) + 0.001 * torch.arange(x.numel()).view(x.shape)


@pytest.mark.parametrize(
    ("how", "words"), [("hidden", "not what its codes stand for"), ("open", "several values for one code")]
)
def test_audit_finds_values_that_no_code_stands_for(how: str, words: str) -> None:
    """A quantizer could report two bits and compute with more."""
    net = nn.Sequential(QuantLayer(nn.Linear(4, 2, bias=False), None, Cheat(how)))
    with pytest.raises(RunFailed, match=words):
        audit(net, torch.rand(6, 4))


def test_audit_counts_within_what_shares_a_grid() -> None:
    """A grid a channel would be taken for one that breaks its bits, or codes of one group for those of another."""

    class PerRow(UniformQuantizer):
        per = "channel"

        def quantize(self, x: Tensor) -> Tensor:
            return self.encode(x)[1](self.encode(x)[0])

        def encode(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            step = x.abs().amax(1, keepdim=True)
            return (x / step).round().int(), lambda k: k * step

    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, -5.0, 0.0], [0.1, 0.1, 0.1]]))
    net = nn.Sequential(QuantLayer(layer, PerRow(2, SITE, Scope(), True), None))
    assert audit(net, torch.rand(2, 3))["0"] == (3, None)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_a_tensor_with_nan_fails_the_run_with_its_layers_name(where: str) -> None:
    """A diverged float network would be quantized to NaN, and fail somewhere else for a reason that nobody understands."""
    net = nn.Sequential(
        QuantLayer(nn.Linear(3, 2), LearnedStep(4, SITE, Scope(), True, 9), LearnedStep(4, SITE, Scope(), True, 9))
    )
    x = torch.randn(4, 3)
    with torch.no_grad():
        (net[0].weight if where == "weight" else x)[0, 0] = float("nan")
    with pytest.raises(RunFailed, match=f"the {where} of 0 is not finite"):
        calibrate(net, x)


class Twice(nn.Module):
    """A convolution that runs twice, on a wide input and on a narrow one."""

    def __init__(self, narrow: float = 2e-4, pool: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.narrow, self.pool = narrow, pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        again = self.narrow * (nn.functional.avg_pool2d(y, 2) if self.pool else y)
        return self.head(y.mean((2, 3)) + self.b(again).mean((2, 3)))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("method", ["ptq", "lsq", "lsqplus", "n2uq"])
def test_a_layer_that_runs_twice_is_fitted_to_both_inputs(method: str, pool: bool) -> None:
    """The last call would win: a grid for inputs of 1e-4 would clip those of 1, and eight bits be worse than one."""
    torch.manual_seed(0)
    net, x = Twice(pool=pool), torch.randn(16, 3, 8, 8)
    batch = Batch(x, torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
    made = assemble(RunSpec(method=method, bits="w8a8"), net, ONE_DOMAIN, batch)
    quantizer = made.net.get_submodule("b").act_quantizer
    assert isinstance(quantizer, Quantizer)
    with torch.no_grad():
        wide = made.net.get_submodule("a")(x).relu()
        error = (quantizer.eval()(wide) - wide).abs().mean() / wide.abs().mean()
    assert float(error) < (0.15 if method == "lsq" else 0.03)  # its fit clips more than the others


def test_inputs_of_a_layer_are_joined_image_by_image() -> None:
    """A quantizer with statistics by domain or channel would measure one image's values as another's."""
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    assert torch.equal(_joined(maps)[1, 2].flatten(), torch.cat([m[1, 2].flatten() for m in maps]))
    tokens, rows = [torch.randn(2, 5, 3), torch.randn(2, 4, 3)], [torch.randn(2, 3), torch.randn(2, 3)]
    assert torch.equal(_joined(tokens)[1, 2].flatten(), torch.cat([t[1, :, 2] for t in tokens]))
    assert torch.equal(_joined(rows)[1, 2].flatten(), torch.stack([r[1, 2] for r in rows]))
    assert _joined([maps[0], 9 * maps[0][:1]]) is not None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", EVERY)
def test_denormal_inputs_count_as_zeros(name: str, bits: int) -> None:
    """A dead layer whose outputs are some 1e-42 would end the run with a message of torch, or with a step of 0."""
    x = torch.tensor([[0.0, 1e-42, 3e-43, 7e-45], [1e-42, 0.0, 1e-45, 1e-40]])
    check_codes(name, fitted(EVERY[name], bits, x), x)
    if " act " in name:
        layer = QuantLayer(nn.Linear(4, 2), None, EVERY[name](bits))
        calibrate(nn.Sequential(layer), x)
        assert layer.act_quantizer is not None
        assert finite_state(layer.act_quantizer) is None
        check_codes(name, layer.act_quantizer.eval(), x)


def test_deployed_is_a_copy_in_eval_mode() -> None:
    """Deploying a network in the middle of training would end its training; or a float weight would be shipped along."""
    net = quantized_net().train()
    calibrate(net, torch.randn(8, 3, 8, 8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    shipped = deployed(net)
    assert not shipped.training
    assert not any(p.requires_grad for p in shipped.parameters())
    assert not list(quant_layers(shipped))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.eval()(x), shipped(x))


# --- what a plan costs ------------------------------------------------------------------------------------------------

NET = [
    Site(
        "stem", "layer", (8,), macs=1000, weights=100, inputs=300, edge=True, live=((300, ("stem",)), (200, ("body",)))
    ),
    Site("bn", "norm", (8,), inputs=77),
    Site("body", "layer", (8,), macs=4000, weights=400, inputs=200, live=((200, ("body",)), (500, ()), (70, ()))),
    Site("wide", "layer", (8,), macs=2000, weights=600, inputs=500),
    Site("fc", "layer", (4,), macs=32, weights=32, inputs=8, edge=True),
    Site("fc", "head", (4,), macs=32, weights=32, inputs=8, edge=True),
]


class FourLayers(nn.Module):
    """Modules of the sizes that `NET` names."""

    def __init__(self) -> None:
        super().__init__()
        for name, weights in (("stem", 100), ("body", 400), ("wide", 600), ("fc", 32)):
            setattr(self, name, nn.Linear(weights, 1, bias=name == "fc"))
        self.bn = nn.BatchNorm1d(8)


def test_cost_equals_a_computation_by_hand() -> None:
    """The cost columns of every table would be wrong."""
    plan = {"stem": Bits(8, 8), "body": Bits(2, 4), "wide": Bits(4, 4), "fc": Bits(8, 8)}
    net = FourLayers()
    for name in plan:
        both = [LearnedStep(b, SITE, Scope(), True, 9) for b in plan[name]]
        swap(net, name, QuantLayer(net.get_submodule(name), *both))  # type: ignore[arg-type]
    bits = 100 * 8 + 400 * 2 + 600 * 4 + 32 * 8
    assert cost(NET, plan, net) == {
        "avg_bits_weight": pytest.approx(bits / 1132),
        "avg_bits_weight_inner": pytest.approx((400 * 2 + 600 * 4) / 1000),
        "avg_bits_act": pytest.approx((300 * 8 + 200 * 4 + 500 * 4 + 8 * 8) / 1008),
        "macs": {"stem": 1000, "body": 4000, "wide": 2000, "fc": 32},
        "bops": 1000 * 64 + 4000 * 8 + 2000 * 16 + 32 * 64,
        "size_bytes": pytest.approx((bits + 32 * (8 + 1 + 16)) / 8),  # eight steps, fc's bias, the norm
        "peak_act_bytes": (200 * 4 + 500 * 32 + 70 * 32) / 8,
    }


def test_a_layer_that_the_plan_does_not_name_is_float() -> None:
    """A layer left in float would be counted with few bits, or with none."""
    free = cost(NET, {}, FourLayers())
    assert free["avg_bits_weight"] == free["avg_bits_act"] == free["avg_bits_weight_inner"] == 32
    assert free["size_bytes"] == (1132 + 17) * 4
    assert free["bops"] == 7032 * 32 * 32
    assert free["peak_act_bytes"] == (200 + 500 + 70) * 4


def test_cost_of_a_network_of_edges_only() -> None:
    """A network of two layers would end in a division by zero."""
    edges = [NET[0], NET[4]]
    assert cost(edges, {"stem": Bits(8, 8), "fc": Bits(8, 8)}, FourLayers())["avg_bits_weight_inner"] == 8


def built(network: str, size: int, bits: str = "w4a4", method: str = "lsq") -> dict[str, Any]:
    """The cost of a method's network on images of a size."""
    spec = RunSpec(method=method, network=network, bits=bits, protocol="single", calibration=2)
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    batch = Batch(images, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    made = assemble(spec, find("networks", network)(3, 10), ONE_DOMAIN, batch)
    return cost(made.sites, made.bit_plan, made.net)


def test_cost_of_resnet20_equals_a_hand_count() -> None:
    """Tables would give other costs than a reader can count."""
    found = built("resnet20", 32)
    # 3x3 convolutions: 432 weights in the stem; 6 of 16x16; 16x32, 5 of 32x32; 32x64, 5 of 64x64; projections 512 and 2,048; 640.
    inner = 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864 + 512 + 2048
    edge = 432 + 640
    assert inner + edge == 270_896
    # The stages have 32x32, 16x16 and 8x8 places.
    inner_macs = 6 * 2304 * 1024 + (4608 + 5 * 9216 + 512) * 256 + (18432 + 5 * 36864 + 2048) * 64
    assert sum(found["macs"].values()) == 432 * 1024 + inner_macs + 640 == 40_813_184
    assert found["bops"] == 64 * (432 * 1024 + 640) + 16 * inner_macs
    assert found["avg_bits_weight_inner"] == 4
    assert found["avg_bits_weight"] == pytest.approx((4 * inner + 8 * edge) / 270_896)
    norms, steps = 2 * (16 + 6 * 16 + 6 * 32 + 6 * 64 + 32 + 64), 2 * 22
    assert found["size_bytes"] == (4 * inner + 8 * edge + 32 * (norms + 10 + steps)) / 8
    # The second convolution of a block: the shortcut and its own output as floats, its input as codes.
    assert found["peak_act_bytes"] == 16_384 * (32 + 4 + 32) / 8


def test_cost_of_resnet18_equals_a_hand_count() -> None:
    """A network of another family would be counted wrongly."""
    found = built("resnet18", 224)
    stem, head = 7 * 7 * 3 * 64, 5120
    stages = {64: (56, 4 * 9 * 64 * 64), 128: (28, 9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128),
              256: (14, 9 * 128 * 256 + 3 * 9 * 256 * 256 + 128 * 256),
              512: (7, 9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512)}  # fmt: skip
    inner = sum(weights for _, weights in stages.values())
    assert (
        stem + inner + 512_000 == 11_678_912
    )  # of torchvision's ResNet-18 with 1,000 classes, convolutions and classifier
    inner_macs = sum(side * side * weights for side, weights in stages.values())
    assert sum(found["macs"].values()) == stem * 112 * 112 + inner_macs + head
    assert found["bops"] == 64 * (stem * 112 * 112 + head) + 16 * inner_macs
    assert found["avg_bits_weight"] == pytest.approx((4 * inner + 8 * (stem + head)) / (stem + inner + head))


def test_every_cost_changes_with_the_bits() -> None:
    """A tool that gave the same count for every width has been in use for years (qonnx issue 51)."""
    costs = [built("resnet8", 16, bits=bits) for bits in ("w2a2", "w3a3", "w4a4", "w8a8")]
    for key in ("avg_bits_weight", "avg_bits_weight_inner", "avg_bits_act", "bops", "size_bytes", "peak_act_bytes"):
        values = [c[key] for c in costs]
        assert values == sorted(set(values)), key
    assert len({str(c["macs"]) for c in costs}) == 1


def test_codebooks_count_as_weight_bytes() -> None:
    """A codebook's entries would be free."""
    plain, listed = (built("resnet8", 16, method=m) for m in ("lsq", "adq"))
    layers = 9 - 2  # resnet8's, without first and last
    # LSQ stores a step a layer; ADQ 2^4 - 1 entries.
    more = listed["size_bytes"] - plain["size_bytes"]
    assert more >= layers * (15 - 1) * 4


def test_scope_is_shared_by_copies() -> None:
    """A teacher or a deployed copy would see the batch in which it was copied, for ever."""
    net = quantized_net()
    scopes = {id(m.scope) for m in net.modules() if isinstance(m, Quantizer)}
    twin = copy.deepcopy(net)
    assert {id(m.scope) for m in twin.modules() if isinstance(m, Quantizer)} == scopes


def test_qmin_and_qmax() -> None:
    """A code would not fit its bits."""
    for bits in range(1, 9):
        assert (Quantizer(bits, SITE, Scope(), True).qmin, Quantizer(bits, SITE, Scope(), True).qmax) == (
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
        )
        assert (Quantizer(bits, SITE, Scope(), False).qmin, Quantizer(bits, SITE, Scope(), False).qmax) == (
            0,
            2**bits - 1,
        )
        assert (
            math.log2(Quantizer(bits, SITE, Scope(), True).qmax - Quantizer(bits, SITE, Scope(), True).qmin + 1) == bits
        )
