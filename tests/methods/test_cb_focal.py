from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.chain import members
from qatbench.bench.errors import UserError
from qatbench.bench.testing import MethodContract
from qatbench.methods.cb_focal import class_balanced, focal
from tails import ABSENT, TAIL, gradient, losses_of, some_logits, tailed
from torch.nn import functional as F


class TestCBFocal(MethodContract):
    method = "cb-focal+lsq"


def weighted(beta: float, gamma: float, counts: tuple[int, ...] = TAIL):
    return tailed("cb-focal+lsq", counts, params={"cb-focal": {"beta": beta, "gamma": gamma}})


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=30), st.floats(0, 0.99999))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_cb_focal_weights_sum_to_the_number_of_classes(counts: list[int], beta: float) -> None:
    """The learning rate would in effect be another one than the run's; or a class with more images would weigh more."""
    weights = class_balanced(counts, beta)
    assert float(weights.double().sum()) == pytest.approx(len(counts), rel=1e-5)
    assert bool((weights[torch.tensor(counts).argsort()].diff() <= 1e-6).all())


def test_cb_focal_weights_are_the_papers() -> None:
    """The weights would be plain inverse frequencies, or those of another beta."""
    beta, n = 0.99, np.array(TAIL)
    expected = (1 - beta) / (1 - beta**n)
    np.testing.assert_allclose(class_balanced(TAIL, beta).numpy(), expected * 4 / expected.sum(), rtol=1e-5)


def test_cb_focal_gamma_0_is_class_balanced_cross_entropy() -> None:
    """The focal factor could not be switched off."""
    scores, batch = some_logits()
    each = F.cross_entropy(scores, batch.y, reduction="none")
    expected = (class_balanced(TAIL, 0.999)[batch.y] * each).mean()
    torch.testing.assert_close(losses_of(weighted(0.999, 0.0), scores, batch)["task"], expected)


@pytest.mark.parametrize("counts", [TAIL, ABSENT])
def test_cb_focal_beta_0_is_the_focal_loss(counts: tuple[int, ...]) -> None:
    """The weights could not be switched off, with a class that has no image least of all."""
    scores, batch = some_logits()
    batch.y = batch.y.where(batch.y != 1, 0)
    p = scores.softmax(1)[torch.arange(len(batch)), batch.y]
    expected = ((1 - p) ** 2 * -p.log()).mean()
    torch.testing.assert_close(losses_of(weighted(0.0, 2.0, counts), scores, batch)["task"], expected)


def test_cb_focal_on_balanced_data_without_focus_is_cross_entropy() -> None:
    """A difference on long-tailed data would prove nothing."""
    scores, batch = some_logits()
    task = losses_of(weighted(0.9999, 0.0, (31, 31, 31, 31)), scores, batch)["task"]
    torch.testing.assert_close(task, F.cross_entropy(scores, batch.y))


def test_cb_focal_a_class_without_images() -> None:
    """A weight would be infinite, and with it all others nothing."""
    weights = class_balanced(ABSENT, 0.9999)
    assert weights.isfinite().all()
    assert weights[1] == 0
    assert float(weights.sum()) == pytest.approx(3)
    scores, batch = some_logits()
    task = losses_of(weighted(0.9999, 1.0, ABSENT), scores, batch)["task"]
    assert task.isfinite()
    assert gradient(task, scores).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 5.0])
def test_cb_focal_certain_images(gamma: float) -> None:
    """An image whose probability rounds to 0 or 1 would make the gradient NaN."""
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 0.0], [30.0, 0.0]], requires_grad=True)
    loss = focal(scores, torch.zeros(4, dtype=torch.int64), gamma).sum()
    assert loss.isfinite()
    assert gradient(loss, scores).isfinite().all()


def test_cb_focal_leaves_the_other_losses_alone() -> None:
    """The second head would lose its own loss."""
    method, plain = tailed("cb-focal+lsq", coarse=True), tailed("lsq", coarse=True)
    scores, batch = some_logits(6)
    ours, theirs = losses_of(method, scores, batch), losses_of(plain, scores, batch)
    assert set(ours) == {"task", "coarse"}
    assert torch.equal(ours["coarse"], theirs["coarse"])


@pytest.mark.parametrize("inner", ["balanced-softmax", "logit-adjust", "kd"])
def test_cb_focal_inside_what_it_would_undo(inner: str) -> None:
    """``cb-focal+balanced-softmax`` would be cb-focal under another name: the adjusted loss is thrown away."""
    with pytest.raises(UserError, match=f"name {inner} before cb-focal"):
        members(f"cb-focal+{inner}+lsq")
    assert len(members(f"{inner}+cb-focal+lsq")) == 3
