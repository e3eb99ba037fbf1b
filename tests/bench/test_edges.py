"""First and last layer: what their words mean, and that no word is lost between a request and the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qatbench.bench import registry
from qatbench.bench.edges import edge_bits, edge_words, edges_of_run, pair
from qatbench.bench.quant import Bits, Budget
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import run
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from qatbench.bench.testing import ready

SQUARES = Path(__file__).parents[1] / "squares.py"


@pytest.mark.parametrize(
    ("policy", "bits", "edge"),
    [
        ("8bit", (4, 4), (8, 8)), ("8bit", (2, 32), (8, 32)),
        ("8bit", (32, 2), (32, 8)), ("fp", (4, 4), (32, 32)), ("fp", (4, 32), (32, 32)),
        ("same", (3, 5), (3, 5)), ("same", (2, 32), (2, 32)),
    ],
)  # fmt: skip
def test_edge_bits(policy: str, bits: tuple[int, int], edge: tuple[int, int]) -> None:
    """The first and the last layer would have other bits than the run's ``first_last`` says."""
    assert edge_bits(policy, Bits(*bits)) == Bits(*edge)


def test_edge_bits_under_a_budget() -> None:
    """First and last layer would get the average as their width, or a share of it that nobody gave them."""
    assert edge_bits("8bit", Budget(2.81, 3)) == Bits(8, 8)
    assert edge_bits("fp", Budget(2.81, 3)) == Bits(32, 32)
    with pytest.raises(ValueError, match="share the budget"):
        edge_bits("same", Budget(2.81, 3))


@pytest.mark.parametrize(("word", "meant"), [("8bits", "8bit"), ("fp32", "fp"), ("sane", "same"), ("4bit", "8bit")])
def test_an_unknown_word_is_refused_with_the_nearest(word: str, meant: str) -> None:
    """A misspelt policy would be taken for ``same``: two bits where eight were meant."""
    for use in (
        pair,
        lambda w: pair(("fp", w)),
        lambda w: edge_bits(w, Bits(2, 2)),
        lambda w: edges_of_run("native", w),
    ):
        with pytest.raises(ValueError, match=f"first_last='{word}' is unknown; did you mean '{meant}'"):
            use(word)


@pytest.mark.parametrize("policy", [None, 8, (), ("fp",), ("fp", "fp", "fp"), {"fp": "fp"}])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    """A plugin's slip would give the edges whatever falls out of it."""
    with pytest.raises(ValueError, match="neither a word nor two; known: 8bit, fp, same"):
        pair(policy)


def test_native_is_the_methods_own_and_all_else_the_runs() -> None:
    """A suite's one policy for all would not hold for a method with one of its own; or the other way round."""
    assert edges_of_run("native", ("same", "fp")) == ("same", "fp")
    assert edges_of_run("native", "fp") == ("fp", "fp")
    assert edges_of_run("8bit", ("same", "fp")) == ("8bit", "8bit")


def test_which_layer_is_first_and_which_last() -> None:
    """The policies of first and last layer would change places, or go to an inner layer or a head."""
    found = [
        ("a", "layer", True),
        ("n", "norm", True),
        ("b", "layer", False),
        ("c", "layer", True),
        ("c", "head", True),
    ]
    sites: Any = [SimpleNamespace(name=name, kind=kind, edge=edge) for name, kind, edge in found]
    assert edge_words(sites, ("same", "fp")) == {"a": "same", "c": "fp"}
    assert edge_words(sites[:1], ("same", "fp")) == {"a": "fp"}
    assert edge_words([], ("same", "fp")) == {}


PLUGIN = """
from qatbench.methods.lsq import LSQ
from qatbench.bench.quant import Bits


class Mixed(LSQ):
    name = "mixed"
    first_last = ("8bit", "fp")


class Looks(LSQ):
    name = "looks"

    def plan(self, sites, bits, probe):
        plan = super().plan(sites, bits, probe)
        last = [s.name for s in sites if s.kind == "layer"][-1]
        return plan | {last: Bits(32, 32)} if self.spec.first_last == "native" else plan
"""


@pytest.fixture
def train(tmp_path: Path, plug: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """The record of a short run at two bits that went through `resolve`."""
    plug(PLUGIN)
    registry.load_file(SQUARES)
    store = Store(tmp_path / "runs")

    def go(method: str, first_last: str) -> dict[str, Any]:
        tiny = {"data": "squares", "bits": "w2a2", "epochs": 1, "float_epochs": 1, "batch": 32, "calibration": 32}
        found = resolve(RunSpec(method=method, first_last=first_last, **tiny), data_root=None, cache=store.cache)  # type: ignore[arg-type]
        return run(found, store, wandb=False)

    return go


@pytest.mark.parametrize(
    ("method", "first", "last"),
    [
        ("alignq", (2, 2), (32, 32)), ("climbq", (2, 2), (32, 32)), ("ldam-drw+lsq", (8, 8), (32, 32)),
        ("sam+ldam-drw+lsq", (8, 8), (32, 32)), ("ldam-drw+alignq", (2, 2), (32, 32)), ("kd+climbq", (2, 2), (32, 32)),
        ("ldam-drw+pact", (32, 32), (32, 32)), ("fqat+alignq", (32, 32), (32, 32)), ("qt-dog+alignq", (2, 32), (32, 32)),
        ("mixed", (8, 8), (32, 32)), ("kd+mixed", (8, 8), (32, 32)), ("looks", (8, 8), (32, 32)),
    ],
)  # fmt: skip
def test_native_reaches_the_plan_the_network_and_the_record(
    method: str, first: tuple, last: tuple, train: Callable[..., dict[str, Any]]
) -> None:
    """A float classifier would be promised, and be quantized as soon as the request has gone through `resolve`."""
    record = train(method, "native")
    assert record["status"] == "done", record["reason"]
    widths = list(record["cost"]["plan"].values())
    assert (tuple(widths[0]), tuple(widths[-1])) == (first, last)
    assert record["cost"]["avg_bits_weight_inner"] == 2
    head = list(record["cost"]["plan"])[-1]
    assert head not in record["cost"]["levels_max"]
    assert record["spec"]["first_last"] in ("native", "fp")


def test_a_budget_with_two_policies() -> None:
    """A first layer that shares the budget would have no bits, or the float last one a share."""
    method, _ = ready("alignq", bits="avg3", first_last="native")
    layers = [s for s in method.sites if s.kind == "layer"]
    spent = sum(s.weights * method.bit_plan[s.name].w for s in layers[:-1])
    assert spent <= 3 * sum(s.weights for s in layers[:-1])
    assert method.bit_plan[layers[-1].name] == Bits(32, 32)


def test_a_policy_spelt_out_is_another_run_where_it_means_something_else(train: Callable[..., dict[str, Any]]) -> None:
    """The number of a quantized classifier would stand where a float one is meant."""
    native, same = train("alignq", "native"), train("alignq", "same")
    assert native["run_id"] != same["run_id"]
    assert list(same["cost"]["plan"].values())[-1] == [2, 2]
    assert native["cost"]["size_bytes"] > same["cost"]["size_bytes"]
