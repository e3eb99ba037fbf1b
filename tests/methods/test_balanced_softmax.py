from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.testing import MethodContract, logits
from qatbench.methods.logit_adjust import log_counts
from tails import ABSENT, TAIL, gradient, losses_of, some_logits, tailed
from torch.nn import functional as F


class TestBalancedSoftmax(MethodContract):
    method = "balanced-softmax+lsq"


@pytest.mark.parametrize("counts", [TAIL, ABSENT, (50_000, 3, 2, 1)])
def test_balanced_softmax_equals_logit_adjustment_with_tau_1(counts: tuple[int, ...]) -> None:
    """Two rows of a table that are one method would have different numbers."""
    ours, theirs = tailed("balanced-softmax+lsq", counts), tailed("logit-adjust+lsq", counts)
    for seed in range(5):
        scores, batch = some_logits(seed=seed)
        one, other = losses_of(ours, scores, batch)["task"], losses_of(theirs, scores, batch)["task"]
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(one, scores), gradient(other, scores), rtol=1e-5, atol=1e-6)
    probe = ours.probe
    assert torch.equal(logits(ours, ours.net, probe), logits(theirs, theirs.net, probe))


def test_balanced_softmax_is_the_papers_formula() -> None:
    """The probabilities would not be ``n_j exp f_j / sum_i n_i exp f_i`` (Eq. 3)."""
    scores, batch = some_logits()
    mass = torch.tensor(TAIL).double() * scores.detach().double().exp()
    expected = -(mass / mass.sum(1, keepdim=True)).log()[torch.arange(len(batch)), batch.y].mean()
    assert losses_of(tailed("balanced-softmax+lsq"), scores, batch)["task"].item() == pytest.approx(
        float(expected), rel=1e-5
    )


def test_balanced_softmax_on_balanced_data_is_cross_entropy() -> None:
    """A difference on long-tailed data would prove nothing."""
    scores, batch = some_logits()
    task = losses_of(tailed("balanced-softmax+lsq", (9, 9, 9, 9)), scores, batch)["task"]
    torch.testing.assert_close(task, F.cross_entropy(scores, batch.y))


def test_balanced_softmax_leaves_a_second_head_alone() -> None:
    """Superclasses would be adjusted by the counts of classes."""
    method, plain = tailed("balanced-softmax+lsq", coarse=True), tailed("lsq", coarse=True)
    scores, batch = some_logits(6)
    assert torch.equal(losses_of(method, scores, batch)["coarse"], losses_of(plain, scores, batch)["coarse"])
    assert not torch.equal(losses_of(method, scores, batch)["task"], losses_of(plain, scores, batch)["task"])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_balanced_softmax_a_class_without_images(counts: list[int]) -> None:
    """The logarithm of nothing would be minus infinity."""
    found = log_counts(counts)
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().round(), torch.tensor(counts).clamp(min=1).float(), rtol=1e-5, atol=0.5)
