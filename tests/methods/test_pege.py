from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import Quantizer, QuantLayer, Scope, quant_layers
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, same, state, train
from qatbench.methods.dorefa import TanhWeight
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.n2uq import FilterWeight
from qatbench.methods.pege import PEGE, closest, replaced, spacing
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)


class TestPEGE(MethodContract):
    method = "pege+lsq"


class Fixed:
    """Stands for an inner method: its quantizer is the one at hand."""

    name, trains, bits, views, first_last, weights_only = "fixed", True, range(2, 9), 1, "8bit", False

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        return self.quantizer


def progressive(quantizer: Quantizer, step: int = 0, steps: int = 0, **params: object) -> PEGE:
    """PEGE with one quantizer, at a step of training; ``steps=0``: all values are quantized."""
    method = PEGE.__new__(PEGE)
    nn.Module.__init__(method)
    PEGE.__init__(method, Fixed(quantizer), PEGE.Params(**params))  # type: ignore[arg-type]
    method.weight_quantizer(quantizer.bits, quantizer.site, quantizer.scope)
    quantizer.scope.step, quantizer.scope.steps = step, steps
    quantizer.train()
    return method


def lsq(step: float = 0.25, bits: int = 3) -> LearnedStep:
    quantizer = LearnedStep(bits, SITE, Scope(), True, 1)
    with torch.no_grad():
        quantizer.step.fill_(step)
    return quantizer


def values(n: int = 400, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.6


# --- what is replaced, and when ------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.floats(0.01, 1))
@SMALL
def test_pege_p_t_is_monotone_and_ends_at_1(steps: int, share: float) -> None:
    """Training would end with values that are not quantized, which is not the network that is measured; or go back and forth."""
    p = [replaced(t, steps, share) for t in range(steps + 1)]
    assert all(0 <= a <= b <= 1 for a, b in pairwise(p))
    assert p[-1] == 1
    assert replaced(int(share * steps) + 1, steps, share) == 1
    assert p[0] == 0 or share * steps <= 0
    assert replaced(0, 0, share) == 1  # outside training


def test_the_curriculum_is_logarithmic() -> None:
    """Values would be replaced at another pace than the abstract's "logarithmic curriculum"."""
    assert replaced(9, 1000, 0.999) == pytest.approx(1 / 3)
    assert replaced(99, 1000, 0.999) == pytest.approx(2 / 3)


@pytest.mark.parametrize("step", [0, 3, 20, 79])
@pytest.mark.parametrize("order", ["random", "error"])
def test_the_share_p_t_of_the_values_is_quantized(order: str, step: int) -> None:
    """The curriculum would be another one than the formula says, or a value neither quantized nor left as it is."""
    quantizer, x = lsq(), values(20_000)
    progressive(quantizer, step, 100, order=order)
    torch.manual_seed(0)
    mixed = quantizer(x).detach()
    q = quantizer.quantize(x).detach()
    assert bool(((mixed == q) | (mixed == x)).all())
    share = (mixed == q).double().mean().item()
    assert share == pytest.approx(replaced(step, 100, 0.8), abs=0.012 if order == "random" else 1e-4)


def test_order_error_replaces_the_closest_first() -> None:
    """Values far from the grid would be moved while close ones stay: the setting would be random after all."""
    quantizer, x = lsq(), values()
    progressive(quantizer, 10, 100, order="error")
    mixed, q = quantizer(x).detach(), quantizer.quantize(x).detach()
    done = mixed == q
    error = (x - q).abs()
    assert 0 < int(done.sum()) < len(x)
    assert error[done].max() <= error[~done].min()
    assert closest(error, 0.0).sum() == 0
    assert closest(error, 1.0).all()
    assert closest(torch.zeros(6), 0.5).all()  # equal ones go together


def test_random_masks_are_drawn_from_torchs_generator() -> None:
    """A resumed run would draw other masks than one that was not interrupted; or all passes would have the same mask."""
    quantizer, x = lsq(), values()
    progressive(quantizer, 10, 100)
    torch.manual_seed(1)
    first, second = quantizer(x), quantizer(x)
    torch.manual_seed(1)
    assert torch.equal(quantizer(x), first)
    assert not torch.equal(first, second)


def test_pege_eval_is_fully_quantised_and_draws_nothing() -> None:
    """A network would be measured that is partly in float; or looking at it would change what training draws next."""
    alone, data = ready("lsq")
    wrapped, _ = ready("pege+lsq")
    wrapped.scope.step, wrapped.scope.steps = 0, 100
    assert same(state(alone), state(wrapped)) == []  # calibrated alike, and saved under the same names
    rng = torch.get_rng_state()
    batch = all_train(data)
    assert torch.equal(logits(alone, alone.net, batch), logits(wrapped, wrapped.net, batch))
    assert torch.equal(rng, torch.get_rng_state())
    assert wrapped.replacement.penalties == {}


# --- the gradient --------------------------------------------------------------------------------------------------------


def test_pege_p_1_kappa_0_lambda_0_is_the_base_quantiser(tmp_path: Path) -> None:
    """The wrapper would change training by being there."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = ready("pege+lsq", epochs=1, params={"pege": {"kappa": 0.0, "weight": 0.0}})
    wrapped.replacement.params = wrapped.params.model_copy(update={"share": 0.0})  # the first step, too
    train(wrapped, data, tmp_path / "wrapped")
    assert same(state(alone), state(wrapped)) == []
    assert set(wrapped.losses_seen) == {"task"}
    quantizer, plain, x = lsq(), lsq(), values()
    progressive(quantizer, 5, 5, kappa=0.0, weight=0.0)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = values(seed=1)
    out, expected = quantizer(one), plain(other)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(one.grad, other.grad)
    assert torch.equal(quantizer.step.grad, plain.step.grad)


@pytest.mark.parametrize("order", ["random", "error"])
@pytest.mark.parametrize("step", [10, 100])
def test_the_gradients_formula(step: int, order: str) -> None:
    """The correction would have the wrong sign or reach values that are not quantized, and training go away from the grid."""
    quantizer, plain, x = lsq(), lsq(), values()
    progressive(quantizer, step, 100, kappa=0.4, order=order)
    leaf, other, g = x.clone().requires_grad_(), x.clone().requires_grad_(), values(seed=1)
    out = quantizer(leaf)
    out.backward(g)
    q = plain(other)
    chosen = (out == q).detach()
    q.backward(g * chosen)
    error = ((x - q.detach()) / 0.25).clamp(-0.5, 0.5)
    inside = ((x > -4 * 0.25) & (x < 3 * 0.25)).float()
    expected = torch.where(chosen, inside * g * (1 + 0.4 * g.sign() * error), g)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(quantizer.step.grad, plain.step.grad)  # of the quantized values alone, and uncorrected


def test_the_correction_is_bounded_where_the_base_clips() -> None:
    """A weight far outside the range of a quantizer that passes all gradients would be thrown about, or turned around."""
    quantizer = FilterWeight(2, SITE, Scope())
    progressive(quantizer, kappa=1.0)
    w = torch.tensor([[0.1, -0.1, 0.1, 50.0]], requires_grad=True)
    quantizer(w).backward(torch.ones(1, 4))
    assert bool(((w.grad >= 0.5) & (w.grad <= 1.5)).all())
    assert w.grad[0, 3] == 1.5


def test_spacing_of_a_grid_without_a_step() -> None:
    """The correction and the loss could not be had for DoReFa's or N2UQ's weights, or be in other units."""
    x = values()
    quantizer = TanhWeight(3, SITE, Scope(), "max")
    q = quantizer(x)
    assert spacing(quantizer, q).item() == pytest.approx(q.unique().diff().mean().item(), rel=1e-4)
    assert spacing(quantizer, torch.zeros(3)).item() == 1
    assert spacing(lsq(0.3), q).item() == pytest.approx(0.3)


# --- the loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_in_steps() -> None:
    """The second goal of the co-optimisation would have another size, or move the step instead of the values."""
    quantizer, x = lsq(), values()
    method = progressive(quantizer)
    leaf = x.clone().requires_grad_()
    quantizer(leaf)
    (penalty,) = method.replacement.penalties.values()
    error = (x - quantizer.quantize(x).detach()) / 0.25
    clipped = error.abs() > 0.5
    assert 0 < int(clipped.sum()) < len(x)
    assert penalty.item() == pytest.approx(error.masked_fill(clipped, 0.5).square().mean().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(leaf.grad, torch.where(clipped, 0.0, 2 * error / 0.25 / len(x)))
    assert quantizer.step.grad is None


def test_losses_sum_up_the_pass_and_leave_nothing() -> None:
    """A second pass or a micro-batch would pay for the one before, through a graph that is gone; or a copy would take it along."""
    method, data = ready("pege+lsq", params={"pege": {"weight": 0.5}}, bits="w3a3")
    method.train()
    method.scope.steps = 100
    batch = next(iter(data.train_dataloader()))
    tensors = sum(
        (layer.weight_quantizer is not None) + (layer.act_quantizer is not None)
        for _, layer in quant_layers(method.net)
    )
    for track in (True, False):
        torch.manual_seed(3)
        method.net(batch.x)
        seen = list(method.replacement.penalties.values())
        assert len(seen) == tensors
        torch.manual_seed(3)
        losses = method.compute_losses(batch, track)
        assert losses["discretization"].item() == pytest.approx(0.5 * float(torch.stack(seen).sum().detach()), rel=1e-4)
        assert method.replacement.penalties == {}
        torch.stack(list(losses.values())).sum().backward()
    method.net(batch.x)  # a pass that nobody asks for losses
    twin = copy.deepcopy(method.net)
    twin(batch.x)
    assert not any("penal" in name for name in method.state_dict())
    method.zero_grad()
    torch.stack(list(method.compute_losses(batch, True).values())).sum().backward()
    assert method.replacement.penalties == {}


def test_the_loss_pulls_the_weights_to_the_grid() -> None:
    """The term would be without effect."""
    left = []
    for weight in (0.0, 1.0):
        method, data = ready("pege+lsq", params={"pege": {"weight": weight}})
        loop = Loop(method, data)
        for epoch in range(2):
            loop.epoch(list(data.train_dataloader()), epoch)
        method.eval()
        layers = [layer for _, layer in quant_layers(method.net)]
        errors = [
            ((v.weight - v.weight_quantizer(v.weight)) / v.weight_quantizer.step).clamp(-0.5, 0.5).square().mean()
            for v in layers
        ]
        left.append(float(torch.stack(errors).mean().detach()))
    assert left[1] < 0.9 * left[0]


# --- with what it wraps --------------------------------------------------------------------------------------------------


def test_the_inner_methods_quantizers_stay_what_they_are() -> None:
    """Steps would be decayed, not kept positive or not trained; or a method would not find its own quantizers any more."""
    alone, _ = ready("lsq", weight_decay=0.5)
    wrapped, _ = ready("pege+lsq", weight_decay=0.5)
    groups = [
        [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in m.configure_optimizers().param_groups]
        for m in (alone, wrapped)
    ]
    assert groups[0] == groups[1]
    assert all(isinstance(layer.weight_quantizer, LearnedStep) for _, layer in quant_layers(wrapped.net))


def test_a_mixture_is_not_made_again_in_the_backward_pass() -> None:
    """With compiled kernels the weight's gradient would be that of the quantized input, not of the mixture that was used."""
    quantizer = lsq()
    quantizer.redo = lambda x: lambda: quantizer.quantize(x)  # type: ignore[method-assign]  # what compiled kernels offer
    progressive(quantizer, 10, 100)
    layer = QuantLayer(nn.Linear(6, 2), None, quantizer)
    x = values(60).view(10, 6)
    torch.manual_seed(0)
    mixed = quantizer(x).detach()
    torch.manual_seed(0)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, mixed.sum(0).expand(2, 6))


def test_float_networks_are_skipped_with_a_reason() -> None:
    """A sweep would run a float network under the name of a quantized one."""
    method, data = ready("pege+fp32")
    assert "no quantizers" in str(method.skip(data.task))
