"""The store as a table of runs."""

from __future__ import annotations

import json

import pytest
from qatbench.bench.errors import UserError
from qatbench.reports.frame import one_line, results, select


def test_a_run_is_a_row(store, record, write):
    """Fails if a run's settings, metrics, cost or origin were lost on the way to the frame that users analyse."""
    write(store, record("lsq", "w4a4", 0, (0.99, 0.95, 0.91), spec={"params": {"lsq": {"scale": 0.1}}}))
    frame = results(store)
    row = frame.iloc[0]
    assert len(frame) == 1
    assert row["method"] == "lsq"
    assert row["seed"] == 0
    assert json.loads(row["params"]) == {"lsq": {"scale": 0.1}}
    assert row["test/acc/blended"] == 0.95
    assert row["cost/size_bytes"] == 78_000 * 4.13 / 8
    assert row["time/step_ms"] == 18.2
    assert row["provenance/git"] == "0123456789abcdef"


def test_absent_runs_of_a_suite_are_missing(store, record, write, write_suite):
    """Fails if a suite's report hid the runs that were never made, or took in runs of another suite."""
    own, other = record("lsq", "w4a4", 0, (0.9, 0.9, 0.9)), record("pact", "w4a4", 0, (0.8, 0.8, 0.8))
    write(store, own)
    write(store, other)
    write_suite(store, "small", [own], [0], absent=("ab12" * 4,))
    frame = results(store, "small")
    assert dict(zip(frame["run_id"], frame["status"], strict=True)) == {own["run_id"]: "done", "ab12" * 4: "missing"}


def test_a_broken_record_of_a_suite_is_missing_and_named(store, record, write, write_suite):
    """Fails if a truncated record crashed the report or was passed over in silence."""
    good, bad = record("lsq", "w4a4", 0, (0.9, 0.9, 0.9)), record("lsq", "w4a4", 1, (0.9, 0.9, 0.9))
    write(store, good)
    (write(store, bad) / "result.json").write_text('{"schema": 1, "run')
    write_suite(store, "small", [good, bad], [0, 1])
    selection = select(store, "small")
    assert list(selection.missing) == [bad["run_id"]]
    assert "set aside" in selection.missing[bad["run_id"]]
    assert list(selection.aside) == [f"{bad['run_id']}/result.json"]


def test_an_unknown_suite_names_the_nearest(store, record, write, write_suite):
    """Fails if a misspelt suite gave an empty report instead of a hint."""
    write(store, run := record("lsq", "w4a4", 0, (0.9, 0.9, 0.9)))
    write_suite(store, "quickstart", [run], [0])
    with pytest.raises(UserError, match=r"no suite 'quikstart'.*did you mean 'quickstart'"):
        select(store, "quikstart")


def test_an_empty_store_says_how_to_make_results(store, write_suite):
    """Fails if an empty or absent store gave a traceback or an empty page."""
    with pytest.raises(UserError, match="make some with: qatbench quickstart") as error:
        results(store)
    assert "\n" not in str(error.value)
    write_suite(store, "digits", [], [0], absent=("ab12" * 4,))
    with pytest.raises(UserError, match="make some with: qatbench sweep digits"):
        results(store, "digits")


def test_an_unreadable_suite_says_how_to_mend_it(store, write_suite):
    """Fails if a truncated manifest ended in a traceback."""
    write_suite(store, "digits", [], [0])
    (store.root / "suites" / "digits.json").write_text("{")
    with pytest.raises(UserError, match="qatbench sweep digits"):
        select(store, "digits")


def test_reasons_become_one_line():
    """Fails if a traceback or a terminal's colour codes in a reason could break a table."""
    assert one_line("a\n\tb\x1b[31mred\x00") == "a b[31mred"
