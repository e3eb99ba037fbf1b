from __future__ import annotations

import pytest
from qatbench.bench.chain import build, members
from qatbench.bench.errors import UserError
from qatbench.bench.method import Wrapper
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.testing import check_pair

METHODS = [p.cls for p in plugins("methods") if p.cls is not None and p.origin.startswith(str(ROOT))]
WRAPPERS = [cls for cls in METHODS if issubclass(cls, Wrapper)]


def pairs() -> tuple[list[str], list[str]]:
    """Every wrapper around every method and every other wrapper over ``lsq``: those that make sense, and those that are refused.

    A wrapper over ``lsq`` has the whole suite in a file of its own, so that pair is left out.
    """
    good, refused = [], []
    for outer in WRAPPERS:
        for inner in METHODS:
            text = f"{outer.name}+{inner.name}" + ("+lsq" if issubclass(inner, Wrapper) else "")
            if inner.name == "lsq" or inner is outer:
                continue
            try:
                members(text)
            except UserError:
                refused.append(text)
            else:
                good.append(text)
    return good, refused


GOOD, _REFUSED = pairs()


@pytest.mark.parametrize("text", [t for t in GOOD if build(t, {}).trains])
def test_pair(text: str) -> None:
    """A chain that a suite may ask for would crash, resume elsewhere than it stopped, or not keep its bits."""
    check_pair(text)


@pytest.mark.parametrize("text", [t for t in GOOD if not build(t, {}).trains])
def test_pair_without_training_is_skipped_with_a_reason(text: str) -> None:
    """A sweep would run a wrapper that has nothing to add to."""
    reason = build(text, {}).skip(None)  # type: ignore[arg-type]
    assert reason is not None
    assert "does not train" in reason


def test_there_are_pairs() -> None:
    """The tests above would be run for nothing."""
    assert {"kd+pact", "kd+dorefa", "kd+fp32", "kd+ptq"} <= set(GOOD)
