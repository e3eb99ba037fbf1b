"""From a suite to its runs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.spec import SuiteSpec
from qatbench.sweeps.expand import expand, labels
from qatbench.sweeps.suite import load_suite, suite_names

METHODS = ["fp32", "ptq", "lsq", "dorefa", "pact", "kd+lsq"]
BITS = ["w4a4", "w2a2", "w3a8"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def some(values):
    return st.lists(st.sampled_from(values), min_size=1, max_size=2 * len(values))


@settings(max_examples=25, deadline=None)
@given(some(METHODS), some(BITS), some([0, 1, 2]), st.randoms())
def test_runs_do_not_depend_on_how_the_suite_is_written(cache, methods, bits, seeds, random):
    """A suite with its lists in another order, or an entry twice, would train everything again, or fp32 once for each width."""
    runs = expand(SuiteSpec(name="s", method=methods, bits=bits, seed=seeds), data_root=None, cache=cache)
    ids = [r.run_id for r in runs]
    floats = "fp32" in methods
    assert len(set(ids)) == len(ids) == len(set(seeds)) * (len({*methods} - {"fp32"}) * len({*bits}) + floats)
    assert len({r.float_id for r in runs}) == len(set(seeds)), "one float network a seed"
    assert len(set(labels([r.spec for r in runs]))) == len(ids), "two runs look the same"
    for values in (methods, bits, seeds):
        random.shuffle(values)
    again = expand(SuiteSpec(name="t", method=methods, bits=bits, seed=seeds), data_root=None, cache=cache)
    assert {r.run_id for r in again} == set(ids)


def test_order_is_that_of_the_suite(cache):
    """The table of a dry run, and the order in which results come, would change from launch to launch."""
    asked = SuiteSpec(name="s", method=["lsq", "fp32"], bits=["w2a2", "w4a4"], seed=[1, 0])
    runs = expand(asked, data_root=None, cache=cache)
    assert labels([r.spec for r in runs]) == [
        "lsq w2a2 s1", "lsq w2a2 s0", "lsq w4a4 s1", "lsq w4a4 s0", "fp32 w32a32 s1", "fp32 w32a32 s0",
    ]  # fmt: skip


def test_labels_name_what_differs(cache):
    """Two networks of one suite could not be told apart on the terminal."""
    runs = expand(SuiteSpec(name="s", method="lsq", network=["resnet8", "resnet20"]), data_root=None, cache=cache)
    assert labels([r.spec for r in runs]) == ["lsq w4a4 resnet8 s0", "lsq w4a4 resnet20 s0"]
    tails = SuiteSpec(
        name="s", method="lsq", data_params=[{"imbalance": 2.0, "limit": 90}, {"imbalance": 5.0, "limit": 90}]
    )
    runs = expand(tails, data_root=None, cache=cache)
    assert labels([r.spec for r in runs]) == ["lsq w4a4 imbalance=2.0 s0", "lsq w4a4 imbalance=5.0 s0"]
    assert {r.spec.protocol for r in runs} == {"longtail"}
    settings = SuiteSpec(
        name="s", method="kd+lsq", params=[{"kd": {"weight": 0.1}}, {"kd": {"weight": 0.2, "temperature": 4}}]
    )
    runs = expand(settings, data_root=None, cache=cache)
    assert labels([r.spec for r in runs]) == ["kd+lsq w4a4 weight=0.1 s0", "kd+lsq w4a4 weight=0.2 s0"]


def test_suites_that_come_along(cache):
    """The suites of the main job would lose a cell, or grow."""
    assert {"quickstart", "digits"} <= set(suite_names())
    quick = load_suite("quickstart")
    assert (quick.network, quick.epochs, quick.float_epochs, quick.batch) == (("resnet8",), 4, 10, 64)
    assert len(expand(quick, data_root=None, cache=cache)) == 9
    digits = load_suite("digits")
    assert (digits.data, digits.data_params, digits.seed) == (("digits",), ({"limit": 5000},), (0, 1, 2))
    assert len(digits.cells()) == 6 * 2 * 3


def test_settings_reach_what_a_wrapper_brings_along(cache):
    """`params: {lsq: ...}` of a suite with sam, which is sam+lsq, would be left out in silence."""
    suite = SuiteSpec(name="s", method="sam", params={"lsq": {"nothing": 1}})
    with pytest.raises(UserError, match="params of lsq: unknown key 'nothing'"):
        expand(suite, data_root=None, cache=cache)
    with pytest.raises(UserError, match="'lqs' is no method of it; did you mean 'lsq'"):
        expand(SuiteSpec(name="s", method="sam", params={"lqs": {}}), data_root=None, cache=cache)
