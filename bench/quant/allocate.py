"""Which layer gets how many bits: the exact trade-off between size and harm, and two quicker rules to hold against it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ..errors import UserError

Costs = Mapping[str, Mapping[int, float]]
"""Layer -> width -> harm: the rise of the loss that is expected of the layer's weight at that width."""
SMALLEST_SHARE = 1e-3  # of the median: what a layer without curvature counts for where a logarithm is taken


class Plan(NamedTuple):
    """A point of the frontier: bits of all weights together, the harm summed over layers, and each layer's width."""

    bits: int
    cost: float
    widths: dict[str, int]


def frontier(costs: Costs, sizes: Mapping[str, int]) -> list[Plan]:
    """Every plan that no other plan beats: fewer bits always mean more harm, and more bits less.

    Dynamic programming over the layers that keeps, of all partial plans, those that no other one dominates: exact, since what
    is added later does not depend on what was chosen before.

    Args:
        costs: Harm of each layer at each of its candidate widths.
        sizes: Weights of each layer.

    Returns:
        The plans by rising bits; the first has the fewest that are possible.
    """
    unit = math.gcd(*sizes.values()) or 1  # the sums are small numbers, of which many are equal
    bits, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each layer: the plan before it, and the width
    for name, table in costs.items():
        widths = np.array(sorted(table), np.int64)
        harm = np.array([table[int(w)] for w in widths])
        if not np.isfinite(harm).all():
            raise ValueError(f"the harm of {name} is not finite: {dict(table)}")
        kept, bits, cost = _undominated(
            (bits + (widths * (sizes[name] // unit))[:, None]).ravel(), (cost + harm[:, None]).ravel()
        )
        choice, parent = np.divmod(kept, len(steps[-1][0]) if steps else 1)
        steps.append((parent, widths[choice]))
    columns, at = [], np.arange(len(bits))
    for parent, width in reversed(steps):
        columns.append(width[at])
        at = parent[at]
    rows = np.stack(columns[::-1], axis=1).tolist()
    return [
        Plan(b * unit, c, dict(zip(costs, row, strict=True)))
        for b, c, row in zip(bits.tolist(), cost.tolist(), rows, strict=True)
    ]


def _undominated(bits: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which points have less cost than every point of no more bits; their indices by rising bits, bits and costs."""
    order = np.lexsort((cost, bits))
    sorted_cost = cost[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_cost)[:-1]])
    kept = order[sorted_cost < best_before]
    return kept, bits[kept], cost[kept]


def allocate(costs: Costs, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Widths with the least harm whose average over the weights is at most ``budget`` bits.

    Args:
        costs: Harm of each layer at each of its candidate widths.
        sizes: Weights of each layer.
        budget: Average bits a weight; compared in exact arithmetic, as the decimal number that it prints as.

    Raises:
        UserError: The candidate widths reach no such average.
    """
    limit = _limit(costs, sizes, budget)
    plans = frontier(costs, sizes)
    return plans[bisect_right(plans, limit, key=lambda plan: plan.bits) - 1].widths


def _limit(costs: Costs, sizes: Mapping[str, int], budget: float) -> int:
    """The budget in bits for all weights together."""
    total = sum(sizes[name] for name in costs)
    least, most = (sum(sizes[name] * end(table) for name, table in costs.items()) for end in (min, max))
    limit = math.floor(Fraction(str(budget)) * total)
    if not least <= limit <= most:
        raise UserError(
            f"an average of {budget:g} bits a weight is out of reach: with these candidate widths it is "
            f"{least / total:.4g} to {most / total:.4g}; change the budget or the candidates"
        )
    return limit


def greedy(
    costs: Costs, sizes: Mapping[str, int], budget: float, start: Mapping[str, int] | None = None
) -> dict[str, int]:
    """From the smallest widths (or ``start``): again and again the next width for whom it helps most, by bit, and still fits.

    Raises:
        UserError: The candidate widths reach no such average.
    """
    limit = _limit(costs, sizes, budget)
    widths = dict(start) if start is not None else {name: min(table) for name, table in costs.items()}
    used = sum(sizes[name] * width for name, width in widths.items())
    while True:
        best, gain = None, 0.0
        for name, table in costs.items():
            wider = [w for w in table if w > widths[name]]
            if not wider or used + sizes[name] * (min(wider) - widths[name]) > limit:
                continue
            extra = sizes[name] * (min(wider) - widths[name])
            helps = (table[widths[name]] - table[min(wider)]) / extra
            if helps > gain:
                best, gain = (name, min(wider), extra), helps
        if best is None:
            return widths
        widths[best[0]] = best[1]
        used += best[2]


def ideal_bits(traces: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Real-valued widths that minimise ``sum n t 4^-b`` at an average of ``budget``, without bounds.

    ``b = budget + (log2 t - <log2 t>) / 2`` with the mean over all weights: one bit more for four times the curvature. The
    size of a layer cancels.
    """
    logs = {name: 0.5 * math.log2(trace) for name, trace in traces.items()}
    mean = sum(sizes[name] * value for name, value in logs.items()) / sum(sizes[name] for name in logs)
    return {name: budget + value - mean for name, value in logs.items()}


def closed_form(costs: Costs, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """`ideal_bits` between the smallest and the largest candidate, rounded down, and then `greedy` with what is left over.

    A layer's curvature is read off its harm at its smallest width as ``t = harm 4^b / n``. After clipping, one offset for all
    layers, found by bisection, brings the average back to the budget.

    Raises:
        UserError: The candidate widths reach no such average.
    """
    _limit(costs, sizes, budget)
    raw = {name: table[min(table)] * 4.0 ** min(table) / sizes[name] for name, table in costs.items()}
    floor = SMALLEST_SHARE * sorted(raw.values())[len(raw) // 2] or 1.0
    ideal = ideal_bits({name: max(value, floor) for name, value in raw.items()}, sizes, budget)
    total = sum(sizes[name] for name in costs)

    def clipped(offset: float) -> dict[str, float]:
        return {name: min(max(ideal[name] + offset, min(table)), max(table)) for name, table in costs.items()}

    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(sizes[name] * bits for name, bits in clipped(middle).items()) <= budget * total:
            low = middle
        else:
            high = middle
    down = {name: max(w for w in costs[name] if w <= bits) for name, bits in clipped(low).items()}
    return greedy(costs, sizes, budget, down)


def uniform(costs: Costs, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """The same for every layer: the largest candidate width that is within the budget.

    Raises:
        UserError: The candidate widths reach no such average.
    """
    _limit(costs, sizes, budget)
    return {name: max(width for width in table if width <= budget) for name, table in costs.items()}


__all__ = ["Costs", "Plan", "allocate", "closed_form", "frontier", "greedy", "ideal_bits", "uniform"]
