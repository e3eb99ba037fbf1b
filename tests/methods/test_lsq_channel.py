from __future__ import annotations

import math

import pytest
import torch
from qatbench.bench.quant import Scope
from qatbench.bench.quant.quantizer import step_of
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.lsq_channel import ChannelStep

CHANNELS = 4
SHAPES = [(CHANNELS, 3, 3, 3), (CHANNELS, 27)]


class TestLSQChannel(MethodContract):
    method = "lsq-channel"


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Filters of different sizes."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return w * torch.tensor([0.1, 1.0, 3.0, 0.5]).view(-1, *[1] * (len(shape) - 1))


def quantizer(bits: int, weights: int = CHANNELS * 27) -> ChannelStep:
    return ChannelStep(bits, Site("layer", "layer", (CHANNELS,), weights=weights), Scope())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_each_channel_is_lsq_of_its_own(bits: int, shape: tuple[int, ...]) -> None:
    """A filter would be rounded by another's step, or trained by a gradient that is not LSQ's, with N of the whole tensor."""
    w, upstream = weight(shape), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = quantizer(bits)
    ours.fit(w)
    leaf = w.clone().requires_grad_()
    out = ours(leaf)
    out.backward(upstream)
    assert leaf.grad is not None
    assert ours.steps.grad is not None
    for channel in range(CHANNELS):
        one = LearnedStep(bits, Site("layer", "layer", (1,), weights=w.numel()), Scope(), True, w.numel())
        one.fit(w[channel])
        assert float(one.step.detach()) == pytest.approx(2 * float(w[channel].abs().mean()) / math.sqrt(one.qmax))
        part = w[channel].clone().requires_grad_()
        value = one(part)
        value.backward(upstream[channel])
        assert part.grad is not None
        assert one.step.grad is not None
        torch.testing.assert_close(out[channel], value)
        torch.testing.assert_close(leaf.grad[channel], part.grad)
        torch.testing.assert_close(ours.steps.grad[channel], one.step.grad, rtol=1e-4, atol=1e-6)


def test_the_range_is_that_of_the_public_code() -> None:
    """There would be one code fewer than bits allow: theirs go from -2^(b-1) to 2^(b-1) - 1."""
    ours = quantizer(3)
    assert (ours.qmin, ours.qmax) == (-4, 3)
    assert ours.grad_scale == pytest.approx(1 / math.sqrt(CHANNELS * 27 * 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_step_broadcasts_to_the_weight(shape: tuple[int, ...]) -> None:
    """Methods that look at the spacing (``pege``, ``fqat``'s signal=boundary) would compare filters with others' steps."""
    ours = quantizer(4)
    ours.fit(weight(shape))
    ours(weight(shape))
    step = step_of(ours)
    assert step is not None
    assert step.shape == (CHANNELS, *[1] * (len(shape) - 1))


def test_a_filter_of_zeros_has_a_step() -> None:
    """A pruned filter would be divided by zero."""
    w = weight(SHAPES[0])
    w[2] = 0
    ours = quantizer(3)
    ours.fit(w)
    assert bool((ours.steps > 0).all())
    assert not ours(w)[2].any()


def test_steps_are_not_decayed_stay_positive_and_are_counted() -> None:
    """Weight decay would pull the steps to zero; a negative one turn a filter's grid around; a network's size leave them out."""
    method, _ = ready("lsq-channel", weight_decay=0.5)
    steps = {id(p) for n, p in method.net.named_parameters() if n.endswith(("quantizer.step", "quantizer.steps"))}
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in steps else 0.5)
    ours = quantizer(3)
    ours.fit(weight(SHAPES[0]))
    start = ours.steps.detach().clone()
    with torch.no_grad():
        ours.steps[1] = -1.0
        ours.project()
    expected = start * torch.tensor([1.0, 0.01, 1.0, 1.0])
    torch.testing.assert_close(ours.steps.detach(), expected)
    assert ours.constants() == CHANNELS
