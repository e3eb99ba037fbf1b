from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.chain import build
from qatbench.bench.method import Wrapper
from qatbench.bench.models.resnet import CifarResNet
from qatbench.bench.quant import (
    Bits,
    IntegerLayer,
    Quantizer,
    QuantLayer,
    Scope,
    UniformQuantizer,
    calibrate,
    cost,
    count_levels,
    deployed,
    edge_bits,
    quant_layers,
    round_ste,
    snap,
    swap,
)
from qatbench.bench.quant.quantizer import finite_state, step_of
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.site import Site
from qatbench.bench.spec import RunSpec
from qatbench.bench.testing import check_codes
from qatbench.methods.dorefa import TanhWeight, UnitActivation
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.pact import LearnedClip
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), macs=288, weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)

MAKERS: dict[str, Callable[[int], Quantizer]] = {
    "minmax signed": lambda b: UniformQuantizer(b, SITE, Scope(), True),
    "minmax unsigned": lambda b: UniformQuantizer(b, SITE, Scope(), False),
    "percentile signed": lambda b: UniformQuantizer(b, SITE, Scope(), True, "percentile", 90.0),
    "percentile unsigned": lambda b: UniformQuantizer(b, SITE, Scope(), False, "percentile", 90.0),
    "lsq signed": lambda b: LearnedStep(b, SITE, Scope(), True, 36),
    "lsq unsigned": lambda b: LearnedStep(b, SITE, Scope(), False, 72),
    "pact signed": lambda b: LearnedClip(b, SITE, Scope(), True, 8.0),
    "pact unsigned": lambda b: LearnedClip(b, SITE, Scope(), False, 8.0),
    "dorefa activation": lambda b: UnitActivation(b, SITE, Scope(), False),
    "dorefa weight max": lambda b: TanhWeight(b, SITE, Scope(), "max"),
    "dorefa weight none": lambda b: TanhWeight(b, SITE, Scope(), "none"),
}
# Their output goes through tanh again, so quantizing twice is not quantizing once.
FIXED_GRID = [name for name in MAKERS if "dorefa weight" not in name]


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
                    member.spec, member.scope = RunSpec(method=name), Scope()
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


@pytest.mark.parametrize("name", MAKERS)
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
    assert step_of(UnitActivation(4, SITE, Scope(), False)) is None


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


def test_count_levels_counts_codes() -> None:
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
    levels = count_levels(net, x)
    assert levels["one"] == (3, 4)
    assert levels["two"][0] is None
    assert levels["two"][1] == net[1].act_quantizer.encode(net[0](x))[0].unique().numel()
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


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
    Site("stem", "layer", (8,), macs=1000, weights=100, inputs=300, edge=True),
    Site("bn", "norm", (8,), inputs=77),
    Site("body", "layer", (8,), macs=4000, weights=400, inputs=200),
    Site("wide", "layer", (8,), macs=2000, weights=600, inputs=500),
    Site("fc", "layer", (4,), macs=32, weights=32, inputs=8, edge=True),
    Site("fc", "head", (4,), macs=32, weights=32, inputs=8, edge=True),
]


def test_cost_equals_a_computation_by_hand() -> None:
    """The cost columns of every table would be wrong."""
    plan = {"stem": Bits(8, 8), "body": Bits(2, 4), "wide": Bits(4, 4), "fc": Bits(8, 8)}
    bits = 100 * 8 + 400 * 2 + 600 * 4 + 32 * 8
    assert cost(NET, plan, 1150) == {
        "avg_bits_weight": pytest.approx(bits / 1132),
        "avg_bits_weight_inner": pytest.approx((400 * 2 + 600 * 4) / 1000),
        "avg_bits_act": pytest.approx((300 * 8 + 200 * 4 + 500 * 4 + 8 * 8) / 1008),
        "bops": 1000 * 64 + 4000 * 8 + 2000 * 16 + 32 * 64,
        "size_bytes": pytest.approx((bits + 32 * (1150 - 1132)) / 8),
    }


def test_a_layer_that_the_plan_does_not_name_is_float() -> None:
    """A layer left in float would be counted with few bits, or with none."""
    free = cost(NET, {}, 1132)
    assert free["avg_bits_weight"] == free["avg_bits_act"] == free["avg_bits_weight_inner"] == 32
    assert free["size_bytes"] == 1132 * 4
    assert free["bops"] == 7032 * 32 * 32


def test_cost_of_a_network_of_edges_only() -> None:
    """A network of two layers would end in a division by zero."""
    edges = [NET[0], NET[4]]
    assert cost(edges, {"stem": Bits(8, 8), "fc": Bits(8, 8)}, 132)["avg_bits_weight_inner"] == 8


@pytest.mark.parametrize(
    ("policy", "bits", "edge"),
    [
        ("8bit", (4, 4), (8, 8)), ("8bit", (2, 32), (8, 32)),
        ("8bit", (32, 2), (32, 8)), ("fp", (4, 4), (32, 32)), ("fp", (4, 32), (32, 32)),
        ("same", (3, 5), (3, 5)), ("same", (2, 32), (2, 32)),
    ],
)  # fmt: skip
def test_edge_bits(policy: str, bits: tuple[int, int], edge: tuple[int, int]) -> None:
    """The first and the last layer would have other bits than the run's ``first_last`` says."""
    assert edge_bits(policy, Bits(*bits)) == Bits(*edge)


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
