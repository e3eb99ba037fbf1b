"""Tables as Markdown, HTML, CSV and for the terminal. One place decides how a number is written."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .leaderboard import COSTS, MEASURES, Cell, Mean, Problem, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "–"
_LONGEST = 300  # characters of a reason that are shown; runs.csv has all of them
GLOSSARY = {
    "accuracy": "test accuracy in %, the unweighted mean over domains; mean ± sample standard deviation over seeds",
    "vs float": "points to the float network trained for the same extra epochs: the mean of the differences by seed",
    "seeds": "finished / expected",
    "fidelity": "paper: after the paper's own equations; reconstruction (†): the paper leaves something open, which "
    "was filled in; baseline: not a paper's method",
    "worst": "the lowest of the domains' means",
    "start": "accuracy of the float network that training started from",
    "weight bits, act. bits": "averages over the network from the actual plan; inner: without the first and last layer",
    "act., kB": "activations of one image in memory at once, at most: codes where only quantized layers read them, else floats",
    "GBOPs": "billions of bit operations an image: multiply-adds x weight bits x activation bits",
    "levels": "ok: no quantizer was seen to emit more than 2^bits codes in anything that shares a grid",
    "bold": "the best of its bits",
}
_MEASURES = {  # of a record -> head of its column, and what it is; acc_ood is the accuracy itself, acc_worst is for scripts
    "acc_id": ("ID accuracy", "mean over the domains that training saw (in distribution), on images that it did not"),
    "bacc": ("balanced", "mean over the classes of the share of a class's images that are right"),
    "acc_many": ("many", "the same over classes with more than 100 training images"),
    "acc_medium": ("medium", "the same over classes with 20 to 100 training images"),
    "acc_few": ("few", "the same over classes with fewer than 20 training images"),
    "acc_coarse": ("superclass", "accuracy of the second head, which predicts superclasses"),
    "ece": (
        "ECE",
        "expected calibration error in %: distance between the highest probability and the accuracy, 15 bins",
    ),
}
_HELD_OUT = ("OOD accuracy", "accuracy on the domain that training did not see (out of distribution)")
_BY_CLASS = {
    "accuracy by class": "share of a class's test images that are right, in %: mean over seeds and tested domains "
    "(on the page only, up to 100 classes; in full with --json)"
}
_MOST_CLASSES = 100  # squares in a row of the page
_NUMBERED = 20  # classes, up to which each square holds its number and each column its name


@dataclass(frozen=True)
class Page:
    """What a report says beside its tables."""

    title: str
    command: str
    footer: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    aside: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Column:
    """A column: its head, what it says of a cell, whether that is a number, and whether it is what cells are ranked by."""

    head: str
    text: Callable[[Cell], str]
    numeric: bool = True
    main: bool = False


# ---- numbers


def percent(mean: Mean | None, show_n: bool = False) -> str:
    """``97.1 ± 0.3``; with one seed ``97.1 (n=1)``, or ``97.1`` where the row says so already."""
    if mean is None:
        return DASH
    if mean.sd is None:
        return f"{100 * mean.mean:.1f}" + (" (n=1)" if show_n else "")
    return f"{100 * mean.mean:.1f} ± {100 * mean.sd:.1f}"


def _of(cell: Cell, mean: Mean | None, write: Callable[[Mean | None], str] = percent) -> str:
    """The mean, with its number of seeds where that is not the cell's."""
    other = mean and cell.accuracy and mean.n != cell.accuracy.n
    return write(mean) + (f" (n={mean.n})" if mean and other else "")


def _gap(mean: Mean | None) -> str:
    return DASH if mean is None else f"{100 * mean.mean:+.1f}".replace("-", "−")


def _amount(value: float | None, write: str) -> str:
    if value is None:
        return DASH
    text = format(value, write)
    return f"{float(text):,.0f}" if "e+" in text else text  # 1.7e+02 is 170


def _bits(cell: Cell, what: str) -> str:
    every, inner = cell.cost.get(what), cell.cost.get(f"{what}_inner")
    if every is None:
        return DASH
    return f"{every:.2f}" + (f" (inner {inner:.2f})" if inner is not None else "")


def seeds(cell: Cell) -> str:
    """``2/3 (1 failed)``."""
    counts = {"failed": cell.failed, "skipped": cell.skipped, "missing": len(cell.absent)}
    why = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return f"{len(cell.seeds)}/{cell.expected}" + (f" ({why})" if why else "")


def _name(cell: Cell) -> str:
    return cell.label + (" †" if "reconstruction" in cell.fidelity else "")


def _accuracy(cell: Cell) -> str:
    return percent(cell.accuracy, show_n=True) + (" =" if cell.tied else "")


def accuracy_columns(table: Table) -> list[Column]:
    """How well the cells do."""

    def domain(name: str) -> Column:
        return Column(name + ("*" if name in table.generated else ""), lambda c: _of(c, c.domains.get(name)))

    def measure(name: str) -> Column:
        return Column(_MEASURES[name][0], lambda c: _of(c, c.measures[name]))

    several = len(table.domains) > 1
    return [
        Column("method", _name, numeric=False),
        Column("bits", lambda c: c.bits, numeric=False),
        Column(_main_head(table), _accuracy, main=True),
        Column("vs float", lambda c: _of(c, c.gap, _gap)),
        Column("seeds", seeds, numeric=False),
        Column("fidelity", lambda c: c.fidelity, numeric=False),
        *(measure(name) for name in _measures(table) if name != "ece"),
        *([domain(name) for name in table.domains] if several else []),
        *([Column("worst", lambda c: percent(_alone(_worst_mean(c))))] if several and not _held_out(table) else []),
        Column("start", lambda c: _of(c, c.start)),
        *(measure(name) for name in _measures(table) if name == "ece"),
    ]


def _held_out(table: Table) -> bool:
    """Whether the accuracy is that of a domain that training did not see, beside which the worst domain says nothing new."""
    return "acc_ood" in table.measures


def _main_head(table: Table) -> str:
    return _HELD_OUT[0] if _held_out(table) else "accuracy"


def _measures(table: Table) -> list[str]:
    """What has a column of its own: on balanced classes, balanced accuracy says what accuracy says."""
    shown = [name for name in _MEASURES if name in table.measures]
    return [name for name in shown if name != "bacc" or table.protocol == "longtail"]


def glossary(tables: Sequence[Table]) -> dict[str, str]:
    """What the words of these tables mean."""
    heads = [_HELD_OUT] if any(map(_held_out, tables)) else []
    heads += [entry for name, entry in _MEASURES.items() if any(name in _measures(t) for t in tables)]
    return GLOSSARY | dict(heads) | (_BY_CLASS if any(t.classes for t in tables) else {})


def cost_columns(table: Table) -> list[Column]:
    """What the cells cost, from the actual plan."""
    return [
        Column("method", _name, numeric=False),
        Column("bits", lambda c: c.bits, numeric=False),
        Column("weight bits", lambda c: _bits(c, "avg_bits_weight")),
        Column("act. bits", lambda c: _bits(c, "avg_bits_act")),
        Column("size, kB", lambda c: _amount(_scaled(c.cost["size_bytes"], 1e3), ",.1f")),
        Column("GBOPs", lambda c: _amount(_scaled(c.cost["bops"], 1e9), ".3g")),
        Column("act., kB", lambda c: _amount(_scaled(c.cost["peak_act_bytes"], 1e3), ",.1f")),
        Column("levels", lambda c: {True: "ok", False: "TOO MANY", None: DASH}[c.levels], numeric=False),
        Column("step, ms", lambda c: _amount(c.step_ms, ".1f")),
    ]


def _worst(cell: Cell) -> str:
    mean = _worst_mean(cell)
    return DASH if mean is None else f"{percent(_alone(mean))} {cell.worst}"


def _alone(mean: Mean | None) -> Mean | None:
    """The mean to be shown without its spread."""
    return mean and replace(mean, sd=None)


def _worst_mean(cell: Cell) -> Mean | None:
    return cell.domains.get(cell.worst) if cell.worst else None


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _problem(problem: Problem) -> list[str]:
    return [
        problem.status,
        problem.cell,
        "?" if problem.seed is None else str(problem.seed),
        _cut(problem.reason),
        problem.run_id or DASH,
    ]


_PROBLEM_HEAD = ("status", "cell", "seed", "reason", "run")


def provenance(table: Table) -> str:
    """The table's data, by hash, and which of its domains were generated."""
    text = f"Data {table.data}, sha256 {str(table.data_hash or 'unknown')[:12]}"
    chosen = {name: value for name, value in sorted(table.data_params.items()) if value is not None}
    text += "".join(f"; {name}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in chosen.items())
    generated = f". * generated, not photographed or scanned: {', '.join(table.generated)}" if table.generated else ""
    return f"{text}{generated}."


# ---- Markdown


def markdown(page: Page, tables: Sequence[Table], figure: str) -> str:
    """The leaderboard as a Markdown page."""
    lines = [f"# {_md(page.title)}", "", *(f"> {_md(note)}" for note in page.notes), ""]
    lines += [f"![Test accuracy against average weight bits]({figure})", ""]
    for table in tables:
        lines += [f"## {_md(table.title)}", "", *_md_cells(table, accuracy_columns(table)), ""]
        lines += ["Cost:", "", *_md_cells(table, cost_columns(table)), ""]
        lines += [f"- {_md(note)}" for note in table.notes]
        lines += [f"- {_md(provenance(table))}", f"- Recipe: {_md(table.recipe)}.", ""]
        if table.problems:
            lines += [
                "Without a number:",
                "",
                *_md_table(_PROBLEM_HEAD, (False,) * 5, [_problem(p) for p in table.problems]),
                "",
            ]
    if page.aside:
        lines += [
            "## Set aside",
            "",
            "Files of the store that are no record of this version; they were left as they are.",
            "",
        ]
        lines += [*_md_table(("file", "why"), (False, False), [list(item) for item in page.aside]), ""]
    lines += [
        "## How to read this",
        "",
        *(f"- **{name}**: {_md(text)}" for name, text in glossary(tables).items()),
        "",
        "---",
        "",
    ]
    lines += [f"Made by {_md_code(page.command)}", "", *(f"- {name}: {_md(text)}" for name, text in page.footer)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _md_cells(table: Table, columns: list[Column]) -> list[str]:
    body = []
    for cell in table.cells:
        texts = [_md(column.text(cell)) for column in columns]
        body.append(
            [
                f"**{t}**" if cell.best and (c.main or c.head == "method") else t
                for t, c in zip(texts, columns, strict=True)
            ]
        )
    return _md_table([c.head for c in columns], [c.numeric for c in columns], body, escaped=True)


def _md_table(head: Sequence[str], numeric: Sequence[bool], body: list[list[str]], escaped: bool = False) -> list[str]:
    rows = body if escaped else [[_md(text) for text in row] for row in body]
    rules = ["---:" if n else "---" for n in numeric]
    return [f"| {' | '.join(row)} |" for row in ([_md(h) for h in head], rules, *rows)]


def _md(text: str) -> str:
    """The text so that Markdown shows it as it is, in a table too."""
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)", "\u200b", text)  # an address in a reason becomes no link


def _md_code(text: str) -> str:
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


# ---- HTML


def by_class(table: Table) -> list[int]:
    """The classes in the order in which the page shows them: a long tail from head to tail; none if they are too many."""
    classes = range(len(table.classes) if len(table.classes) <= _MOST_CLASSES else 0)
    tail = table.protocol == "longtail" and table.class_counts
    return sorted(classes, key=lambda c: -table.class_counts[c]) if tail else list(classes)


def _square(table: Table, cell: Cell, c: int) -> tuple[str, str, float]:
    """What a class's square holds, what it says when it is pointed at, and its darkness from 0 to 1."""
    recall = cell.recalls[c]
    text = DASH if recall is None else f"{100 * recall:.0f}"
    name = table.classes[c] + (f", {table.class_counts[c]:,} training images" if table.class_counts else "")
    return text if len(table.classes) <= _NUMBERED else "", f"{name}: {text}", recall or 0.0


def html(page: Page, tables: Sequence[Table], svg: bytes) -> str:
    """The leaderboard as one page that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("leaderboard.html.j2").render(
        page=page,
        tables=tables,
        figure=base64.b64encode(svg).decode(),
        accuracy_columns=accuracy_columns,
        cost_columns=cost_columns,
        problem=_problem,
        problem_head=_PROBLEM_HEAD,
        provenance=provenance,
        glossary=glossary(tables).items(),
        by_class=by_class,
        square=_square,
        numbered=_NUMBERED,
    )


# ---- CSV


def leaderboard_csv(tables: Sequence[Table], made_by: str) -> str:
    """One row a cell; accuracies as fractions, every number in full."""
    domains = list(dict.fromkeys(d for t in tables for d in t.domains))
    measures = [name for name in MEASURES if any(name in t.measures for t in tables)]
    return to_csv(
        [_csv_row(t, cell, domains, measures) | {"made_by": made_by} for t in tables for cell in t.cells],
    )


def _csv_row(table: Table, cell: Cell, domains: list[str], measures: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data": table.data,
        "data_params": json.dumps(table.data_params, sort_keys=True),
        "data_hash": table.data_hash,
        "protocol": table.protocol,
        "network": table.network,
        "method": cell.method,
        "label": cell.label,
        "fidelity": cell.fidelity,
        "bits": cell.bits,
        "seeds": " ".join(map(str, cell.seeds)),
        "seeds_done": len(cell.seeds),
        "seeds_expected": cell.expected,
        "failed": cell.failed,
        "skipped": cell.skipped,
        "missing": len(cell.absent),
        "best": cell.best,
        "tied_with_best": cell.tied,
    }
    means = {"acc": cell.accuracy, **{f"acc/{d}": cell.domains.get(d) for d in domains}}
    for name, mean in (means | {name: cell.measures[name] for name in measures}).items():
        row |= {f"{name}/mean": mean and mean.mean, f"{name}/sd": mean and mean.sd, f"{name}/n": mean.n if mean else 0}
    row |= {
        "worst_domain": cell.worst,
        "start/mean": cell.start and cell.start.mean,
        "start/sd": cell.start and cell.start.sd,
    }
    row |= {"vs_float": cell.gap and cell.gap.mean, "vs_float/n": cell.gap.n if cell.gap else 0}
    row |= {name: cell.cost[name] for name in COSTS}
    row |= {"levels_ok": cell.levels, "step_ms": cell.step_ms, "run_ids": " ".join(cell.run_ids)}
    return row | {"settings": json.dumps(cell.settings, sort_keys=True, default=str)}


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with equal keys as CSV; None is an empty field, and a float is written so that it reads back equal."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---- terminal


def terminal_table(table: Table, width: int = 100) -> RichTable:
    """The table for a terminal of `width` columns: as many of its columns as fit, the worst domain in place of all."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = _terminal_columns(table, width)
    shown = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        caption=Text(_terminal_marks(table), style="dim"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        justify = "right" if column.numeric else "left"
        shown.add_column(Text(column.head), justify=justify, no_wrap=column.head != "method", overflow="fold")
    for group in table.groups().values():
        for cell in group:
            style = "bold" if cell.best else "" if cell.accuracy else "dim"
            shown.add_row(*(Text(c.text(cell)) for c in columns), style=style, end_section=cell is group[-1])
    return shown


def _terminal_columns(table: Table, width: int) -> list[Column]:
    first = [
        Column("method", _name, numeric=False),
        Column("bits", lambda c: c.bits, numeric=False),
        Column("seeds", lambda c: f"{len(c.seeds)}/{c.expected}" + ("!" if c.failed else "")),
        Column(_main_head(table), _accuracy),
        Column("vs float", lambda c: _gap(c.gap)),
    ]
    cost = [
        Column("size, kB", lambda c: _amount(_scaled(c.cost["size_bytes"], 1e3), ",.1f")),
        Column("GBOPs", lambda c: _amount(_scaled(c.cost["bops"], 1e9), ".2g")),
    ]
    several = len(table.domains) > 1
    domains = [_terminal_domain(table, name) for name in table.domains] if several else []
    worst = [Column("worst domain", _worst)] if several and not _held_out(table) else []
    measures = [_terminal_measure(name) for name in _measures(table) if name != "ece"]
    fewer = [
        column for column in measures if column.head != _MEASURES["bacc"][0]
    ]  # of a balanced test set, the accuracy
    rest = ([*domains, *cost], [*worst, *cost], domains, worst, [])
    choices = ([*first, *own, *extra] for extra in rest for own in (measures, fewer))
    return next((columns for columns in choices if _width(table, columns) <= width), first[:4])


def _terminal_domain(table: Table, name: str) -> Column:
    head = name + ("*" if name in table.generated else "")
    return Column(head, lambda c: percent(_alone(c.domains.get(name))))


def _terminal_measure(name: str) -> Column:
    return Column(_MEASURES[name][0], lambda c: percent(_alone(c.measures[name])))


def _terminal_marks(table: Table) -> str:
    marks = {
        "! runs failed": any(c.failed for c in table.cells),
        "= within one sd of the best of its bits": any(c.tied for c in table.cells),
        "† reconstruction": any("reconstruction" in c.fidelity for c in table.cells),
        "* generated domain": bool(table.generated) and len(table.domains) > 1,
        "OOD: on the domain that training did not see": _held_out(table),
        "many > 100, medium 20–100, few < 20 training images": any(
            name in table.measures for name in ("acc_many", "acc_medium", "acc_few")
        ),
        "n=1: differences cannot be judged": any(c.accuracy and c.accuracy.n == 1 for c in table.cells),
    }
    return " · ".join(mark for mark, used in marks.items() if used)


def _width(table: Table, columns: Iterable[Column]) -> int:
    """Characters that the table takes if nothing but the method is wrapped; of a method's label, 20 are granted."""
    widths = (max(len(column.head), *(len(column.text(cell)) for cell in table.cells)) for column in columns)
    first, *rest = widths
    return min(first, 20) + 1 + sum(width + 2 for width in rest)
