"""One picture of a data set: images of classes by domains, images of each class in each part, counts and split hash."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np

from ..bench.data import Loaded, Split, hash_splits
from ..bench.stream import channels_last, gather

_GREY = "#5b6470"
_PARTS = {"train": "#3b6ea8", "val": "#e0a33e", "test": "#9aa5b1"}
_EAST_ASIAN = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "IPAexGothic", "IPAGothic", "VL Gothic", "Droid Sans Fallback",
    "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
_CLASSES, _COLUMNS = 12, 24  # rows, and images a row, that still can be seen


def montage(loaded: Loaded, splits: dict[str, Split], seed: int, samples: int = 6) -> bytes:
    """The picture as PNG.

    Args:
        loaded: The data set.
        splits: Its split, domain by domain.
        seed: The seed the split was drawn for.
        samples: Training images of each class and domain, if there is room for so many.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = max(1, min(samples, _COLUMNS // len(loaded.names)))
    shown = _evenly(len(loaded.classes), _CLASSES)
    width = 0.62 * samples * len(loaded.names) + 1.6
    fonts = _fonts()
    with mpl.rc_context({"font.family": fonts, "text.parse_math": False, "font.size": 8}):
        figure = Figure(
            figsize=(max(width, 7.5), 0.62 * len(shown) + 1.0 + 1.35 * len(loaded.names)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        heights = [0.62 * len(shown) + 0.6, 1.35 * len(loaded.names) + 0.4]
        upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=heights), dtype=object)
        _images(upper, loaded, splits, shown, samples)
        _histograms(lower, loaded, splits)
        figure.suptitle(_drawable(_headline(loaded, splits, seed)), x=0.01, ha="left", fontsize=8, color=_GREY)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _evenly(n: int, most: int) -> list[int]:
    """At most so many of 0..n-1, the first and the last among them, at equal distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def _fonts() -> list[str]:
    """The fonts that labels are drawn with: matplotlib's own and, for East Asian names, those that are installed here."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _EAST_ASIAN if name in installed)]


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that these fonts have."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    paths = [fontManager.findfont(FontProperties(family=name)) for name in _fonts()]
    return frozenset(code for path in paths for code in get_font(path).get_charmap())


def _drawable(text: str) -> str:
    """The text, with a question mark for what no font here can draw (matplotlib would warn, and draw a box)."""
    return "".join(c if ord(c) in _glyphs() or c == "\n" else "?" for c in text)


def _label(loaded: Loaded, c: int) -> str:
    """A class's name or, if it cannot be drawn, its number."""
    name = loaded.classes[c]
    return _short(name) if _drawable(name) == name and "\n" not in name else f"class {c}"


def _headline(loaded: Loaded, splits: dict[str, Split], seed: int) -> str:
    total = sum(len(d.labels) for d in loaded.domains)
    asked = {
        k: v for k, v in loaded.data_params.items() if v not in (None, []) and k not in ("domains", "lt_list", "val")
    }
    settings = "".join(f" · {k} {v}" for k, v in asked.items())
    stored = "x".join(map(str, loaded.domains[0].images.shape[2:]))
    seen = f", seen at {loaded.crop[0]}x{loaded.crop[1]}" if loaded.crop else ""
    first = f"{loaded.name}{settings} · {total:,} images, {len(loaded.classes)} classes, stored at {stored}{seen}"
    return f"{first}\ndata {loaded.hash[:16]} · split of seed {seed} {hash_splits(splits)[:16]}"


def _images(figure: Any, loaded: Loaded, splits: dict[str, Split], shown: list[int], samples: int) -> None:
    domains = loaded.names
    axes = figure.subplots(1, len(domains), squeeze=False, gridspec_kw={"wspace": 0.03})[0]
    height, width = loaded.domains[0].images.shape[2:]
    for ax, name in zip(axes, domains, strict=True):
        domain, train = loaded[name], splits[name].train
        sheet = np.full((len(shown) * (height + 2), samples * (width + 2), 3), 255, np.uint8)
        for row, c in enumerate(shown):
            mine = train[domain.labels[train] == c]
            chosen = mine[_evenly(len(mine), samples)] if len(mine) else mine
            for column, image in enumerate(gather(channels_last(domain.images), chosen) if len(chosen) else ()):
                top, left = row * (height + 2), column * (width + 2)
                sheet[top : top + height, left : left + width] = image.expand(-1, -1, 3).numpy()
        ax.imshow(sheet, interpolation="antialiased", aspect="equal")
        ax.set_title(_drawable(name), fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[0].set_yticks([(height + 2) * (r + 0.5) for r in range(len(shown))], [_label(loaded, c) for c in shown])


def _histograms(figure: Any, loaded: Loaded, splits: dict[str, Split]) -> None:
    axes = figure.subplots(len(loaded.names), 1, squeeze=False, sharex=True)[:, 0]
    classes = len(loaded.classes)
    for ax, name in zip(axes, loaded.names, strict=True):
        labels, bottom, sizes = loaded[name].labels, np.zeros(classes), []
        for part, colour in _PARTS.items():
            indices = getattr(splits[name], part)
            counts = np.bincount(labels[indices].numpy(), minlength=classes)
            ax.bar(range(classes), counts, bottom=bottom, color=colour, width=0.85, label=part)
            bottom += counts
            sizes.append(f"{part} {len(indices):,}")
        least, most = int(bottom.min()), int(bottom.max())
        ax.set_title(
            f"{_drawable(name)}: {', '.join(sizes)} · {least:,} to {most:,} a class",
            loc="left",
            fontsize=8,
            color=_GREY,
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    axes[0].legend(ncols=3, fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    ticks = range(classes) if classes <= 40 else _evenly(classes, 20)
    axes[-1].set_xticks(list(ticks), [_label(loaded, c) for c in ticks])
    if max(len(c) for c in loaded.classes) > 3:
        axes[-1].tick_params(axis="x", rotation=60)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
