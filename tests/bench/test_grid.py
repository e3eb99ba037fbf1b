from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import QuantLayer, Scope, UniformQuantizer, round_to_grid
from qatbench.bench.quant.grid import SMALLEST_FUSED, is_fused, ready_to_compile, redo_grid
from qatbench.bench.site import Site
from qatbench.methods.lsq import LearnedStep
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
RANGES = [(-4, 3), (0, 7), (-128, 127), (0, 255), (-2, 1), (0, 3)]


class Range:
    """What `round_to_grid` asks of a quantizer."""

    def __init__(self, qmin: int, qmax: int, fused: bool = False) -> None:
        self.qmin, self.qmax, self.scope = qmin, qmax, Scope()
        self.scope.compile = fused


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skips where nothing can be compiled."""
    if not ready_to_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")


def gradients(
    x: Tensor,
    step: Tensor,
    where: Range,
    grad: Tensor,
    offset: float | None = None,
    scale: float = 1.0,
    ste: bool = False,
) -> list[Tensor]:
    """The output, and the gradients of input, step and (if there is one) offset."""
    leaves = [x.detach().clone().requires_grad_(), step.detach().clone().requires_grad_()]
    beta = None if offset is None else torch.tensor(offset, dtype=step.dtype).requires_grad_()
    out = round_to_grid(leaves[0], leaves[1], where, offset=beta, scale=scale, ste=ste)  # type: ignore[arg-type]
    out.backward(grad)
    found = [leaf.grad for leaf in (*leaves, *([] if beta is None else [beta]))]
    assert all(g is not None for g in found)
    return [out.detach(), *found]  # type: ignore[list-item]


def textbook(
    x: Tensor, step: Tensor, where: Range, grad: Tensor, offset: float | None, scale: float, ste: bool
) -> list[Tensor]:
    """The same out of ordinary operations, in float64, as public codes write it."""
    x, leaf = x.detach().double().contiguous().requires_grad_(), step.detach().double().requires_grad_()
    beta_leaf = torch.tensor(offset or 0.0, dtype=torch.float64).requires_grad_()
    s = leaf * scale + (leaf - leaf * scale).detach()
    beta = beta_leaf * scale + (beta_leaf - beta_leaf * scale).detach()
    if ste:
        clipped = torch.clamp(x - beta, s * where.qmin, s * where.qmax)
        out = clipped + ((clipped / s).round() * s - clipped).detach() + beta
    else:
        v = ((x - beta) / s).clamp(where.qmin, where.qmax)
        out = (v + (v.round() - v).detach()) * s + beta
    out.backward(grad.double())
    leaves = [x, leaf, *([] if offset is None else [beta_leaf])]
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize(("qmin", "qmax"), RANGES[:2])
def test_lsq_analytic_step_gradient_on_a_grid(qmin: int, qmax: int) -> None:
    """The step would be trained by another gradient than LSQ's Eq. 3: a well-known way to get an "LSQ" that is points worse."""
    step = 0.37
    for value in torch.linspace(-4, 4, 161, dtype=torch.float64).tolist():
        ratio = value / step
        if ratio <= qmin:
            expected_step, expected_x = float(qmin), 0.0
        elif ratio >= qmax:
            expected_step, expected_x = float(qmax), 0.0
        else:
            expected_step, expected_x = round(ratio) - ratio, 1.0
        one = torch.tensor([value], dtype=torch.float64)
        out, grad_x, grad_step = gradients(
            one, torch.tensor(step, dtype=torch.float64), Range(qmin, qmax), torch.ones_like(one)
        )
        assert out.item() == pytest.approx(step * min(max(round(ratio), qmin), qmax))
        assert grad_x.item() == expected_x
        assert grad_step.item() == pytest.approx(expected_step, abs=1e-9)


@pytest.mark.parametrize("ste", [False, True], ids=["lsq", "ste"])
@pytest.mark.parametrize("offset", [None, -0.31])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "matrix", "vector"])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_equal_autograds(
    dtype: torch.dtype, qmin: int, qmax: int, layout: str, offset: float | None, ste: bool
) -> None:
    """The fast function would be another method than the one it stands for, in some memory layout or precision."""
    shape = {"matrix": (16, 120), "vector": (1920,)}.get(layout, (8, 5, 6, 8))
    compare(dtype, shape, Range(qmin, qmax), layout == "channels_last", offset, ste)


@pytest.mark.slow
@pytest.mark.parametrize("ste", [False, True], ids=["lsq", "ste"])
@pytest.mark.parametrize("offset", [None, -0.31])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_compiled_gradients_equal_autograds(
    compiler: None, qmin: int, qmax: int, offset: float | None, ste: bool
) -> None:
    """A run with ``compile`` would train by another gradient."""
    for shape in ((8, 5, 24, 32), (6, 16, 16, 16)):
        assert math.prod(shape) >= SMALLEST_FUSED
        for last in (False, True):
            compare(torch.float32, shape, Range(qmin, qmax, fused=True), last, offset, ste)


def compare(
    dtype: torch.dtype, shape: tuple[int, ...], where: Range, last: bool, offset: float | None, ste: bool
) -> None:
    rng = torch.Generator().manual_seed(where.qmax)
    # About half of the values are outside the range.
    step = torch.tensor(1.5 / where.qmax)
    x, grad = torch.randn(shape, generator=rng) * 1.5, torch.randn(shape, generator=rng)
    if last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x, grad = x.to(dtype), grad.to(dtype)
    step = step.double() if dtype == torch.float64 else step
    scale = 1 / math.sqrt(240 * where.qmax)
    ours = gradients(x, step, where, grad, offset, scale, ste)
    theirs = textbook(x, step, where, grad, offset, scale, ste)
    assert [t.dtype for t in ours[:3]] == [dtype, dtype, step.dtype]
    assert ours[2].shape == ()
    assert ours[0].stride() == x.stride()
    if dtype == torch.bfloat16:  # eight bits of precision: codes next to a boundary fall on the other side
        assert (ours[0].double() - theirs[0]).abs().max() <= 1.01 * step + 0.03
        assert (ours[1].double() != theirs[1]).float().mean() < 0.03
        spread = grad.double().abs().sum() * scale  # of what the sums are made of
        assert all((a - b).abs() < 0.01 * spread * where.qmax for a, b in zip(ours[2:], theirs[2:], strict=True))
        return
    flips = (ours[0].double() - theirs[0]).abs() > 0.5 * step  # a tie in float32 may fall on the other side
    assert int(flips.sum()) <= (0 if dtype == torch.float64 else 3)
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours[0].double()[~flips], theirs[0][~flips], **tight)
    moved = (ours[1].double() - theirs[1]).abs() > 1e-4  # so may the edge of the range
    assert int(moved.sum()) <= int(flips.sum()) + (0 if dtype == torch.float64 else 2)
    if not flips.any() and not moved.any():
        atol = 2e-5 * float(grad.abs().sum()) * scale
        for a, b in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=atol)


@given(
    st.integers(0, 10**6),
    st.sampled_from(RANGES),
    st.floats(0.01, 10),
    st.one_of(st.none(), st.floats(-3, 3)),
    st.booleans(),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_same_gradients_as_the_textbook_for_any_range(
    seed: int, bounds: tuple[int, int], step: float, offset: float | None, ste: bool
) -> None:
    """For some step and offset the fast function would leave the formula."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 50, generator=rng, dtype=torch.float64) * step * bounds[1]
    grad = torch.randn(3, 50, generator=rng, dtype=torch.float64)
    size = torch.tensor(step, dtype=torch.float64)
    ours = gradients(x, size, Range(*bounds), grad, offset, 0.1, ste)
    theirs = textbook(x, size, Range(*bounds), grad, offset, 0.1, ste)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("a", [0.25, 8.0])
def test_lsq_scaling_x_and_s_scales_x_q(qmin: int, qmax: int, a: float) -> None:
    """The quantizer would not be a grid: something in it would not scale with the step."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    step, grad = torch.tensor(1.0 / qmax), torch.ones(500)
    one, scaled = gradients(x, step, Range(qmin, qmax), grad), gradients(a * x, a * step, Range(qmin, qmax), grad)
    assert torch.equal(scaled[0], a * one[0])
    assert torch.equal(scaled[1], one[1])
    torch.testing.assert_close(scaled[2], one[2])


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_lsq_s_gradient_zero_on_the_grid(qmin: int, qmax: int) -> None:
    """A step at which nothing is rounded and nothing is clipped would go on moving."""
    codes = torch.arange(qmin + 1, qmax).repeat(3)
    if not len(codes):
        codes = torch.zeros(3, dtype=torch.int64)
    out, _, grad_step = gradients(codes * 0.25, torch.tensor(0.25), Range(qmin, qmax), torch.randn(len(codes)))
    assert torch.equal(out, codes * 0.25)
    assert grad_step.item() == 0


def test_the_edges_of_the_range() -> None:
    """At a clipped value or at zero another element would learn than the paper's (LSQ: strictly inside; PACT: 0 <= x < alpha)."""
    x = torch.tensor([0.0, 0.5, 3.0, 3.5])
    lsq, ste = (gradients(x, torch.tensor(1.0), Range(0, 3), torch.ones(4), ste=on)[1].tolist() for on in (False, True))
    assert lsq == [0, 1, 0, 0]
    assert ste == [1, 1, 0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_uncompiled_it_keeps_input_output_and_step_and_no_more(layout: torch.memory_format) -> None:
    """Training would take the memory of the textbook form, which keeps five tensors of the input's size."""
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout).requires_grad_()
    step = torch.tensor(0.1, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = round_to_grid(x, step, Range(-4, 3))  # type: ignore[arg-type]
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), out.data_ptr(), step.data_ptr()}
    assert sum(t.nbytes for t in kept) == 2 * x.nbytes + step.nbytes
    assert out.is_contiguous(memory_format=layout)


# --- compiled ---------------------------------------------------------------------------------------------------------


def quantized_conv(fused: bool) -> tuple[QuantLayer, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    scope = Scope()
    scope.compile = fused
    act = LearnedStep(4, SITE, scope, False, 72)
    layer = QuantLayer(conv, LearnedStep(4, SITE, scope, True, 36), act)
    x = torch.randn(16, 8, 16, 16).relu().to(memory_format=torch.channels_last)
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.fit(layer.weight)
    act.fit(x)
    return layer, x


def kept_bytes(layer: QuantLayer, x: Tensor) -> int:
    """What autograd keeps beside the input, in bytes."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    seen.pop(x.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@pytest.mark.slow
def test_compiled_it_keeps_nothing_but_its_input(compiler: None) -> None:
    """The saved memory would be there in words only: the convolution would keep the quantized input for its own gradient."""
    plain, x = quantized_conv(False)
    fused, _ = quantized_conv(True)
    x = x.requires_grad_()
    assert kept_bytes(plain, x) > x.nbytes
    assert kept_bytes(fused, x) < 0.1 * x.nbytes


@pytest.mark.slow
def test_a_compiled_layer_computes_what_the_uncompiled_does(compiler: None) -> None:
    """What the backward pass makes again would not be what the forward pass used, so the weight would get another gradient."""
    found = []
    for layer, x in (quantized_conv(False), quantized_conv(True)):
        x.requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, layer.weight.grad, *(p.grad for p in layer.act_quantizer.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.slow
def test_what_is_made_again_is_the_same_to_the_bit(compiler: None) -> None:
    """The gradient of the weight would belong to another input than the one that was used."""
    _, x = quantized_conv(True)
    scope = Scope()
    scope.compile = True
    quantizer = UniformQuantizer(4, SITE, scope, False)
    quantizer.fit(x)
    redo = redo_grid(x, quantizer.step, quantizer)
    assert redo is not None
    first = quantizer(x)
    quantizer.step.mul_(2)  # the step may move between the passes; what was used may not
    assert torch.equal(redo(), first)
    codes, decode = UniformQuantizer.encode(quantizer, x)
    assert torch.equal(decode(codes), quantizer(x))


def test_only_large_float32_images_are_compiled() -> None:
    """A weight of a few thousand numbers, a vector or bfloat16 would be compiled for, for nothing."""
    scope = Scope()
    images = torch.zeros(4, 16, 16, 16)
    assert images.numel() == SMALLEST_FUSED
    assert not is_fused(images, scope)
    scope.compile = True
    assert is_fused(images, scope)
    assert not is_fused(images[:2], scope)
    assert not is_fused(images.bfloat16(), scope)
    assert not is_fused(images.flatten(), scope)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    """A run on a machine without a compiler would end with a traceback, or say it at every layer."""
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s')\n"
        "from qatbench.bench.testing import ready, Loop\n"
        "method, data = ready('lsq', compile=True)\n"
        "assert method.scope.compile is False\n"
        "Loop(method, data).epoch(list(data.train_dataloader())[:1])\n"
    )
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=True
    )
    said = [line for line in done.stderr.splitlines() if "uncompiled" in line]
    assert len(said) == 1
