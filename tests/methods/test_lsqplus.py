from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.lsqplus import LearnedStepOffset, SpreadStep
from torch import Tensor

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)


class TestLSQPlus(MethodContract):
    method = "lsqplus"


def quantizer(step: float, offset: float, bits: int = 3) -> LearnedStepOffset:
    made = LearnedStepOffset(bits, SITE, Scope(), 72, 50).double()
    with torch.no_grad():
        made.step.fill_(step)
        made.offset.fill_(offset)
    return made


def grads(made: LearnedStep | LearnedStepOffset, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    made.zero_grad()
    out = made(x)
    out.backward(grad)
    assert x.grad is not None
    assert made.step.grad is not None
    return out.detach(), x.grad, made.step.grad.clone()


@given(st.integers(0, 10**6), st.floats(0.05, 2))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_beta_0_is_lsq(seed: int, step: float) -> None:
    """With no offset LSQ+ would be something else than LSQ, in value or in a gradient."""
    rng = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(4, 30, generator=rng, dtype=torch.float64) for _ in range(2))
    lsq = LearnedStep(3, SITE, Scope(), False, 72).double()
    with torch.no_grad():
        lsq.step.fill_(step)
    for ours, theirs in zip(grads(quantizer(step, 0.0), x, grad), grads(lsq, x, grad), strict=True):
        assert torch.equal(ours, theirs)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_shift_equivariance(seed: int, offset: float, c: float) -> None:
    """The offset would not be one: moving input and offset together would change the codes or the gradients."""
    rng = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(200, generator=rng, dtype=torch.float64) for _ in range(2))
    one, other = grads(quantizer(0.3, offset), x, grad), grads(quantizer(0.3, offset + c), x + c, grad)
    flips = (one[0] + c - other[0]).abs() > 0.1  # a tie may fall on the other side
    assert int(flips.sum()) <= 1
    torch.testing.assert_close(one[0][~flips] + c, other[0][~flips])
    if not flips.any():
        torch.testing.assert_close(one[1], other[1])
        torch.testing.assert_close(one[2], other[2], rtol=1e-6, atol=1e-9)


def test_the_offsets_gradient_is_1_outside_and_0_inside() -> None:
    """Beta would be trained by another gradient than Eq. 9."""
    made = quantizer(0.5, -1.0)  # the range is -1 to 2.5
    x = torch.tensor([-3.0, -0.9, 0.2, 2.4, 9.0], dtype=torch.float64)
    made(x).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10_000.0], dtype=torch.float64))
    assert made.offset.grad is not None
    assert made.offset.grad.item() == pytest.approx(10_001 * made.grad_scale)
    assert made.grad_scale == pytest.approx((72 * 7) ** -0.5)


def test_the_start_minimises_the_error() -> None:
    """Training would start from a grid that fits worse than that of the whole range, or of LSQ."""
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)).clamp(min=-0.3), torch.tensor([12.0])])
    made = LearnedStepOffset(4, SITE, Scope(), 72, 50)
    made.fit(x)
    whole = LearnedStepOffset(4, SITE, Scope(), 72, 1)
    whole.fit(x)
    lsq = LearnedStep(4, SITE, Scope(), False, 72)
    lsq.fit(x)
    error, error_whole, error_lsq = (float((q(x) - x).detach().square().mean()) for q in (made, whole, lsq))
    assert error < 0.7 * error_whole
    assert error < error_lsq
    assert made.offset < 0


def test_the_weights_start_from_three_deviations() -> None:
    """The weights' starting step would not be Eq. 11."""
    w = torch.randn(500, generator=torch.Generator().manual_seed(0)) + 0.2
    made = SpreadStep(4, SITE, Scope(), True, 36)
    made.fit(w)
    mean, deviation = w.mean().item(), w.std(correction=0).item()
    assert made.step.item() == pytest.approx(max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 8, rel=1e-5)
    made.fit(torch.zeros(5))
    assert made.step.item() > 0


def test_steps_and_offsets_are_not_decayed() -> None:
    """Weight decay would pull steps and offsets to zero."""
    method, _ = ready("lsqplus", weight_decay=0.5)
    names = {id(p): n for n, p in method.net.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in method.configure_optimizers().param_groups for p in g["params"]}
    own = [n for n in decays if n.endswith(("quantizer.step", "quantizer.offset"))]
    assert len(own) == 3 * sum(s.kind == "layer" for s in method.sites)  # a weight's step, an input's step and offset
    assert {decays[n] for n in own} == {0.0}
