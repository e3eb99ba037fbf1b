from __future__ import annotations

import numpy as np
import pytest
import torch
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.dorefa import TanhWeight
from qatbench.methods.pact import LearnedClip

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)


class TestPACT(MethodContract):
    method = "pact"


def clip(bits: int = 3, alpha: float = 1.7, signed: bool = False) -> LearnedClip:
    return LearnedClip(bits, SITE, Scope(), signed, alpha)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 8.0])
def test_output_equals_the_papers_formula(bits: int, alpha: float) -> None:
    """The activations would be quantized by something else than Eq. 1 and 2, or leave [0, alpha]."""
    n = 2**bits - 1
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 2 * alpha
    y = clip(bits, alpha)(x).detach().numpy()
    v = x.double().numpy()
    clipped = 0.5 * (np.abs(v) - np.abs(v - alpha) + alpha)
    np.testing.assert_allclose(y, np.rint(clipped * n / alpha) * alpha / n, atol=1e-5 * alpha)
    assert y.min() == 0
    assert y.max() == pytest.approx(alpha, rel=1e-6)


def test_alphas_gradient_is_that_of_the_clipped_inputs() -> None:
    """Alpha would be trained by another gradient than Eq. 3: 1 where x >= alpha, the boundary included."""
    rng = torch.Generator().manual_seed(0)
    quantizer = clip(alpha=1.5)
    x = torch.cat([torch.randn(500, generator=rng) * 2, torch.tensor([1.5, 1.5, 0.0])]).requires_grad_()
    grad = torch.randn(503, generator=rng)
    quantizer(x).backward(grad)
    clipped = x.detach() >= 1.5
    assert bool(clipped[500:502].all())
    assert quantizer.alpha.grad.item() == pytest.approx(grad[clipped].sum().item(), rel=1e-5)
    inside = (x.detach() >= 0) & ~clipped
    torch.testing.assert_close(x.grad, grad * inside)


def test_a_signed_input_is_clipped_on_both_sides() -> None:
    """An input with negative values would lose them; or alpha would learn from one side only."""
    quantizer = clip(bits=3, alpha=1.0, signed=True)
    x = torch.tensor([-4.0, -0.4, 0.4, 4.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    y.backward(torch.tensor([10.0, 1.0, 1.0, 100.0]))
    assert quantizer.alpha.grad.item() == pytest.approx(100 - 10)
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_alpha_is_decayed_with_the_weights_and_stays_positive() -> None:
    """The paper's pressure on alpha, L2 with the weights' factor, would be missing; or alpha would cross zero."""
    method, _ = ready("pact", weight_decay=0.25)
    alphas = {id(p) for n, p in method.net.named_parameters() if n.endswith("alpha")}
    assert alphas
    decay = {id(p): g["weight_decay"] for g in method.configure_optimizers().param_groups for p in g["params"]}
    assert {decay[a] for a in alphas} == {0.25}
    quantizer = clip(alpha=1.0)
    with torch.no_grad():
        quantizer.alpha.fill_(-2.0)
        quantizer.project()
    assert quantizer.alpha.item() > 0


def test_alpha_starts_where_params_say() -> None:
    """``--set params.pact.alpha`` would do nothing."""
    method, _ = ready("pact", params={"pact": {"alpha": 3.0}})
    values = {p.item() for n, p in method.net.named_parameters() if n.endswith("alpha")}
    assert values == {3.0}


def test_alpha_starts_at_a_fit_to_the_probe() -> None:
    """Alpha would start far above what a float network makes, where it has no gradient, and stay there: 2 bits are then 1."""
    method, _ = ready("pact", bits="w2a2")
    quantizers = [m for m in method.net.modules() if isinstance(m, LearnedClip)]
    assert all(0 < q.alpha.item() < 8 for q in quantizers)
    assert len({q.alpha.item() for q in quantizers}) > 5  # two layers may have one input
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu()
    fitted = LearnedClip(2, SITE, Scope(), False, 8.0, "fit")
    fitted.fit(x)
    others = [clip(2, alpha=float(a)) for a in torch.linspace(0.2, 4, 20)]
    best = min(float((other(x) - x).detach().square().mean()) for other in others)
    assert float((fitted(x) - x).detach().square().mean()) <= 1.01 * best
    signed = LearnedClip(3, SITE, Scope(), True, 8.0, "fit")
    signed.fit(-x)
    assert 0.3 < signed.alpha.item() < float(x.max())
    signed.fit(torch.zeros(5))
    assert signed.alpha.item() == 8.0


@pytest.mark.parametrize(
    ("given", "start"),
    [({"init": "paper"}, 8.0), ({"alpha": 10.0}, 10.0), ({"init": "paper", "alpha": 2.0}, 2.0)],
)
def test_the_papers_start_remains(given: dict, start: float) -> None:
    """``--set pact.alpha=10`` would be accepted, and do nothing."""
    method, _ = ready("pact", params={"pact": given})
    assert {p.item() for n, p in method.net.named_parameters() if n.endswith("alpha")} == {start}


def test_weights_are_dorefas() -> None:
    """PACT's weights would be quantized by another rule than the paper's."""
    method, _ = ready("pact")
    kinds = {type(m.weight_quantizer) for m in method.net.modules() if hasattr(m, "weight_quantizer")}
    assert kinds == {TanhWeight}
