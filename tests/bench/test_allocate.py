from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.quant.allocate import allocate, closed_form, frontier, greedy, ideal_bits, uniform

SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
Instance = tuple[dict[str, dict[int, float]], dict[str, int]]
SOLVERS = [allocate, greedy, closed_form, uniform]


def instance(seed: int, layers: int = 12, widths: tuple[int, ...] = (2, 3, 4)) -> Instance:
    """Harm that falls by about 4 a bit, as that of a quantizer does, for layers of very different size and curvature."""
    rng = random.Random(seed)
    sizes = {f"layer{k}": 64 * rng.randint(1, 300) for k in range(layers)}
    curvature = {name: rng.lognormvariate(0, 1.5) for name in sizes}
    costs = {
        name: {b: curvature[name] * sizes[name] * 4.0**-b * rng.uniform(0.8, 1.25) for b in widths} for name in sizes
    }
    return costs, sizes


def smooth(seed: int, layers: int = 12) -> tuple[Instance, dict[str, float]]:
    """The same without noise, ``t n 4^-b``, and the curvatures t."""
    rng = random.Random(seed)
    sizes = {f"layer{k}": 64 * rng.randint(1, 300) for k in range(layers)}
    traces = {name: rng.lognormvariate(0, 1.5) for name in sizes}
    return ({n: {b: traces[n] * sizes[n] * 4.0**-b for b in (2, 3, 4)} for n in sizes}, sizes), traces


def total(costs: dict[str, dict[int, float]], widths: dict[str, int]) -> float:
    return sum(costs[name][width] for name, width in widths.items())


def average(sizes: dict[str, int], widths: dict[str, int]) -> float:
    return sum(sizes[name] * width for name, width in widths.items()) / sum(sizes.values())


def every_plan(costs: dict[str, dict[int, float]]) -> list[dict[str, int]]:
    return [dict(zip(costs, choice, strict=True)) for choice in itertools.product(*costs.values())]


@pytest.mark.parametrize("solver", SOLVERS)
@given(st.integers(0, 10**6), st.floats(2, 4))
@SMALL
def test_adq_8_average_is_within_the_budget(solver: Callable, seed: int, budget: float) -> None:
    """A table would compare 2.9 bits with 2.81."""
    costs, sizes = instance(seed)
    widths = solver(costs, sizes, budget)
    assert list(widths) == list(costs)
    assert all(width in costs[name] for name, width in widths.items())
    assert average(sizes, widths) <= budget


@pytest.mark.parametrize("solver", SOLVERS)
def test_adq_8_smallest_and_largest_budget(solver: Callable) -> None:
    """The ends of the range would be refused, or a layer would keep bits that there are none for."""
    costs, sizes = instance(0)
    assert set(solver(costs, sizes, 2).values()) == {2}
    assert set(solver(costs, sizes, 4.0).values()) == {4}


@given(st.integers(0, 10**6), st.floats(2, 4), st.floats(2, 4))
@SMALL
def test_adq_8_total_harm_falls_with_the_budget(seed: int, one: float, other: float) -> None:
    """More bits would make a network worse."""
    costs, sizes = instance(seed)
    low, high = sorted((one, other))
    assert total(costs, allocate(costs, sizes, high)) <= total(costs, allocate(costs, sizes, low))


@given(st.integers(0, 10**6), st.floats(2, 4), st.sampled_from([2.0**-40, 0.5, 8.0, 2.0**30]))
@SMALL
def test_adq_8_unit_of_the_harm_does_not_matter(seed: int, budget: float, unit: float) -> None:
    """A mean loss and a sum of losses would give two plans."""
    costs, sizes = instance(seed)
    scaled = {name: {b: unit * harm for b, harm in table.items()} for name, table in costs.items()}
    for solver in SOLVERS:
        assert solver(scaled, sizes, budget) == solver(costs, sizes, budget)


def test_adq_8_dp_at_most_greedy_at_most_15_percent_more() -> None:
    """The dynamic program would not find the best plan; or the quick rule would be no rule."""
    ratios = []
    for seed in range(200):
        (costs, sizes), _ = smooth(seed)
        best, quick = (total(costs, solver(costs, sizes, 2.8)) for solver in (allocate, greedy))
        assert best <= quick * (1 + 1e-12)
        ratios.append(quick / best)
    assert max(ratios) <= 1.15
    assert sum(ratios) / len(ratios) <= 1.02
    for seed in range(50):  # harm that is measured need not fall by the same factor with every bit
        costs, sizes = instance(seed)
        best, quick = (total(costs, solver(costs, sizes, 2.8)) for solver in (allocate, greedy))
        assert best <= quick * (1 + 1e-12)


@pytest.mark.parametrize("widths", [(2, 3, 4), (1, 4, 8)])
@given(st.integers(0, 10**6))
@SMALL
def test_adq_11_frontier_holds_what_no_plan_beats(widths: tuple[int, ...], seed: int) -> None:
    """A plan on it would be beaten by another, or a plan that nothing beats would be missing."""
    costs, sizes = instance(seed, 5, widths)
    plans = frontier(costs, sizes)
    points = sorted((sum(sizes[n] * w for n, w in p.items()), total(costs, p)) for p in every_plan(costs))
    expected: list[tuple[int, float]] = []
    for bits, cost in points:
        if not expected or cost < expected[-1][1] * (1 - 1e-12):
            expected.append((bits, cost))
    assert [plan.bits for plan in plans] == [bits for bits, _ in expected]
    assert [plan.cost for plan in plans] == pytest.approx([cost for _, cost in expected])
    for plan in plans:  # the widths are those of the point
        assert sum(sizes[n] * w for n, w in plan.widths.items()) == plan.bits
        assert total(costs, plan.widths) == pytest.approx(plan.cost)


def test_adq_11_frontier_of_a_deep_network() -> None:
    """Pruning would lose plans once there are many layers: a random plan would dominate a point."""
    costs, sizes = instance(3, 40)
    plans = frontier(costs, sizes)
    assert plans[0].widths == dict.fromkeys(costs, 2)
    assert plans[-1].widths == dict.fromkeys(costs, 4)
    assert all(a.bits < b.bits and a.cost > b.cost for a, b in itertools.pairwise(plans))
    rng = random.Random(0)
    for _ in range(500):
        widths = {name: rng.choice((2, 3, 4)) for name in costs}
        bits, cost = sum(sizes[n] * w for n, w in widths.items()), total(costs, widths)
        best = max((plan for plan in plans if plan.bits <= bits), key=lambda plan: plan.bits)
        assert best.cost <= cost


@given(st.integers(0, 10**6))
@SMALL
def test_adq_11_dp_is_the_best_of_all_plans_at_every_budget(seed: int) -> None:
    """What is called exact would not be."""
    costs, sizes = instance(seed, 4)
    plans = every_plan(costs)
    for budget in [2 + k / 20 for k in range(41)]:
        fitting = [total(costs, p) for p in plans if average(sizes, p) <= budget]
        assert total(costs, allocate(costs, sizes, budget)) == pytest.approx(min(fitting))


def test_adq_11_closed_form_before_clipping() -> None:
    """The formula would not be the minimum: four times the curvature must be one bit more, at exactly the budget."""
    (_, sizes), traces = smooth(1)
    bits = ideal_bits(traces, sizes, 2.8)
    weights = sum(sizes.values())
    assert sum(sizes[n] * bits[n] for n in bits) / weights == pytest.approx(2.8, abs=1e-12)
    assert ideal_bits({n: 37.0 * t for n, t in traces.items()}, sizes, 2.8) == pytest.approx(bits)
    for one, other in itertools.pairwise(bits):
        assert bits[one] - bits[other] == pytest.approx(0.5 * math.log2(traces[one] / traces[other]))

    def harm(widths: dict[str, float]) -> float:
        return sum(traces[n] * sizes[n] * 4.0 ** -widths[n] for n in widths)

    rng = random.Random(2)
    for _ in range(100):  # no other real-valued plan of the same average does less harm
        push = {n: rng.gauss(0, 0.3) for n in bits}
        drift = sum(sizes[n] * push[n] for n in push) / weights
        assert harm({n: bits[n] + push[n] - drift for n in bits}) > harm(bits)


def test_adq_11_clipped_closed_form_is_near_the_dp() -> None:
    """The option would cost more than 15 % harm against the exact plan."""
    for seed in range(200):
        (costs, sizes), _ = smooth(seed)
        best, quick = (total(costs, solver(costs, sizes, 2.8)) for solver in (allocate, closed_form))
        assert best * (1 - 1e-12) <= quick <= 1.15 * best


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("budget", [1.99, 4.01, 8.0])
def test_a_budget_out_of_reach_is_refused_with_the_range(solver: Callable, budget: float) -> None:
    """A run would have another average than its name says, or end in an index error."""
    costs, sizes = instance(0)
    with pytest.raises(UserError, match=rf"{budget:g} bits a weight is out of reach.* 2 to 4;"):
        solver(costs, sizes, budget)


@pytest.mark.parametrize("budget", [2.81, 2.1, 3.3])
def test_a_decimal_budget_is_exact(budget: float) -> None:
    """A plan of exactly 2.81 bits would be out by one rounding error of the float 2.81, and the next smaller one be taken."""
    sizes = {"one": round(100 * (budget - 2)), "rest": 100 - round(100 * (budget - 2))}
    costs = {"one": {2: 1.0, 3: 0.0}, "rest": {2: 1.0, 3: 0.9}}
    if budget < 3:
        assert allocate(costs, sizes, budget) == {"one": 3, "rest": 2}
    else:
        costs, sizes = {"one": {3: 1.0, 4: 0.0}, "rest": {3: 1.0, 4: 0.9}}, {"one": 30, "rest": 70}
        assert allocate(costs, sizes, budget) == {"one": 4, "rest": 3}


def test_uniform_is_the_largest_width_within_the_budget() -> None:
    """The ablation against which an allocation is held would have other bits."""
    costs, sizes = instance(0)
    assert set(uniform(costs, sizes, 2.99).values()) == {2}
    assert set(uniform(costs, sizes, 3.0).values()) == {3}


def test_harm_that_is_not_finite_is_refused() -> None:
    """A diverged float network would give some plan, and nobody would know."""
    with pytest.raises(ValueError, match="harm of b is not finite"):
        frontier({"a": {2: 1.0}, "b": {2: math.nan}}, {"a": 1, "b": 1})


@pytest.mark.parametrize("solver", SOLVERS)
def test_layers_that_nothing_harms(solver: Callable) -> None:
    """A network without curvature would end in a logarithm of zero."""
    costs, sizes = instance(0)
    flat = {name: dict.fromkeys(table, 0.0) for name, table in costs.items()}
    assert average(sizes, solver(flat, sizes, 3.0)) <= 3.0
