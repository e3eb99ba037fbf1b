from __future__ import annotations

import math

import pytest
import torch
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.lsq import LearnedStep, LearnedStepRound
from torch import Tensor

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
RANGES = [(-4, 3), (0, 7), (-128, 127), (0, 255), (-2, 1), (0, 3)]


class TestLSQ(MethodContract):
    method = "lsq"


def gradients(
    x: Tensor, step: Tensor, qmin: int, qmax: int, grad: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of input and step."""
    x, step = x.detach().clone().requires_grad_(), step.detach().clone().requires_grad_()
    out = LearnedStepRound.apply(x, step, qmin, qmax, scale)
    out.backward(grad)
    assert x.grad is not None
    assert step.grad is not None
    return out.detach(), x.grad, step.grad


def textbook(
    x: Tensor, step: Tensor, qmin: int, qmax: int, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same out of ordinary operations, in float64, as public codes write it."""
    x, leaf = x.detach().double().contiguous().requires_grad_(), step.detach().double().requires_grad_()
    s = leaf * scale + (leaf - leaf * scale).detach()
    v = (x / s).clamp(qmin, qmax)
    out = (v + (v.round() - v).detach()) * s
    out.backward(grad.double())
    assert x.grad is not None
    assert leaf.grad is not None
    return out.detach(), x.grad, leaf.grad


@pytest.mark.parametrize(("qmin", "qmax"), RANGES[:2])
def test_step_gradient_is_the_papers_formula(qmin: int, qmax: int) -> None:
    """The step would be trained by another gradient than Eq. 3: a well-known way to get an "LSQ" that is points worse."""
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
            one, torch.tensor(step, dtype=torch.float64), qmin, qmax, torch.ones_like(one)
        )
        assert out.item() == pytest.approx(step * min(max(round(ratio), qmin), qmax))
        assert grad_x.item() == expected_x
        assert grad_step.item() == pytest.approx(expected_step, abs=1e-9)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "matrix", "vector"])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_equal_autograds(dtype: torch.dtype, qmin: int, qmax: int, layout: str) -> None:
    """The fast function would be another method than the one it stands for, in some memory layout or precision."""
    rng = torch.Generator().manual_seed(qmax)
    shape = {"matrix": (16, 120), "vector": (1920,)}.get(layout, (8, 5, 6, 8))
    # About half of the values are outside the range.
    step = torch.tensor(1.5 / qmax)
    x = torch.randn(shape, generator=rng) * 1.5
    grad = torch.randn(shape, generator=rng)
    if layout != "contiguous" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
        grad = grad if layout == "mixed" else grad.to(memory_format=torch.channels_last)
    x, grad = x.to(dtype), grad.to(dtype)
    step = step.double() if dtype == torch.float64 else step
    scale = 1 / math.sqrt(240 * qmax)
    ours = gradients(x, step, qmin, qmax, grad, scale)
    theirs = textbook(x, step, qmin, qmax, grad, scale)
    assert [t.dtype for t in ours] == [dtype, dtype, step.dtype]
    assert ours[2].shape == ()
    if dtype == torch.bfloat16:  # eight bits of precision: codes next to a boundary fall on the other side
        assert (ours[0].double() - theirs[0]).abs().max() <= 1.01 * step + 0.02
        assert (ours[1].double() != theirs[1]).float().mean() < 0.02
        spread = grad.double().abs().sum() * scale  # of what the sum is made of
        assert (ours[2] - theirs[2]).abs() < 0.01 * spread * qmax
        return
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    flips = (ours[0].double() - theirs[0]).abs() > 0.5 * step  # a tie in float32 may fall on the other side
    assert int(flips.sum()) <= (0 if dtype == torch.float64 else 2)
    torch.testing.assert_close(ours[0].double()[~flips], theirs[0][~flips], **tight)
    torch.testing.assert_close(ours[1].double(), theirs[1], **tight)
    if not flips.any():
        torch.testing.assert_close(ours[2].double(), theirs[2], rtol=1e-4, atol=1e-5 * float(grad.abs().sum()) * scale)


@pytest.mark.parametrize(("signed", "qmax"), [(True, 3), (False, 7)])
def test_gradient_scale(signed: bool, qmax: int) -> None:
    """Steps would be trained 10 to 1000 times too fast or too slow: at 2 bits that is divergence (paper, Table 3)."""
    quantizer = LearnedStep(3, SITE, Scope(), signed, 50)
    assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(50 * qmax))
    x = torch.full((10,), 1e6)
    quantizer(x).sum().backward()
    assert quantizer.step.grad is not None
    assert quantizer.step.grad.item() == pytest.approx(10 * qmax / math.sqrt(50 * qmax))


def test_n_counts_weights_and_features_of_one_image() -> None:
    """The gradient scale would depend on the batch size, which the paper's does not."""
    method, _ = ready("lsq")
    layer = next(s for s in method.sites if s.kind == "layer" and not s.edge)
    module = method.net.get_submodule(layer.name)
    weight, act = module.weight_quantizer, module.act_quantizer
    assert weight.grad_scale == pytest.approx(1 / math.sqrt(module.weight.numel() * 3))
    assert act.grad_scale == pytest.approx(1 / math.sqrt(layer.inputs * 7))
    assert layer.inputs == 4 * 8 * 8  # width 4, 8x8 images


def test_the_starting_step_is_the_papers() -> None:
    """Training would start from another grid than ``2 <|v|> / sqrt(Q_P)``."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for bits, signed, qmax in ((2, True, 1), (4, True, 7), (8, False, 255)):
        quantizer = LearnedStep(bits, SITE, Scope(), signed, 9)
        quantizer.fit(x)
        assert quantizer.step.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(qmax))
    quantizer.fit(torch.zeros(5))
    assert quantizer.step.item() > 0


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("a", [0.25, 8.0])
def test_scaling_input_and_step_scales_the_output(qmin: int, qmax: int, a: float) -> None:
    """The quantizer would not be a grid: something in it would not scale with the step."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    step, grad = torch.tensor(1.0 / qmax), torch.ones(500)
    one, scaled = gradients(x, step, qmin, qmax, grad), gradients(a * x, a * step, qmin, qmax, grad)
    assert torch.equal(scaled[0], a * one[0])
    assert torch.equal(scaled[1], one[1])
    torch.testing.assert_close(scaled[2], one[2])


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_no_step_gradient_on_the_grid(qmin: int, qmax: int) -> None:
    """A step at which nothing is rounded and nothing is clipped would go on moving."""
    codes = torch.arange(qmin + 1, qmax).repeat(3)
    if not len(codes):
        codes = torch.zeros(3, dtype=torch.int64)
    out, _, grad_step = gradients(codes * 0.25, torch.tensor(0.25), qmin, qmax, torch.randn(len(codes)))
    assert torch.equal(out, codes * 0.25)
    assert grad_step.item() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_keeps_input_output_and_step_and_no_more(layout: torch.memory_format) -> None:
    """Training would take the memory of the textbook form, which keeps five tensors of the input's size."""
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout).requires_grad_()
    step = torch.tensor(0.1, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = LearnedStepRound.apply(x, step, -4, 3, 1.0)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), out.data_ptr(), step.data_ptr()}
    assert sum(t.nbytes for t in kept) == 2 * x.nbytes + step.nbytes
    assert out.is_contiguous(memory_format=layout)


def test_steps_are_not_decayed_and_stay_positive() -> None:
    """Weight decay would pull the steps to zero; a negative step would turn the grid around."""
    method, _ = ready("lsq", weight_decay=0.5)
    steps = {id(p) for n, p in method.net.named_parameters() if n.endswith("quantizer.step")}
    assert steps
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in steps else 0.5)
    quantizer = LearnedStep(3, SITE, Scope(), True, 9)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
        quantizer.project()
    assert quantizer.step.item() > 0
