"""Accuracy against average weight bits: one panel a table."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .leaderboard import Cell, Mean, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX<>p"
_GREY = "#5b6470"
_MOST = 12  # curves in a panel
_ROOM = 100.5  # percent: the logarithm is taken of the distance to it, so that 100 % has a place


def accuracy_figure(tables: Sequence[Table], footer: str) -> tuple[bytes, bytes]:
    """The figure as (PNG, SVG), the same bytes for the same tables."""
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    with (
        sns.axes_style("ticks", {"axes.grid": True, "grid.color": "#e4e7eb"}),
        mpl.rc_context(
            {"svg.hashsalt": "qatbench", "font.family": "DejaVu Sans", "svg.fonttype": "path", "text.parse_math": False}
        ),
    ):
        figure = Figure(figsize=(5.6 * columns + 2.2, 4.3 * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        looks = _looks([cell for table in tables for cell in _drawn(table)])
        for ax, table in zip(axes, tables, strict=False):
            _panel(ax, table, looks)
            sns.despine(ax=ax)
        for ax in axes[len(tables) :]:  # the empty place of an odd number of panels
            ax.set_visible(False)
        _legend(figure)
        wrapped = "\n".join(textwrap.wrap(footer, int(15 * figure.get_figwidth())))
        figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=7, color=_GREY)
        return _save(figure, "png", dpi=160), _save(figure, "svg", metadata={"Date": None})


def _looks(cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Each method's colour and marker, the same in all panels."""
    import seaborn as sns

    labels = sorted({cell.label for cell in cells})
    colours = sns.color_palette("colorblind", 10) if len(labels) <= 10 else sns.husl_palette(len(labels), l=0.5)
    return {label: {"color": colours[i], "marker": _MARKERS[i % len(_MARKERS)]} for i, label in enumerate(labels)}


def _panel(ax: Axes, table: Table, looks: dict[str, dict[str, Any]]) -> None:
    import seaborn as sns

    points = _drawn(table)
    labels = sorted({c.label for c in points})
    positions = _apart(points)
    for label in labels:
        own = sorted((c for c in points if c.label == label), key=lambda c: positions[id(c)])
        x = [positions[id(c)] for c in own]
        y = [100 * c.accuracy.mean for c in own if c.accuracy]
        bars = [100 * (c.accuracy.sd or 0) for c in own if c.accuracy]
        colour = looks[label]["color"]
        sns.lineplot(x=x, y=y, ax=ax, label=label, markersize=6.5, linewidth=1.2, legend=False, **looks[label])
        if any(bars):
            ax.errorbar(x, y, yerr=bars, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=1)
    for number, cell in enumerate(c for c in table.cells if c.accuracy and c.is_float):
        level = 100 * cell.accuracy.mean if cell.accuracy else 0.0
        ax.axhline(
            level,
            color="#333",
            linestyle=(0, (5, 2 + 2 * number)),
            linewidth=1.2,
            label=f"{cell.label} (float)",
            zorder=0,
        )
    if not ax.lines:
        ax.text(
            0.5,
            0.5,
            "no finished run with a test accuracy",
            ha="center",
            va="center",
            transform=ax.transAxes,
            color=_GREY,
        )
    _limits(ax, table, points)
    ax.set_xlabel("average weight bits (equal bits are set side by side)")
    unseen = "OOD " if "acc_ood" in table.measures else ""
    ax.set_ylabel(f"{unseen}test accuracy, % (log of the error; mean ± sd)")
    title = table.title + (" - of each method the setting with the best test accuracy" if _crowded(table) else "")
    ax.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11, loc="left", pad=10)


def _crowded(table: Table) -> bool:
    return len({c.label for c in table.cells if c.accuracy and not c.is_float}) > _MOST


def _drawn(table: Table) -> list[Cell]:
    """The quantized cells with a number; where they are too many to be told apart, the best setting of each method."""
    points = [c for c in table.cells if c.accuracy and not c.is_float]
    if not _crowded(table):
        return points
    best: dict[str, Cell] = {}
    for cell in sorted(points, key=lambda c: -(c.accuracy.mean if c.accuracy else 0.0)):
        best.setdefault(cell.method, cell)
    return [c for c in points if c.label == best[c.method].label]


def _bits(cell: Cell) -> float:
    measured = cell.cost.get("avg_bits_weight")
    return float(cell.widths[0] if measured is None else measured)


def _apart(points: list[Cell]) -> dict[int, float]:
    """Where each point stands: methods of the same bits side by side, so that none hides another."""
    bits = [_bits(c) for c in points]
    labels = sorted({c.label for c in points})
    distinct = sorted({round(b) for b in bits})
    gap = min((b - a for a, b in itertools.pairwise(distinct)), default=2)
    step = min(0.022 * max(2.0, distinct[-1] - distinct[0]), 0.5 * gap / len(labels)) if labels else 0.0
    return {id(c): _bits(c) + step * (labels.index(c.label) - (len(labels) - 1) / 2) for c in points}


def _limits(ax: Axes, table: Table, points: list[Cell]) -> None:
    bits = [_bits(c) for c in points]
    if bits:
        pad = 0.12 * max(2.0, max(bits) - min(bits))
        ax.set_xlim(min(bits) - pad, max(bits) + pad)
        low, high = int(min(bits) - pad) + 1, int(max(bits) + pad)
        if low <= high:
            ax.set_xticks(range(low, high + 1))
    ends = [100 * (m.mean + side * (m.sd or 0)) for m in _means(table) for side in (-1, 1)] or [0.0, 100.0]
    bottom, top = _spread(max(min(ends), 0.0)), _spread(min(max(ends), 100.0))
    room = max(0.06 * (top - bottom), 0.02)
    bottom, top = max(bottom - room, _spread(-1.0)), min(top + room, _spread(100.1))
    ax.set_yscale("function", functions=(_spread, _unspread))
    ax.set_ylim(float(_unspread(bottom)), float(_unspread(top)))
    ticks = _ticks(float(bottom), float(top))
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _means(table: Table) -> list[Mean]:
    return [c.accuracy for c in table.cells if c.accuracy]


def _spread(percent: Any) -> Any:
    """Accuracy as the logarithm of the error, so that 95 and 97 % stay apart beside a method that fell to chance."""
    import numpy as np

    return -np.log10(np.maximum(_ROOM - np.asarray(percent, float), 1e-9))


def _unspread(value: Any) -> Any:
    import numpy as np

    return _ROOM - 10.0 ** -np.asarray(value, float)


def _ticks(bottom: float, top: float) -> list[float]:
    """Round accuracies, the roundest first, as many as stand apart."""
    chosen: list[float] = []
    for tier in ((90, 50, 0, 100), (80, 95, 99, 98), (70, 97, 20), range(101), (n / 4 for n in range(401))):
        for tick in tier if len(chosen) < 5 else ():
            place = _spread(tick)
            if bottom <= place <= top and all(abs(place - _spread(t)) >= 0.075 * (top - bottom) for t in chosen):
                chosen.append(float(tick))
    return sorted(chosen)


def _legend(figure: Figure) -> None:
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        names = ["\n".join(textwrap.wrap(label, 28)) for label in handles]
        figure.legend(handles.values(), names, loc="outside right upper", frameon=False, fontsize=9)


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, **options)
    return file.getvalue()
