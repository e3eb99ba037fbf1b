from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import Scope, UniformQuantizer
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, check_codes, ready
from qatbench.methods.apot import AdditivePowers, NormalizedPowers, apot_levels, power_sets
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)

# As the paper and the authors' code list them: the exponents of each set.
LISTED = {
    2: [{1, 2, 3}],
    3: [{1, 2, 4}, {3}],
    4: [{1, 3, 5}, {2, 4, 6}],
    5: [{1, 3, 6}, {2, 4, 7}, {5}],
    6: [{1, 4, 7}, {2, 5, 8}, {3, 6, 9}],
}


class TestAPoT(MethodContract):
    method = "apot"


def activation(bits: int, signed: bool = False, alpha: float = 2.0) -> AdditivePowers:
    return AdditivePowers(bits, SITE, Scope(), signed, alpha, "paper")


def weight(bits: int, scale: str = "std", alpha: float = 2.0) -> NormalizedPowers:
    return NormalizedPowers(bits, SITE, Scope(), alpha, scale)  # type: ignore[arg-type]


def unit_levels(bits: int) -> Tensor:
    """The levels for alpha = 1, float64, straight from the listed sets: every sum, divided by the largest."""
    terms = ([0.0, *(2.0**-e for e in powers)] for powers in LISTED.get(bits, [{1}] if bits == 1 else power_sets(bits)))
    sums = torch.tensor(sorted(map(sum, itertools.product(*terms))), dtype=torch.float64)
    return sums / sums[-1]


def nearest(u: Tensor, bits: int, signed: bool) -> Tensor:
    """Level of each element for alpha = 1, by comparing it with all; float64."""
    levels = unit_levels(bits - signed).to(u)
    sign = torch.sign(u) if signed else torch.ones_like(u)
    size = u.abs() if signed else u
    return sign * levels[(size[..., None] - levels).abs().argmin(-1)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_apot_2_to_the_b_distinct_levels(bits: int) -> None:
    """Two sums would be one level, and a b-bit quantizer would have fewer than 2^b."""
    levels = apot_levels(bits)
    assert len(levels.unique()) == len(levels) == 2**bits
    for signed in (False, True):
        if bits + signed <= 8:
            values = activation(bits + signed, signed).levels
            assert len(values.unique()) == (2 ** (bits + 1) - 1 if signed else 2**bits)
            assert bool((values.diff() > 0).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_apot_max_1(bits: int) -> None:
    """The largest level would not be alpha: the range that is learned would not be the range that is used."""
    assert activation(bits).levels.max() == 1
    quantizer = activation(bits, alpha=3.0)
    assert quantizer(torch.tensor([2.9999, 50.0])).tolist() == [3.0, 3.0]
    if bits > 1:
        assert activation(bits, signed=True, alpha=3.0)(torch.tensor([-50.0])).tolist() == [-3.0]


@pytest.mark.parametrize("bits", LISTED)
def test_apot_min_positive_as_listed(bits: int) -> None:
    """Other powers would be added than the paper's, and its levels near zero, where most weights are, be lost."""
    assert [set(powers) for powers in power_sets(bits)] == LISTED[bits]
    largest = sum(2.0 ** -min(powers) for powers in LISTED[bits])
    smallest = 2.0 ** -max(map(max, LISTED[bits]))
    levels = activation(bits).levels
    assert levels[0] == 0
    assert levels[1].item() == pytest.approx(smallest / largest)
    torch.testing.assert_close(levels.double(), unit_levels(bits), rtol=1e-6, atol=0)


@given(st.integers(1, 8), st.booleans(), st.floats(0.01, 100), st.integers(0, 10**6))
@SMALL
def test_the_look_up_finds_the_nearest_level(bits: int, signed: bool, alpha: float, seed: int) -> None:
    """Values next to the middle of two levels would be rounded to the further one, or a whole level would never be taken."""
    bits = max(bits, 1 + signed)
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * alpha
    x = torch.cat([x, torch.linspace(-1.2, 1.2, 10_001, dtype=torch.float64) * alpha])
    quantizer = activation(bits, signed, alpha).double()
    levels = quantizer.levels * quantizer.alpha
    error = (quantizer(x) - x).abs()
    assert bool((error <= (x[:, None] - levels).abs().amin(1) + 1e-6 * alpha).all())  # levels are rounded to float32
    assert quantizer.encode(x)[0].unique().tolist() == list(range(quantizer.qmin, quantizer.qmax + 1))


@given(st.integers(2, 8), st.booleans(), st.floats(0.01, 100), st.integers(0, 10**6))
@SMALL
def test_common_few_values_monotone_idempotent(bits: int, signed: bool, alpha: float, seed: int) -> None:
    """A width would be a claim, a larger input give a smaller output, or a value on a level be moved to another."""
    x = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * alpha
    quantizer = activation(bits, signed, alpha).eval()
    check_codes("activation", quantizer, x)
    once = quantizer(x.sort().values)
    assert len(once.unique()) <= 2**bits
    assert bool((once.diff() >= 0).all())
    assert torch.equal(quantizer(once), once)
    assert torch.equal(quantizer(x), quantizer(x))
    weights = weight(bits, alpha=min(alpha, 3.0)).eval()
    check_codes("weight", weights, x)
    assert len(weights(x).unique()) <= 2**bits
    assert bool((weights(x.sort().values).diff() >= 0).all())


def textbook(
    x: Tensor, alpha: float, bits: int, signed: bool, clips: bool, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of x and alpha, float64, element by element as the spec has them."""
    x, grad = x.double().contiguous(), grad.double().contiguous()
    u = x / alpha
    outside = u.abs() > 1 if signed else u > 1
    q = nearest(u.clamp(-1 if signed else None, 1), bits, signed)
    slope = torch.where(outside, x.sign(), q - u)
    grad_x = torch.where(outside, 0.0, grad) if clips else grad
    return q * alpha, grad_x, (grad * slope).sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "slice", "matrix", "vector"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (8, False), (2, True), (4, True), (8, True)])
def test_activation_gradients_are_the_specs(bits: int, signed: bool, dtype: torch.dtype, layout: str) -> None:
    """Range or inputs would be trained by another gradient than the paper's, or the output lie otherwise in memory."""
    rng = torch.Generator().manual_seed(bits)
    shape = {"matrix": (12, 40), "vector": (480,)}.get(layout, (6, 5, 4, 4))
    x = (torch.randn(shape, generator=rng) * 2).to(dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    if layout in ("channels_last", "mixed"):
        x = x.to(memory_format=torch.channels_last)
        grad = grad if layout == "mixed" else grad.to(memory_format=torch.channels_last)
    if layout == "slice":
        x = torch.cat([x, x], 3)[..., ::2]
    quantizer = activation(bits, signed, 1.7).to(dtype)
    leaf = x.detach().requires_grad_()
    out = quantizer(leaf)
    out.backward(grad)
    theirs = textbook(x, float(quantizer.alpha.detach()), bits, signed, True, grad)
    tight = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(out.detach().double(), theirs[0], **tight)
    torch.testing.assert_close(leaf.grad.double(), theirs[1], **tight)
    torch.testing.assert_close(quantizer.alpha.grad.double(), theirs[2], rtol=1e-4, atol=1e-4)
    if layout != "slice":
        assert out.stride() == leaf.grad.stride() == x.stride()


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_weight_gradients_are_the_specs(bits: int, scale: str) -> None:
    """Weights beyond alpha would stop learning, or mean and std be trained through, which the authors' code does not."""
    rng = torch.Generator().manual_seed(bits)
    w = (torch.randn(8, 4, 3, 3, generator=rng) * 0.07 + 0.02).double()
    grad = torch.randn(8, 4, 3, 3, generator=rng).double()
    quantizer = weight(bits, scale, alpha=1.4).double()
    leaf = w.clone().requires_grad_()
    out = quantizer(leaf)
    out.backward(grad)
    std = w.std()
    factor = std if scale == "std" else torch.ones_like(std)
    value, grad_w, grad_alpha = textbook((w - w.mean()) / std, float(quantizer.alpha.detach()), bits, True, False, grad)
    torch.testing.assert_close(out.detach(), value * factor, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad, grad_w * factor / std)
    torch.testing.assert_close(quantizer.alpha.grad, grad_alpha * factor, rtol=1e-6, atol=1e-6)


def test_two_bit_weights_are_ternary() -> None:
    """Two bits would have one magnitude too many or too few; the paper's are uniform there."""
    quantizer = weight(2, "none", alpha=1.5)
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.3
    assert quantizer(w).unique().tolist() == [-1.5, 0.0, 1.5]
    u = (w - w.mean()) / w.std()
    assert torch.equal(quantizer(w) != 0, u.abs() >= 0.75)


@given(st.floats(0.001, 1000), st.floats(-5, 5), st.integers(2, 8))
@SMALL
def test_codes_do_not_depend_on_scale_and_mean_of_the_weights(factor: float, shift: float, bits: int) -> None:
    """The weights would not be normalized: alpha would have to follow their size."""
    w = torch.randn(300, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    quantizer = weight(bits).double()
    moved = factor * (w + shift)
    assert (quantizer.encode(w)[0] != quantizer.encode(moved)[0]).sum() <= 1
    torch.testing.assert_close(quantizer(moved).abs().max(), factor * quantizer(w).abs().max())


def test_before_a_norm_both_scales_train_alike() -> None:
    """The departure from the authors' code would be another method: other gradients of weights or alpha where a norm follows."""
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 3, 3, 3, generator=rng).double() * 0.05, torch.randn(4, 3, 8, 8, generator=rng).double()
    grad = torch.randn(4, 6, 6, 6, generator=rng).double()
    found = []
    for scale in ("std", "none"):
        quantizer, leaf = weight(4, scale).double(), w.clone().requires_grad_()
        out = nn.functional.batch_norm(nn.functional.conv2d(x, quantizer(leaf)), None, None, training=True, eps=1e-12)
        out.backward(grad)
        found.append((out.detach(), leaf.grad, quantizer.alpha.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_finite(bits: int) -> None:
    """One strange tensor would turn the network into NaN."""
    large, small = torch.full((8,), -(2.0**100)), torch.full((1,), -1e-30)
    for x in (torch.zeros(8), -large, large, small, torch.linspace(-3, 3, 50)):
        for quantizer in (activation(bits), activation(bits, True), weight(bits), weight(bits, "none")):
            quantizer.fit(x)
            leaf = x.clone().requires_grad_()
            out = quantizer(leaf)
            out.sum().backward()
            assert all(bool(torch.isfinite(t).all()) for t in (out, leaf.grad, quantizer.alpha.grad))


def test_what_is_nan_stays_visible() -> None:
    """A run whose activations have become NaN would go on with a level in their place, and be recorded as done."""
    x = torch.tensor([1.0, float("nan"), float("inf"), 0.3])
    for signed in (False, True):
        assert torch.isnan(activation(4, signed)(x)).tolist() == [False, True, False, False]
    assert torch.isnan(weight(4)(x)).all()


def test_bfloat16_inputs_are_compared_in_full_precision() -> None:
    """Eight bits of mantissa would put values next to a threshold on the wrong side, and 8-bit levels would be skipped."""
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0)).bfloat16() * 2
    quantizer = activation(8)
    assert quantizer(x).dtype == torch.bfloat16
    assert torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


def test_it_keeps_its_input_and_its_output() -> None:
    """Training would take the memory of more copies of every activation than LSQ's does."""
    x = torch.rand(16, 3, 32, 32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = activation(4)(x)
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr(), out.data_ptr()}


def test_alphas_have_the_papers_rates_and_decay() -> None:
    """Ranges would be trained at the weights' rate; at 0.1 beside 0.04, and 0.02, they are not."""
    method, _ = ready("apot", weight_decay=0.5)
    expected = {}
    for name, parameter in method.net.named_parameters():
        if name.endswith("alpha"):
            expected[id(parameter)] = (0.5 if "weight_quantizer" in name else 2.5, 1e-4)
    assert len(set(expected.values())) == 2
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert (group["lr_scale"], group["weight_decay"]) == expected.get(id(parameter), (1.0, 0.5))


def test_a_negative_alpha_is_brought_back() -> None:
    """The levels would be turned around after one large step."""
    quantizer = activation(3)
    with torch.no_grad():
        quantizer.alpha.fill_(-1.0)
        quantizer.project()
    assert quantizer.alpha.item() > 0


def test_settings_reach_the_quantizers() -> None:
    """A study of the settings would compare a method with itself; a start that is given would not be taken."""
    paper, _ = ready("apot", params={"apot": {"init": "paper"}})
    given, _ = ready("apot", params={"apot": {"alpha": 5.0}})
    fitted, _ = ready("apot", params={})
    assert given.net.get_submodule("layer2.0.conv2").act_quantizer.alpha.item() == 5.0
    assert fitted.net.get_submodule("layer2.0.conv2").act_quantizer.alpha.item() not in (5.0, 8.0)
    other, _ = ready("apot", params={"apot": {"alpha": 5.0, "weight_alpha": 2.5, "scale": "none", "init": "fit"}})
    one, two = (m.net.get_submodule("layer2.0.conv2") for m in (paper, other))
    assert (one.act_quantizer.alpha.item(), one.weight_quantizer.alpha.item(), one.weight_quantizer.scale) == (
        8.0,
        3.0,
        "std",
    )
    assert (two.weight_quantizer.alpha.item(), two.weight_quantizer.scale) == (2.5, "none")
    assert two.act_quantizer.alpha.item() not in (5.0, 8.0)


def test_fitted_range_follows_the_probe() -> None:
    """With ``init="fit"`` the range would still be the paper's, far above what the float network's layers produce."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu() * 0.1
    fitted, paper = (
        AdditivePowers(2, SITE, Scope(), False, 8.0, "fit"),
        AdditivePowers(2, SITE, Scope(), False, 8.0, "paper"),
    )
    for quantizer in (fitted, paper):
        quantizer.fit(x)
    assert paper.alpha.item() == 8.0
    assert fitted.alpha.item() == pytest.approx(3 * x.square().mean().sqrt().item(), rel=1e-5)
    assert (fitted(x) - x).square().mean() < 0.2 * x.square().mean()
    assert not paper(x).any()
    fitted.fit(torch.zeros(9))
    assert fitted.alpha.item() == 8.0


def test_first_and_last_weights_are_uniform_at_8_bits() -> None:
    """The layers that the paper keeps at plain 8 bits would have the coarse outer levels of APoT."""
    method, _ = ready("apot")
    edges = [s.name for s in method.sites if s.kind == "layer" and s.edge]
    assert [type(method.net.get_submodule(n).weight_quantizer) for n in edges] == [UniformQuantizer] * 2
    same, _ = ready("apot", first_last="same")
    assert [type(same.net.get_submodule(n).weight_quantizer) for n in edges] == [NormalizedPowers] * 2
