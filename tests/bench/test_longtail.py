"""The lists of class counts, against those that were published, and what every list must keep to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.longtail import RULES, shots, tail_counts

CIFAR10_LDAM = {
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    200: [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25],
}
# Class counts of the lists in ClimbQ's repository; at 50 the spec gives the last class and the total.
CIFAR10_CLIMBQ = {
    10: [5000, 3871, 2997, 2320, 1796, 1390, 1076, 833, 644, 498],
    50: [5000, 3237, 2095, 1356, 877, 567, 367, 237, 153, 99],
    200: [5000, 2775, 1540, 854, 474, 263, 145, 80, 44, 24],
}
AVAILABLE = st.lists(st.integers(1, 6000), min_size=1, max_size=30)
IMBALANCE = st.floats(1, 1000) | st.integers(1, 1000)
RULE = st.sampled_from(RULES)


@pytest.mark.parametrize("imbalance", CIFAR10_LDAM)
def test_ldam_lists_of_cifar10(imbalance):
    """Fails if CIFAR-10-LT were not the one of LDAM's closed form, on which the field compares."""
    assert tail_counts([5000] * 10, imbalance, "ldam") == CIFAR10_LDAM[imbalance]


@pytest.mark.parametrize(("imbalance", "total"), [(10, 20_425), (50, 13_988), (200, 11_199)])
def test_climbq_lists_of_cifar10(imbalance, total):
    """Fails if the lists behind the tables of ClimbQ were not reproduced."""
    counts = tail_counts([5000] * 10, imbalance, "climbq")
    assert counts == CIFAR10_CLIMBQ[imbalance]
    assert sum(counts) == total


def test_climbq_list_of_syndigits():
    """Fails if SynDigits-LT, which starts at 1000 images, were another one."""
    expected = [1000, 555, 308, 170, 94, 52, 28, 15, 8, 4]
    assert tail_counts([1000] * 10, 200, "climbq") == expected


@pytest.mark.parametrize(("imbalance", "classes", "total"), [(10, 100, 18_292), (50, 90, 11_761), (200, 72, 8_883)])
def test_climbq_empties_the_tail_of_cifar100(imbalance, classes, total):
    """Fails if the classes that the iterated rule drops were kept: its tables were made without them."""
    counts = tail_counts([500] * 100, imbalance, "climbq")
    assert sum(n > 0 for n in counts) == classes
    assert sum(counts) == total
    assert (min(counts) == 32) == (imbalance == 10)


@pytest.mark.parametrize(("imbalance", "least", "total"), [(10, 50, 19_573), (50, 10, 12_608), (200, 2, 9_502)])
def test_ldam_keeps_every_class_of_cifar100(imbalance, least, total):
    """Fails if a test set of 100 classes could not be learned whole. Totals: the sum of the closed form."""
    counts = tail_counts([500] * 100, imbalance, "ldam")
    assert counts[0] == 500
    assert min(counts) == counts[-1] == least
    assert sum(counts) == total


def test_the_largest_class_leads_and_no_class_grows():
    """Fails if ranks went by class number, so that a rare class were asked for images that it does not have."""
    assert tail_counts([30, 200, 100, 100], 8, "ldam") == [25, 200, 100, 50]
    assert tail_counts([10, 200, 100, 100], 8, "climbq") == [10, 200, 100, 50]
    assert tail_counts([200, 10, 10], 4, "climbq") == [200, 10, 5]  # the next one is cut from what was kept
    assert tail_counts([200, 10, 10], 4, "ldam") == [200, 10, 10]


def test_a_tail_of_its_own_ratio_is_kept_whole():
    """Fails if a set that was already cut at ratio 10 lost images when it is cut at ratio 10 again."""
    assert tail_counts(CIFAR10_LDAM[10], 10, "ldam") == CIFAR10_LDAM[10]


@given(AVAILABLE, IMBALANCE, RULE)
def test_counts_fall_with_rank_and_stay_within_what_there_is(available, imbalance, rule):
    """Fails if a list asked for images that do not exist, or a rarer class kept more than a commoner one."""
    imbalance = min(imbalance, max(available))
    counts = tail_counts(available, imbalance, rule)
    assert all(0 <= n <= there for n, there in zip(counts, available, strict=True))
    ranked = [counts[c] for c in sorted(range(len(counts)), key=lambda c: (-available[c], c))]
    assert ranked == sorted(counts, reverse=True)
    assert max(counts) == max(available)
    assert rule == "climbq" or min(counts) >= 1


@given(st.integers(1, 6000), st.integers(1, 200), RULE)
def test_balance_keeps_everything(n, classes, rule):
    """Fails if rounding took an image from a set that is meant to stay as it is."""
    assert tail_counts([n] * classes, 1, rule) == [n] * classes


@given(AVAILABLE, RULE)
def test_imbalance_one_keeps_what_is_uneven_already(available, rule):
    """Fails if imbalance 1 did anything."""
    assert tail_counts(available, 1, rule) == available


@given(st.integers(2, 6000), st.integers(2, 100), st.data())
def test_ldam_has_the_ratio_that_was_asked_for(n, classes, data):
    """Fails if the tail were thinner or thicker than the imbalance says by more than rounding down does."""
    imbalance = data.draw(st.floats(1, n))
    counts = tail_counts([n] * classes, imbalance, "ldam")
    assert counts[0] == n
    assert counts[-1] <= n / imbalance * (1 + 1e-9)
    assert counts[-1] > n / imbalance - 1


@given(st.integers(1, 6000), st.integers(2, 12), st.integers(1, 300), RULE)
def test_counts_are_the_exact_ones(n, classes, imbalance, rule):
    """Fails if a count hung on the last bit of a power: 49 * 49**-1 comes out below 1. Checked in whole numbers."""
    imbalance, steps = min(imbalance, n), classes - 1
    counts = tail_counts([n] * classes, imbalance, rule)
    for rank in range(1, classes):
        start, factor = (n, imbalance**rank) if rule == "ldam" else (counts[rank - 1], imbalance)
        k = counts[rank]  # the largest whole number with k <= start * factor ** (-1 / steps)
        assert k**steps * factor <= start**steps < (k + 1) ** steps * factor


def test_a_whole_number_is_not_rounded_down():
    """Fails if the smallest class vanished at the imbalance that leaves it exactly one image."""
    for n in range(2, 1500):
        assert tail_counts([n, n], n, "ldam") == tail_counts([n, n], n, "climbq") == [n, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("imbalance", [0.99, 0, -5, float("nan"), float("-inf")])
def test_an_imbalance_below_one_is_refused(imbalance, rule):
    """Fails if a ratio written upside down gave a list."""
    with pytest.raises(UserError, match=rf"imbalance={imbalance:g} is below 1") as error:
        tail_counts([100] * 4, imbalance, rule)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("imbalance", [501, 1e6, float("inf")])
def test_an_imbalance_that_empties_a_class_names_the_largest_that_does_not(imbalance):
    """Fails if a class vanished under the rule that promises all of them, or the way out did not work."""
    with pytest.raises(UserError, match=r"without a training image.*imbalance=500 or less"):
        tail_counts([500] * 100, imbalance, "ldam")
    assert min(tail_counts([500] * 100, 500, "ldam")) == 1
    assert min(tail_counts([500] * 100, imbalance, "climbq")) == 0


def test_classes_without_images_are_no_fault_of_the_list():
    """Fails if a class of which nothing is there stopped the list, or got images."""
    assert tail_counts([0, 100, 100], 10, "ldam") == [0, 100, 31]
    assert tail_counts([0, 0], 10, "ldam") == [0, 0]
    assert tail_counts([], 10, "climbq") == []
    assert tail_counts([7], 3, "ldam") == tail_counts([7], 3, "climbq") == [7]


def test_an_unknown_rule_names_the_nearest():
    """Fails if a misspelt rule fell back on another one."""
    with pytest.raises(UserError, match="no list rule 'climb'; did you mean 'climbq'"):
        tail_counts([100] * 4, 10, "climb")


@given(st.lists(st.integers(0, 300)))
def test_shots_are_a_partition_with_the_right_edges(counts):
    """Fails if a class were in no group or in two, or 100 and 20 were on the wrong side."""
    groups = shots(counts)
    assert list(groups) == ["many", "medium", "few"]
    assert sorted(c for group in groups.values() for c in group) == list(range(len(counts)))
    assert all(counts[c] > 100 for c in groups["many"])
    assert all(20 <= counts[c] <= 100 for c in groups["medium"])
    assert all(counts[c] < 20 for c in groups["few"])
