from __future__ import annotations

import numpy as np
import pytest
import torch
from qatbench.bench.quant import Scope, UniformQuantizer
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.dorefa import TanhWeight, UnitActivation

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
WEIGHTS = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.7


class TestDOREFA(MethodContract):
    method = "dorefa"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", ["none", "max"])
def test_weights_equal_the_papers_formula(bits: int, scale: str) -> None:
    """The weights would be quantized by something else than Eq. 9 of DoReFa-Net."""
    w = WEIGHTS.double().numpy()
    t, n = np.tanh(w), 2**bits - 1
    expected = 2 * np.rint(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1
    expected = expected * (np.abs(t).max() if scale == "max" else 1)
    ours = TanhWeight(bits, SITE, Scope(), scale)(WEIGHTS)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_odd_and_within_one(bits: int) -> None:
    """The grid would be shifted: a negative weight would be rounded to another size than a positive one; or it would pass 1."""
    quantizer = TanhWeight(bits, SITE, Scope(), "none")
    values = quantizer(WEIGHTS)
    torch.testing.assert_close(quantizer(-WEIGHTS), -values, rtol=0, atol=1e-6)
    assert values.max().item() == 1.0
    assert values.abs().max().item() == 1.0
    scaled = TanhWeight(bits, SITE, Scope(), "max")(WEIGHTS)
    assert scaled.abs().max().item() == pytest.approx(WEIGHTS.tanh().abs().max().item())


def test_the_weights_gradient_goes_through_tanh_and_its_largest_value() -> None:
    """Weights would be trained by another gradient than that of the formula with a straight-through rounding."""
    rng = torch.Generator().manual_seed(1)
    grad = torch.randn(WEIGHTS.shape, generator=rng)
    for scale in ("none", "max"):
        one, other = WEIGHTS.clone().requires_grad_(), WEIGHTS.double().requires_grad_()
        TanhWeight(3, SITE, Scope(), scale)(one).backward(grad)  # type: ignore[arg-type]
        t = other.tanh()
        smooth = t / t.abs().max() * (t.abs().max().detach() if scale == "max" else 1)
        smooth.backward(grad.double())
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_weights_of_zero_stay_near_zero_and_can_learn() -> None:
    """A layer that starts at zero (as residual branches often do) would be NaN, and the run would fail."""
    w = torch.zeros(6, requires_grad=True)
    values = TanhWeight(4, SITE, Scope(), "max")(w)
    values.sum().backward()
    assert values.abs().max() < 1e-6
    torch.testing.assert_close(w.grad, torch.ones(6))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_equal_the_papers_formula(bits: int) -> None:
    """Activations would be quantized by something else than a clip to [0, 1] and a round; or learn outside of it."""
    n = 2**bits - 1
    x = (torch.linspace(-1, 2, 301, dtype=torch.float64) + 0.0007).requires_grad_()  # no ties
    y = UnitActivation(bits, SITE, Scope())(x)
    np.testing.assert_allclose(y.detach().numpy(), np.rint(n * np.clip(x.detach().numpy(), 0, 1)) / n, atol=1e-6)
    y.sum().backward()
    inside = (x > 0.001) & (x < 0.999)
    outside = (x < -0.001) | (x > 1.001)
    assert x.grad[inside].eq(1).all()
    assert x.grad[outside].eq(0).all()


def test_an_input_with_negative_values_is_not_cut_off() -> None:
    """The first layer would see half of every image."""
    method, _ = ready("dorefa")
    first = next(s for s in method.sites if s.kind == "layer" and s.edge)
    assert first.signed_input
    assert isinstance(method.net.get_submodule(first.name).act_quantizer, UniformQuantizer)
    inner = next(s for s in method.sites if s.kind == "layer" and not s.edge)
    assert isinstance(method.net.get_submodule(inner.name).act_quantizer, UnitActivation)


def test_nothing_is_learned_but_weights() -> None:
    """DoReFa has no quantizer parameters; one would make it another method."""
    method, _ = ready("dorefa")
    assert not [n for n, _ in method.net.named_parameters() if "quantizer" in n]


def test_the_range_of_activations_may_be_fitted() -> None:
    """``act_range="fit"`` would do nothing; or the paper's [0, 1] would no longer be the default."""
    plain, _ = ready("dorefa", bits="w2a2")
    fitted, _ = ready("dorefa", bits="w2a2", params={"dorefa": {"act_range": "fit"}})
    one, two = (m.net.get_submodule("layer2.0.conv2").act_quantizer for m in (plain, fitted))
    assert one.step.item() == pytest.approx(1 / 3)
    assert two.step.item() != pytest.approx(1 / 3)
    assert type(two) is UniformQuantizer
