from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.n2uq import MOST_CELLS, FilterWeight, LearnedThresholds, edge_counter
from torch import Tensor

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
NAMES = ("start", "widths", "beta1", "beta2")


class TestN2UQ(MethodContract):
    method = "n2uq"


def thresholds(bits: int, signed: bool = False, seed: int | None = None, unit: float = 1.0) -> LearnedThresholds:
    """A quantizer whose parameters are the starting ones, or random ones as training may leave them."""
    quantizer = LearnedThresholds(bits, SITE, Scope(), signed)
    quantizer.unit.fill_(unit)
    if seed is not None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            quantizer.widths.mul_(torch.rand(quantizer.n, generator=rng) * 1.8 + 0.1)
            quantizer.start.add_(0.3 * torch.randn((), generator=rng))
            quantizer.beta1.fill_(0.5 + float(torch.rand((), generator=rng)))
            quantizer.beta2.fill_(0.5 + float(torch.rand((), generator=rng)))
    return quantizer


def inputs(quantizer: LearnedThresholds, shape: tuple[int, ...] = (6, 5, 4, 4)) -> Tensor:
    """Values in every segment and on both sides of the range."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 3.4 - 1.2) * quantizer.unit


def reference(quantizer: LearnedThresholds, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Input, output and parameters, float64, out of ordinary operations as the authors' code writes them."""
    p = {name: getattr(quantizer, name).detach().double().requires_grad_() for name in NAMES}
    leaf, unit = x.detach().double().contiguous().requires_grad_(), quantizer.unit.double()
    n, d = quantizer.n, 2 / quantizer.n
    u = leaf * p["beta1"] / unit
    hard, soft, left = torch.zeros_like(u), torch.zeros_like(u), p["start"]
    for j in range(n):
        width = p["widths"][j]
        hard = torch.where(u >= left + width / 2, (j + 1) * d, hard)
        soft = torch.where(u >= left, j * d + d / width * (u - left), soft)
        left = left + width
    soft = torch.where(u >= left, 2.0, soft)
    out = (hard.detach() + (soft - soft.detach()) + quantizer.offset) * p["beta2"] * unit
    return leaf, out, p


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "matrix", "vector"])
@pytest.mark.parametrize(
    ("bits", "signed", "unit"), [(2, False, 1.0), (4, True, 30.0), (3, False, 0.01), (8, False, 1.0)]
)
def test_gradients_equal_autograds(bits: int, signed: bool, unit: float, layout: str) -> None:
    """Thresholds, scales or weights would be trained by another gradient than G-STE, in some memory layout."""
    quantizer = thresholds(bits, signed, seed=bits, unit=unit).double()
    x = inputs(quantizer, {"matrix": (12, 40), "vector": (480,)}.get(layout, (6, 5, 4, 4))).double()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    theirs, out, p = reference(quantizer, x)
    out.backward(grad)
    if x.ndim == 4 and layout != "contiguous":
        x = x.to(memory_format=torch.channels_last)
        grad = grad if layout == "mixed" else grad.to(memory_format=torch.channels_last)
    ours = x.requires_grad_()
    value = quantizer(ours)
    value.backward(grad)
    torch.testing.assert_close(value, out.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name in NAMES:
        torch.testing.assert_close(getattr(quantizer, name).grad, p[name].grad, rtol=1e-7, atol=1e-9 * unit)
    assert (value.stride(), ours.grad.stride()) == (x.stride(), x.stride())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_gradients_in_float32_and_bfloat16(dtype: torch.dtype, rtol: float) -> None:
    """Training, which is not in float64, would have other gradients; or a sum over a batch would lose its digits."""
    quantizer = thresholds(4, seed=0)
    x = inputs(quantizer, (32, 8, 16, 16)).to(dtype)
    grad = (torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) + 1).to(dtype)
    theirs, out, p = reference(quantizer, x)
    out.backward(grad.double())
    ours = x.requires_grad_()
    value = quantizer(ours)
    value.backward(grad)
    assert (value.dtype, ours.grad.dtype) == (dtype, dtype)
    assert (ours.grad.double() - theirs.grad).abs().gt(0.05).double().mean() < 1e-3
    for name in NAMES:
        got, expected = getattr(quantizer, name).grad.double(), p[name].grad
        assert (got - expected).abs().max() < rtol * expected.abs().max(), name


@given(st.integers(2, 8), st.booleans(), st.integers(0, 10**6))
@SMALL
def test_n2uq_thresholds_increasing(bits: int, signed: bool, seed: int) -> None:
    """A code could never occur, or a larger input have a smaller code: also after an optimizer has thrown the widths about."""
    quantizer = thresholds(bits, signed, seed)
    with torch.no_grad():
        quantizer.widths.add_(torch.randn(quantizer.n, generator=torch.Generator().manual_seed(seed)))
        quantizer.beta1.sub_(5.0)
        quantizer.beta2.sub_(5.0)
        quantizer.project()
    assert bool((quantizer.thresholds.diff() > 0).all())
    assert quantizer.widths.min() >= 0.000999
    assert quantizer.step > 0


@pytest.mark.parametrize("unit", [1.0, 0.02, 7.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_n2uq_equal_widths_are_the_uniform_quantiser(bits: int, unit: float) -> None:
    """The starting point would not be uniform quantization, or its gradient not the plain straight-through estimator's."""
    quantizer = thresholds(bits, unit=unit).double()
    x = inputs(quantizer, (4000,)).double()
    leaf = x.clone().requires_grad_()
    step = 2 * unit / quantizer.n
    grad = torch.randn(4000, generator=torch.Generator().manual_seed(3)).double()
    out = quantizer(leaf)
    out.backward(grad)
    torch.testing.assert_close(out.detach(), (x / step).round().clamp(0, quantizer.n) * step)
    torch.testing.assert_close(leaf.grad, grad * ((x >= 0) & (x < 2 * unit)))


@given(st.integers(2, 8), st.booleans(), st.integers(0, 10**6))
@SMALL
def test_adq_9_activation_codes_are_monotone_integers(bits: int, signed: bool, seed: int) -> None:
    """The output would not be 2^n evenly spaced levels in the order of the inputs: hardware would need a table."""
    quantizer = thresholds(bits, signed, seed).eval()
    x = torch.linspace(-6, 6, 20_001)
    codes, decode = quantizer.encode(x)
    assert codes.unique().tolist() == list(range(quantizer.qmin, quantizer.qmax + 1))
    assert bool((codes.diff() >= 0).all())
    levels = decode(torch.arange(quantizer.qmin, quantizer.qmax + 1))
    torch.testing.assert_close(levels.diff(), quantizer.step.detach().expand(quantizer.n), rtol=1e-3, atol=1e-6)
    assert torch.equal(decode(codes), quantizer(x).detach())
    crossed = (x[:, None] >= quantizer.thresholds).sum(1) + quantizer.qmin
    assert torch.equal(codes.long(), crossed)


def test_adq_9_a_width_learns_only_from_what_is_right_of_its_segments_start() -> None:
    """A sample would move thresholds that it has nothing to do with, or none at all."""
    quantizer = thresholds(3, seed=4)
    left = quantizer.start.detach() + quantizer.widths.detach().cumsum(0) - quantizer.widths.detach()
    right = float(left[-1] + quantizer.widths[-1].detach())
    for u in torch.linspace(-1, 4, 301).tolist():
        quantizer.zero_grad()
        quantizer(torch.tensor([u]) / quantizer.beta1.detach()).sum().backward()
        inside = (left < u) & torch.tensor(u < right)
        assert torch.equal(quantizer.widths.grad != 0, inside)


@pytest.mark.parametrize("signed", [False, True])
def test_fit_covers_the_probe_and_keeps_its_scale(signed: bool) -> None:
    """Training would start far from the float network: with the paper's range most of a layer's input may lie above 2."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 40
    x = x if signed else x.relu()
    for bits in (2, 4, 8):
        fitted, paper = (LearnedThresholds(bits, SITE, Scope(), signed, init) for init in ("fit", "paper"))
        fitted.fit(x)
        paper.fit(x)
        assert fitted(x).max().item() == pytest.approx(float(x.abs().quantile(0.999)), rel=0.01)
        assert (x.abs() > fitted(x).max() + fitted.step / 2).double().mean() < 0.002
        assert (fitted(x) - x).square().mean() < {2: 0.5, 4: 0.03, 8: 0.001}[bits] * x.square().mean()
        assert paper(x).max().item() == pytest.approx(1.0 if signed else 2.0)
    mostly_zero = torch.zeros(5000)
    mostly_zero[0] = 3.0
    for seen, top in ((mostly_zero, 3.0), (torch.zeros(9), 1.0 if signed else 2.0)):
        fitted = LearnedThresholds(4, SITE, Scope(), signed)
        fitted.fit(seen)
        assert fitted(torch.tensor([1e6])).item() == pytest.approx(top)


def test_what_is_not_finite_stays_visible() -> None:
    """A run whose activations have become NaN would go on with codes, and be recorded as done."""
    quantizer = thresholds(4)
    x = torch.tensor([1.0, float("nan"), float("inf"), 0.3])
    assert torch.isnan(quantizer(x)).tolist() == [False, True, True, False]


@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(0, 4))
@SMALL
def test_edge_counter_is_bucketize(seed: int, n: int, spread: float) -> None:
    """A value next to a threshold would fall on its other side: training would round otherwise than the deployed form."""
    rng = torch.Generator().manual_seed(seed)
    gaps = (torch.rand(n, generator=rng) + 0.01) ** spread + 1e-6
    finite = torch.randn((), generator=rng) + torch.cat([torch.zeros(1), gaps.cumsum(0)])
    edges = torch.cat([finite, torch.tensor([float("inf")])])
    near = torch.cat([finite, finite.nextafter(torch.tensor(9e9)), finite.nextafter(torch.tensor(-9e9))])
    x = torch.cat(
        [near, torch.randn(500, generator=rng) * 30, torch.tensor([0.0, -(2.0**100), 2.0**100, float("-inf")])]
    )
    assert torch.equal(edge_counter(edges)(x), torch.bucketize(x, edges, right=True, out_int32=True))
    assert edge_counter(edges)(torch.tensor([float("nan"), float("inf")])).tolist() == [n + 2, n + 2]


def test_edge_counter_without_room_for_cells() -> None:
    """Widths that training has driven far apart would fill the memory with cells, or be counted wrongly."""
    edges = torch.tensor([0.0, 1.0, 1.0 + 1e-5, 1.0 + 2e-5, 3.0, float("inf")])
    assert MOST_CELLS < 3.0 / 1e-5
    x = torch.tensor([-1.0, 0.0, 1.0, 1.0 + 1e-5, 1.5, 3.0, 5.0])
    assert edge_counter(edges)(x).tolist() == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("bits", "size"), [(4, 1), (6, 1), (7, 2), (8, 2)])
def test_it_keeps_its_input_and_one_small_integer(bits: int, size: int, layout: torch.memory_format) -> None:
    """Training would take the memory of the authors' form, which keeps two tensors of the input's size for each threshold."""
    quantizer = thresholds(bits)
    x = torch.rand(16, 3, 32, 32).to(memory_format=layout).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantizer(x)
    large = [t for t in kept if t.numel() == x.numel()]
    assert sorted(t.element_size() for t in large) == [size, 4]
    assert any(t.data_ptr() == x.data_ptr() for t in large)


@given(st.integers(2, 8), st.integers(0, 10**6))
@SMALL
def test_weights_are_the_papers_formula_filter_by_filter(bits: int, seed: int) -> None:
    """Filters would share a scale, or be clipped elsewhere than at gamma times their mean size."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 3, 3, 3, generator=rng) * torch.tensor([1.0, 0.01, 30.0, 1e-6, 2.0]).view(-1, 1, 1, 1)
    quantizer = FilterWeight(bits, SITE, Scope())
    n = 2**bits - 1
    for filter_, out in zip(w.double(), quantizer(w).double(), strict=True):
        m = n / 2 ** (bits - 1) * filter_.abs().mean()
        expected = (((filter_ / m).clamp(-1, 1) + 1) / 2 * n).round() / n * 2 - 1
        flipped = (out / m - expected).abs() > 1 / n  # a tie in float32 may fall on the other side
        assert flipped.sum() <= 1
        torch.testing.assert_close((out / m)[~flipped], expected[~flipped], rtol=1e-4, atol=1e-5)
    codes, decode = quantizer.encode(w)
    grid = torch.stack([decode(torch.full((5, 1, 1, 1), k)).flatten() for k in range(n + 1)], 1)
    assert torch.equal(grid.gather(1, codes.flatten(1).long()).view_as(w), quantizer(w))


def test_the_weights_gradient() -> None:
    """Clipped weights would never come back; or the two settings would train alike."""
    w = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    plain, code = w.clone().requires_grad_(), w.clone().requires_grad_()
    FilterWeight(2, SITE, Scope())(plain).backward(grad)
    FilterWeight(2, SITE, Scope(), "code")(code).backward(grad)
    assert torch.equal(plain.grad, grad)
    m = 1.5 * w.abs().mean((1, 2, 3), keepdim=True)
    assert bool((w.abs() > m).any())
    torch.testing.assert_close(code.grad, grad / m)


def test_a_filter_of_zeros_stays_zero_and_learns() -> None:
    """A pruned filter, or a layer that starts at zero, would turn the network into NaN."""
    w = torch.randn(3, 4)
    w[1] = 0
    for grad in ("plain", "code"):
        leaf = w.clone().requires_grad_()
        out = FilterWeight(4, SITE, Scope(), grad)(leaf)
        out.sum().backward()
        assert not out[1].any()
        assert torch.isfinite(out).all()
        assert torch.equal(leaf.grad[1], torch.ones(4))


def test_thresholds_are_not_decayed_and_learn_at_a_tenth_of_the_rate() -> None:
    """Weight decay would pull the widths together; at the weights' rate the thresholds would jump about."""
    method, _ = ready("n2uq", weight_decay=0.5)
    learned = {id(p) for n, p in method.net.named_parameters() if n.rpartition(".")[2] in NAMES}
    assert learned
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            expected = (0.1, 0.0) if id(parameter) in learned else (1.0, 0.5)
            assert (group["lr_scale"], group["weight_decay"]) == expected


def test_settings_reach_the_quantizers() -> None:
    """A study of the settings would compare a method with itself."""
    fitted, _ = ready("n2uq")
    paper, _ = ready("n2uq", params={"n2uq": {"init": "paper", "weight_grad": "code"}})
    layer, other = (m.net.get_submodule("layer2.0.conv2") for m in (fitted, paper))
    assert (layer.weight_quantizer.grad, other.weight_quantizer.grad) == ("plain", "code")
    assert float(layer.act_quantizer.unit) != 1
    assert float(other.act_quantizer.unit) == 1
