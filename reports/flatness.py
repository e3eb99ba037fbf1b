"""How flat runs are, side by side: their loss along random directions, and the Hessian's eigenvalue of the largest size."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .frame import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Probe = dict[str, Any]  # what `bench.flatness.probe_run` returns
SURROGATE = "*: of the method's own surrogate gradients, not comparable across methods"
IN_FP32 = "runs in bf16 were probed in fp32: bf16 has too few digits for differences"
_GREY = "#5b6470"
_LINEAR = 1e-2  # nats: smaller rises are drawn on a linear scale, since they may be negative


def labels(probes: Sequence[Probe]) -> list[str]:
    """A name for each run: method and bits, with the seed or the id's beginning where that does not tell them apart."""
    names = [one_line(f"{p['method']} {p['bits']}") for p in probes]
    for more in ("seed {seed}", "{run_id:.6}"):
        often = Counter(names)
        names = [n if often[n] == 1 else f"{n} {more.format(**p)}" for n, p in zip(names, probes, strict=True)]
    return names


def eigenvalue(probe: Probe) -> str:
    """As it is shown; ``~`` before what has not converged, ``*`` after what is of surrogate gradients."""
    return f"{'' if probe['converged'] else '~'}{probe['eigenvalue']:.3g}{'*' if probe['surrogate'] else ''}"


def notes(probes: Sequence[Probe]) -> list[str]:
    """What a reader of the numbers must know besides."""
    surrogate, half = any(p["surrogate"] for p in probes), any(p["precision"] != "fp32" for p in probes)
    return [SURROGATE] * surrogate + [IN_FP32] * half


def flatness_figure(probes: Sequence[Probe]) -> bytes:
    """The figure as PNG, the same bytes for the same probes.

    Left: the rise of the loss against the radius, for each run the mean over directions and their range. Right: the eigenvalues.
    """
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = labels(probes)
    colours = sns.color_palette("colorblind", 10) if len(names) <= 10 else sns.husl_palette(len(names), l=0.5)
    with (
        sns.axes_style("ticks", {"axes.grid": True, "grid.color": "#e4e7eb"}),
        mpl.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}),
    ):
        figure = Figure(figsize=(11.5, max(4.6, 1.6 + 0.42 * len(names))), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _rises(left, probes, names, colours)
        _eigenvalues(right, probes, names, colours)
        for ax in (left, right):
            sns.despine(ax=ax)
        footer = "\n".join(line for part in _footer(probes) for line in textwrap.wrap(part, 210))
        figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color=_GREY)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160)
        return file.getvalue()


def _rises(ax: Axes, probes: Sequence[Probe], names: list[str], colours: Sequence[Any]) -> None:
    for probe, name, colour in zip(probes, names, colours, strict=False):
        radii, rise = probe["settings"]["radii"], probe["rise"]
        ax.plot(radii, rise["mean"], color=colour, marker="o", markersize=4, linewidth=1.5, label=name)
        ax.fill_between(radii, rise["min"], rise["max"], color=colour, alpha=0.12, linewidth=0)
    ax.set_xscale("log")
    low, high = (end(v for p in probes for v in p["rise"][key]) for end, key in ((min, "min"), (max, "max")))
    ax.set_yscale("symlog", linthresh=_LINEAR)
    ax.set_ylim(2 * min(low, 0) - 0.1 * _LINEAR, max(2 * high, 2 * _LINEAR))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ticks = sorted({r for probe in probes for r in probe["settings"]["radii"]})
    ax.set_xticks(ticks, [f"{r:g}" for r in ticks])
    ax.minorticks_off()
    ax.axhline(0, color="#333", linewidth=0.8, zorder=0)
    ax.set_xlabel("radius, relative to each filter's norm")
    ax.set_ylabel(f"rise of the loss, nats (log above {_LINEAR:g})")
    ax.set_title("along random directions: mean and range", fontsize=11, loc="left", pad=10)
    ax.legend(loc="upper left", frameon=False, fontsize=8, ncols=1 + len(names) // 10)


def _eigenvalues(ax: Axes, probes: Sequence[Probe], names: list[str], colours: Sequence[Any]) -> None:
    values = [probe["eigenvalue"] for probe in probes]
    bars = ax.barh(range(len(values)), values, color=list(colours)[: len(values)], height=0.65)
    ax.bar_label(bars, [eigenvalue(probe) for probe in probes], padding=4, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("the Hessian's eigenvalue of the largest size (may be negative)")
    ax.set_title("steepest curvature", fontsize=11, loc="left", pad=10)


def _footer(probes: Sequence[Probe]) -> list[str]:
    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(one_line(p[key] if key in p else p["settings"][key]) for p in probes))

    unsure = "" if all(p["converged"] for p in probes) else " (~: not converged)"
    what = (
        f"{each('data')} · {each('protocol')} · {each('network')} · the networks as they are used, quantized · "
        f"{each('images')} training images, {each('directions')} filter-normalised directions, "
        f"{each('iterations')} power iterations on straight-through gradients{unsure}"
    )
    return [what, *notes(probes)]
