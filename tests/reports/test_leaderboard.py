"""Runs -> cells -> tables: the arithmetic, and what must never be averaged or passed over."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qatbench.reports.leaderboard import Mean, as_dicts, leaderboard

SAME = (0.9, 0.9, 0.9)


def cell(table, name):
    return next(c for c in table.cells if c.name == name)


def flat(accuracy):
    return (accuracy, accuracy, accuracy)


def test_mean_and_sample_deviation_by_hand(store, record, write):
    """Fails if the deviation were the population's, or a domain's numbers landed in another column."""
    for seed, accuracies in enumerate([(0.90, 0.80, 0.70), (0.94, 0.80, 0.72), (0.98, 0.83, 0.74)]):
        write(store, record("lsq", "w4a4", seed, accuracies))
    (table,) = leaderboard(store)
    lsq = cell(table, "lsq w4a4")
    assert lsq.domains["scanned"] == Mean(pytest.approx(0.94), pytest.approx(0.04), 3)
    assert lsq.domains["blended"] == Mean(pytest.approx(0.81), pytest.approx(math.sqrt(0.0003)), 3)
    # means over domains: 0.80, 0.82, 0.85
    assert lsq.accuracy == Mean(pytest.approx(2.47 / 3), pytest.approx(0.0251661147842358), 3)
    assert lsq.worst == "fonts"
    assert lsq.seeds == (0, 1, 2)
    assert table.domains == ("scanned", "blended", "fonts")


def test_cells_are_grouped_by_bits_and_sorted_by_accuracy(store, record, write):
    """Fails if the best method of its bits did not stand first, or bits were mixed."""
    for method, bits, accuracy in [
        ("ptq", "w2a2", 0.1),
        ("lsq", "w2a2", 0.8),
        ("pact", "w4a4", 0.93),
        ("lsq", "w4a4", 0.95),
        ("fp32", "w32a32", 0.97),
    ]:
        write(store, record(method, bits, 0, flat(accuracy)))
    (table,) = leaderboard(store)
    assert [c.name for c in table.cells] == ["fp32 w32a32", "lsq w4a4", "pact w4a4", "lsq w2a2", "ptq w2a2"]
    assert [c.best for c in table.cells] == [False, True, False, True, False]  # nothing to be best of among one


def test_gap_to_float_is_paired_by_seed(store, record, write):
    """Fails if the distance to float compared the means of different seeds."""
    for seed, accuracy in enumerate([0.90, 0.98]):
        write(store, record("fp32", "w32a32", seed, flat(accuracy)))
    write(store, record("lsq", "w4a4", 1, flat(0.96)))
    write(store, record("lsq", "w4a4", 2, flat(0.50)))  # of this seed there is no float run
    (table,) = leaderboard(store)
    assert cell(table, "lsq w4a4").gap == Mean(pytest.approx(-0.02), None, 1)
    assert any("Not all cells have the same seeds" in note and "lsq w4a4: 1, 2" in note for note in table.notes)


def test_one_seed_is_said_to_judge_nothing(store, record, write):
    """Fails if a table of single seeds looked as sure as one of many."""
    write(store, record("lsq", "w4a4", 0, flat(0.95)))
    write(store, record("pact", "w4a4", 0, flat(0.949)))
    (table,) = leaderboard(store)
    assert cell(table, "lsq w4a4").accuracy == Mean(pytest.approx(0.95), None, 1)
    assert not any(c.tied for c in table.cells)
    assert any(note.startswith("n=1 for every cell") for note in table.notes)


def test_what_is_within_a_deviation_of_the_best_is_marked(store, record, write):
    """Fails if a difference inside the noise were shown as a win, or one outside it as a tie."""
    for seed, shift in enumerate([-0.01, 0.0, 0.01]):  # sd 0.01
        write(store, record("lsq", "w4a4", seed, flat(0.95 + shift)))
        write(store, record("pact", "w4a4", seed, flat(0.941 + shift)))
        write(store, record("dorefa", "w4a4", seed, flat(0.939 + shift)))
    (table,) = leaderboard(store)
    assert [(c.method, c.best, c.tied) for c in table.cells] == [
        ("lsq", True, False),
        ("pact", False, True),
        ("dorefa", False, False),
    ]


def test_failed_skipped_and_missing_seeds_are_counted_and_named(store, record, write, write_suite):
    """Fails if a method that diverges on some seeds were shown as if it had succeeded on all."""
    runs = [
        record("lsq", "w2a2", 0, SAME),
        record("lsq", "w2a2", 1, None),
        record("fqat", "w2a2", 0, None, status="skipped", reason="needs three bits"),
    ]
    for run in runs:
        write(store, run)
    write_suite(store, "small", runs, [0, 1, 2], absent=("ab12" * 4,))
    (table,) = leaderboard(store, "small")
    lsq, fqat = cell(table, "lsq w2a2"), cell(table, "fqat w2a2")
    assert (lsq.seeds, lsq.expected, lsq.failed, lsq.absent) == ((0,), 3, 1, (2,))
    assert (fqat.accuracy, fqat.expected, fqat.skipped, fqat.absent) == (None, 3, 1, (1, 2))
    named = {(p.cell, p.seed, p.status): p.reason for p in table.problems}
    assert named["lsq w2a2", 1, "failed"] == "diverged: step of layer1.conv1 is not finite (log: log.txt)"
    assert named["fqat w2a2", 0, "skipped"] == "needs three bits"
    assert ("lsq w2a2", 2, "missing") in named


def test_a_run_that_failed_early_stays_in_its_cell(store, record, write):
    """Fails if a run without provenance stood in a table of its own, and its cell seemed to have no failure."""
    write(store, record("lsq", "w4a4", 0, SAME))
    bare = record("lsq", "w4a4", 1, None)
    write(store, bare | {"provenance": {}, "time": {}})
    (table,) = leaderboard(store)
    assert [(c.name, len(c.seeds), c.failed) for c in table.cells] == [("lsq w4a4", 1, 1)]


def test_labels_name_what_differs(store, record, write):
    """Fails if two settings of a method were averaged, or could not be told apart."""
    write(store, record("lsq", "w4a4", 0, SAME))
    write(store, record("lsq", "w4a4", 0, SAME, spec={"lr": 0.02}))
    write(store, record("dorefa", "w4a4", 0, SAME, spec={"params": {"dorefa": {"clip": 1, "same": 0}}}))
    write(store, record("dorefa", "w4a4", 0, SAME, spec={"params": {"dorefa": {"clip": 2, "same": 0}}}))
    write(store, record("pact", "w4a4", 0, SAME))
    write(store, record("ptq", "w4a4", 0, SAME))
    write(store, record("ptq", "w4a4", 0, SAME, spec={"new_field": 1}))
    (table,) = leaderboard(store)
    names = {"lsq (lr=0.01)", "lsq (lr=0.02)", "dorefa (clip=1)", "dorefa (clip=2)", "pact"}
    names |= {"ptq (new_field=unset)", "ptq (new_field=1)"}
    assert {c.label for c in table.cells} == names
    assert "lr 0.02: lsq (lr=0.02)" in table.recipe


def test_numbers_of_other_code_are_another_row(store, record, write):
    """Fails if runs of two versions of a method were averaged."""
    old = record("lsq", "w4a4", 0, flat(0.90))
    new = record("lsq", "w4a4", 0, flat(0.94), provenance={"code": {"harness": 1, "lsq": 2, "optdigits": 1}})
    write(store, old)
    write(store, new)
    (table,) = leaderboard(store)
    assert [(c.label, c.accuracy.mean) for c in table.cells] == [
        ("lsq (version of lsq=2)", pytest.approx(0.94)),
        ("lsq (version of lsq=1)", pytest.approx(0.90)),
    ]


def test_other_data_is_another_table(store, record, write):
    """Fails if numbers on other images, protocols or networks shared a table."""
    write(store, record("lsq", "w4a4", 0, SAME))
    write(store, record("lsq", "w4a4", 0, SAME, spec={"network": "resnet20"}))
    write(store, record("lsq", "w4a4", 0, SAME, spec={"data_params": {"limit": 500}}))
    changed = record("lsq", "w4a4", 0, SAME, provenance={"data": "beef" * 16})
    write(store, changed)
    assert sorted(t.title for t in leaderboard(store)) == [
        "optdigits · mdl · resnet20",
        "optdigits · mdl · resnet8 (limit=500)",
        "optdigits · mdl · resnet8 [data beefbeef]",
        "optdigits · mdl · resnet8 [data da7ada7a]",
    ]
    assert all(len(t.cells) == 1 for t in leaderboard(store))


def test_metrics_that_are_absent_are_not_zero(store, record, write):
    """Fails if a null metric crashed the report, counted as zero, or shrank n in silence."""
    write(store, record("lsq", "w4a4", 0, (0.9, 0.8, None)))
    write(store, record("lsq", "w4a4", 1, (None, None, None)))
    write(store, record("pact", "w4a4", 0, SAME, metrics={"test/acc": None}, cost={"bops": None, "levels_max": None}))
    (table,) = leaderboard(store)
    lsq, pact = cell(table, "lsq w4a4"), cell(table, "pact w4a4")
    assert lsq.accuracy == Mean(pytest.approx(0.85), None, 1)
    assert lsq.domains["fonts"] is None
    assert len(lsq.seeds) == 2
    assert any("only 1 hold a test accuracy" in note for note in table.notes)
    assert (pact.accuracy, pact.cost["bops"], pact.levels) == (None, None, None)
    assert {p.reason for p in table.problems} == {"its record holds no test accuracy"}


def test_what_was_measured_beside_accuracy_by_hand(store, record, write):
    """Fails if a group's accuracy, or the calibration error, were another's, or a run without it counted as 0."""
    for seed, few in enumerate([0.2, 0.4, None]):
        metrics = {"test/acc_few": few, "test/bacc": 0.5, "test/ece": 0.1}
        write(store, record("lsq", "w4a4", seed, SAME, metrics=metrics))
    write(store, record("pact", "w4a4", 0, SAME))
    (table,) = leaderboard(store)
    assert table.measures == ("bacc", "acc_few", "ece")
    few = Mean(pytest.approx(0.3), pytest.approx(math.sqrt(0.02)), 2)
    lsq, pact = cell(table, "lsq w4a4").measures, cell(table, "pact w4a4").measures
    assert (lsq["acc_few"], lsq["bacc"].mean, lsq["ece"].n) == (few, pytest.approx(0.5), 3)
    assert set(pact.values()) == {None}


def test_records_without_further_metrics_have_none(store, record, write):
    """Fails if records of before these metrics were measured could not be reported, or seemed to have them."""
    write(store, record("lsq", "w4a4", 0, SAME))
    (table,) = leaderboard(store)
    assert (table.measures, table.classes, table.class_counts) == ((), (), ())
    assert cell(table, "lsq w4a4").recalls == ()


CLASSES = {"classes": ["cat", "dog", "owl"], "class_counts": [50, 500, 5]}


def test_recall_of_each_class_by_hand(store, record, write):
    """Fails if classes were mixed up, or one that a domain lacks were counted as never right."""
    rows = [
        {"scanned": [1.0, 0.5, None], "fonts": [0.0, 0.5, None]},
        {"scanned": [0.5, 0.5, None], "fonts": [None] * 3},
    ]
    for seed, per_class in enumerate(rows):
        write(store, record("lsq", "w4a4", seed, SAME, provenance=CLASSES) | {"per_class": per_class})
    (table,) = leaderboard(store)
    assert (table.classes, table.class_counts) == (("cat", "dog", "owl"), (50, 500, 5))
    assert cell(table, "lsq w4a4").recalls == (pytest.approx(0.5), pytest.approx(0.5), None)


def test_recall_under_a_held_out_domain_is_of_that_domain(store, record, write):
    """Fails if the page mixed the domains that training saw into the classes of the one that it did not."""
    per_class = {"fonts": [0.1, 0.2, 0.3], "scanned": [0.9, 0.9, 0.9]}
    run = record("lsq", "w4a4", 0, SAME, spec={"protocol": "lodo:fonts"}, provenance=CLASSES)
    write(store, run | {"per_class": per_class})
    assert cell(leaderboard(store)[0], "lsq w4a4").recalls == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("per_class", "classes"),
    [
        ([1, 2], CLASSES),
        ({"fonts": 3}, CLASSES),
        ({"fonts": [0.5, 0.5]}, CLASSES),
        ({"fonts": ["a", None, True]}, CLASSES),
        ({"fonts": [0.5] * 3}, {"classes": 3}),
        ({"fonts": [0.5] * 3}, {}),
    ],
)
def test_recalls_of_an_odd_shape_are_passed_over(store, record, write, per_class, classes):
    """Fails if a record whose classes do not fit its names took the report down."""
    write(store, record("lsq", "w4a4", 0, SAME, provenance=classes) | {"per_class": per_class})
    (table,) = leaderboard(store)
    assert table.classes == ()
    assert json.dumps(as_dicts([table]), allow_nan=False)


def test_too_many_codes_are_shouted(store, record, write):
    """Fails if "2-bit" that was 5 codes passed as two bits."""
    write(store, record("lsq", "w2a2", 0, SAME, cost={"levels_max": {"layer1.conv1": [5, 4]}}))
    write(store, record("pact", "w2a2", 0, SAME))
    (table,) = leaderboard(store)
    assert cell(table, "lsq w2a2").levels is False
    assert cell(table, "pact w2a2").levels is True
    assert any("layer1.conv1 (weights: 5 codes > 2^2" in note for note in table.notes)


def test_a_reconstruction_says_so_in_a_chain_too(store, record, write):
    """Fails if a guess at a paper were shown as the paper."""
    write(store, record("fqat", "w4a4", 0, SAME))
    write(store, record("fqat+lsq", "w4a4", 0, SAME))
    (table,) = leaderboard(store)
    assert {c.method: c.fidelity for c in table.cells} == {
        "fqat": "reconstruction",
        "fqat+lsq": "fqat: reconstruction, lsq: paper",
    }


def test_unlike_splits_are_noted(store, record, write):
    """Fails if methods that saw other images for the same seed were compared without a word."""
    write(store, record("lsq", "w4a4", 0, SAME))
    write(store, record("pact", "w4a4", 0, SAME, provenance={"split": "other"}))
    (table,) = leaderboard(store)
    assert "Seed 0: the runs did not all use the same split of the data." in table.notes


def test_a_record_of_odd_content_is_no_crash(store, record, write):
    """Fails if a valid record with sections of unexpected shapes took the whole report down."""
    odd = record("lsq", "w4a4", 0, SAME)
    odd["cost"] = {"levels_max": [1], "plan": {"a": 3}, "bops": "many"}
    odd["time"] = {"step_ms": True, "started": "yesterday"}
    odd["provenance"] = {"code": "abc", "fidelity": "paper", "generated": 3}
    write(store, odd)
    write(
        store,
        record("lsq", "w4a4", 1, SAME) | {"spec": {"method": 3, "params": {"x": 1}, "data_params": [1], "bits": 4}},
    )
    dicts = as_dicts(leaderboard(store))
    assert len(dicts) == 2
    json.dumps(dicts, allow_nan=False)


def test_json_form_holds_the_numbers(store, record, write):
    """Fails if --json gave scripts other numbers than the tables."""
    for seed, accuracy in enumerate([0.9, 0.92]):
        write(store, record("lsq", "w4a4", seed, flat(accuracy)))
    (table,) = as_dicts(leaderboard(store))
    assert table["title"] == "optdigits · mdl · resnet8"
    (lsq,) = table["cells"]
    assert lsq["accuracy"] == {"mean": pytest.approx(0.91), "sd": pytest.approx(math.sqrt(0.0002)), "n": 2}


NUMBERS = st.floats(0, 1) | st.none() | st.just(math.nan) | st.just(math.inf)


@given(st.lists(NUMBERS, max_size=8), st.randoms())
def test_means_ignore_order_and_gaps(values, random):
    """Fails if the order of seeds, or a seed without a number, moved a mean or its deviation."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    mean = Mean.of(values)
    assert (mean is None) == (not known)
    if mean is None:
        return
    assert mean.n == len(known)
    assert min(known) - 1e-12 <= mean.mean <= max(known) + 1e-12
    assert (mean.sd is None) == (len(known) == 1)
    if mean.sd is not None:
        by_hand = math.sqrt(sum((v - mean.mean) ** 2 for v in known) / (len(known) - 1))
        assert mean.sd == pytest.approx(by_hand, abs=1e-9)
    shuffled = list(values)
    random.shuffle(shuffled)
    assert Mean.of(shuffled) == mean
