"""Runs -> cells with means over seeds -> a table for each data set, protocol and network.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..bench.secrets import scrub
from ..bench.spec import FLOAT_BITS, parse_bits
from ..bench.store import Store
from .frame import Selection, number, one_line, seed, select
from .labels import TABLE, canonical, code, labelled, recipe, settings, titled

Record = dict[str, Any]
COSTS = ("avg_bits_weight", "avg_bits_weight_inner", "avg_bits_act", "size_bytes", "bops", "peak_act_bytes")
# What a record may hold beside the accuracy: means over domains, but for acc_worst.
MEASURES = ("acc_id", "acc_ood", "acc_worst", "bacc", "acc_many", "acc_medium", "acc_few", "acc_coarse", "ece")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, its sample standard deviation (None with one seed), and how many seeds went into it."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[Any]) -> Mean | None:
        """Of the finite numbers among the values; None if there are none."""
        known = [v for v in map(number, values) if v is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Problem:
    """A run without a number."""

    run_id: str
    cell: str
    seed: int | None
    status: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """A method at one bit width: a row of a table.

    Attributes:
        label: The method, with whatever sets this cell apart from the table's other cells of the same method.
        fidelity: How near the code is to the paper, for each method of a chain.
        seeds: Of its finished runs.
        expected: Number of seeds that there should be.
        absent: The suite's seeds of which there is no record.
        measures: What was measured beside the accuracy, by its name in the record (`MEASURES`).
        recalls: Of each of the table's classes, over seeds and tested domains; None if no record knows it.
        gap: Accuracy less the float network's, paired by seed.
        levels: Whether no quantizer emitted more than 2**bits codes; None if that was not recorded.
        best: Whether it has the highest mean among the cells of the same bits.
        tied: Whether its mean is within one standard deviation of the best one's.
    """

    method: str
    label: str
    fidelity: str
    bits: str
    widths: tuple[float, int]
    seeds: tuple[int, ...]
    expected: int
    failed: int
    skipped: int
    absent: tuple[int, ...]
    accuracy: Mean | None
    domains: dict[str, Mean | None]
    measures: dict[str, Mean | None]
    recalls: tuple[float | None, ...]
    worst: str | None
    start: Mean | None
    gap: Mean | None
    cost: dict[str, float | None]
    levels: bool | None
    levels_over: str
    step_ms: float | None
    run_ids: tuple[str, ...]
    settings: dict[str, Any]
    best: bool = False
    tied: bool = False

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.widths == (FLOAT_BITS, FLOAT_BITS)

    @property
    def name(self) -> str:
        """For people: ``lsq w4a4``."""
        return f"{self.label} {self.bits}"


@dataclass(frozen=True)
class Table:
    """What may be compared: cells on the same data, protocol and network.

    Attributes:
        measures: Names of what any cell has beside the accuracy, in the order of `MEASURES`.
        classes: Names of the classes; empty if no record tells how well each was recognised.
        class_counts: Training images of each class; empty if no record says.
    """

    title: str
    data: str
    data_params: dict[str, Any]
    data_hash: str | None
    protocol: str
    network: str
    domains: tuple[str, ...]
    generated: tuple[str, ...]
    measures: tuple[str, ...]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    cells: tuple[Cell, ...]
    problems: tuple[Problem, ...]
    recipe: str
    notes: tuple[str, ...] = field(default=())

    def groups(self) -> dict[str, list[Cell]]:
        """The cells of each bit width, in the table's order."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.bits, []).append(cell)
        return found


def leaderboard(store: Store, suite: str | None = None) -> list[Table]:
    """The leaderboard as data.

    Raises:
        UserError: The suite is unknown, or there is no result.
    """
    return tables(select(store, suite))


def as_dicts(boards: list[Table]) -> list[dict[str, Any]]:
    """The leaderboard for ``--json``: plain values only, absent numbers as None."""
    return json.loads(json.dumps([asdict(board) for board in boards], allow_nan=False, default=str))


def tables(selection: Selection) -> list[Table]:
    """The tables of the selected runs, by data set, protocol and network."""
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in _without_gaps(selection.records):
        grouped[canonical([_benchmark(record), record["provenance"].get("data")])].append(record)
    boards = [_table(grouped[key], selection.seeds) for key in sorted(grouped)]
    return titled(sorted(boards, key=lambda t: (t.data, t.protocol, t.network)))


def _table(records: list[Record], seeds: tuple[int, ...] | None) -> Table:
    by_cell: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_cell[canonical([record["spec"] | {"seed": None}, code(record)])].append(record)
    domains = tuple(dict.fromkeys(d for r in records for d in _domains(r)))
    classes, class_counts = _classes(records)
    cells = [_cell(by_cell[key], domains, len(classes), seeds) for key in sorted(by_cell)]
    cells = _gaps(labelled(cells), records)
    cells.sort(key=lambda c: (-c.widths[0], -c.widths[1], c.bits, -(c.accuracy.mean if c.accuracy else -1), c.label))
    cells = _ranked(cells)
    first = records[0]
    generated = {d for r in records for d in _strings(r["provenance"].get("generated")) if d in domains}
    return Table(
        title="",
        data=_text(first, "data"),
        data_params=params if isinstance(params := _spec(first, "data_params"), dict) else {},
        data_hash=first["provenance"].get("data"),
        protocol=_text(first, "protocol"),
        network=_text(first, "network"),
        domains=domains,
        generated=tuple(d for d in domains if d in generated),
        measures=tuple(name for name in MEASURES if any(c.measures[name] for c in cells)),
        classes=classes,
        class_counts=class_counts,
        cells=tuple(cells),
        problems=_problems(cells, records),
        recipe=recipe(cells),
        notes=tuple(_notes(cells, records)),
    )


def _cell(records: list[Record], domains: tuple[str, ...], classes: int, seeds: tuple[int, ...] | None) -> Cell:
    records = sorted(records, key=lambda r: (seed(r) is None, seed(r) or 0, r["run_id"]))
    done = [r for r in records if r["status"] == "done"]
    recorded = {seed(r) for r in records}
    absent = sorted(set(seeds or ()) - recorded)
    means = {d: Mean.of(r["metrics"].get(f"test/acc/{d}") for r in done) for d in domains}
    ranked = {d: m.mean for d, m in means.items() if m}
    levels, over = _levels(done)
    bits = _text(records[0], "bits")
    return Cell(
        method=_text(records[0], "method"),
        label=_text(records[0], "method"),
        fidelity=_fidelity(records),
        bits=bits,
        widths=_widths(bits),
        seeds=tuple(s for s in map(seed, done) if s is not None),
        expected=len(records) + len(absent),
        failed=sum(r["status"] == "failed" for r in records),
        skipped=sum(r["status"] == "skipped" for r in records),
        absent=tuple(absent),
        accuracy=Mean.of(r["metrics"].get("test/acc") for r in done),
        domains=means,
        measures={name: Mean.of(r["metrics"].get(f"test/{name}") for r in done) for name in MEASURES},
        recalls=_recalls(done, classes),
        worst=min(ranked, key=lambda d: ranked[d]) if ranked else None,
        start=Mean.of(r["metrics"].get("float/test/acc") for r in done),
        gap=None,
        cost={name: _average(r["cost"].get(name) for r in done) for name in COSTS},
        levels=levels,
        levels_over=over,
        step_ms=_average(r["time"].get("step_ms") for r in done),
        run_ids=tuple(r["run_id"] for r in records),
        settings=settings(records[0]),
    )


# ---- what a record says


def _spec(record: Record, name: str) -> Any:
    return record["spec"].get(name)


def _text(record: Record, name: str) -> str:
    value = _spec(record, name)
    return "?" if value is None else one_line(value)


def _strings(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple | dict) else []


def _domains(record: Record) -> list[str]:
    return [name.removeprefix("test/acc/") for name in record["metrics"] if name.startswith("test/acc/")]


def _classes(records: list[Record]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and training images of the classes, if a record tells how well each was recognised."""
    for record in records:
        names = tuple(map(one_line, _strings(record["provenance"].get("classes"))))
        if names and any(value is not None for value in _recalls([record], len(names))):
            counts = record["provenance"].get("class_counts")
            known = isinstance(counts, list) and len(counts) == len(names) and all(isinstance(n, int) for n in counts)
            return names, tuple(counts) if known else ()
    return (), ()


def _recalls(done: list[Record], classes: int) -> tuple[float | None, ...]:
    """The mean recall of each class over the runs and the domains that their protocol tests."""
    rows = []
    for record in done:
        by_domain, protocol = record.get("per_class"), _text(record, "protocol")
        for domain, row in by_domain.items() if isinstance(by_domain, dict) else ():
            seen = protocol.startswith("lodo:") and protocol != f"lodo:{domain}"
            if not seen and isinstance(row, list) and len(row) == classes:
                rows.append(row)
    return tuple(_average(row[c] for row in rows) for c in range(classes))


def _average(values: Iterable[Any]) -> float | None:
    mean = Mean.of(values)
    return mean.mean if mean else None


def _widths(bits: str) -> tuple[float, int]:
    try:
        return parse_bits(bits)
    except ValueError:
        return (0, 0)


def _without_gaps(records: list[Record]) -> list[Record]:
    """Give a run that failed before it knew its data's hash or its code what the runs beside it agree on.

    Else a failed seed would stand in a table of its own, and its cell's row would hide that it failed.
    """
    hashes: dict[str, set[str]] = defaultdict(set)
    codes: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        if record["provenance"].get("data") is not None:
            hashes[_benchmark(record)].add(record["provenance"]["data"])
        if code(record):
            codes[canonical(record["spec"] | {"seed": None})][canonical(code(record))] = code(record)
    filled = []
    for record in records:
        provenance = dict(record["provenance"])
        if provenance.get("data") is None and len(known := hashes[_benchmark(record)]) == 1:
            provenance["data"] = next(iter(known))
        if not code(record) and len(agreed := codes[canonical(record["spec"] | {"seed": None})]) == 1:
            provenance["code"] = next(iter(agreed.values()))
        filled.append(record | {"provenance": provenance})
    return filled


def _benchmark(record: Record) -> str:
    return canonical([_spec(record, name) for name in TABLE])


def _fidelity(records: list[Record]) -> str:
    for record in records:
        marks = record["provenance"].get("fidelity")
        if isinstance(marks, dict) and marks:
            kinds = [one_line(mark) for mark in marks.values()]
            if len(set(kinds)) == 1:
                return kinds[0]
            return ", ".join(f"{one_line(name)}: {mark}" for name, mark in zip(marks, kinds, strict=True))
    return "unknown"


def _levels(done: list[Record]) -> tuple[bool | None, str]:
    """Whether all observed numbers of codes fit the plan's bits; and those that do not."""
    checked, over = False, []
    for record in done:
        levels, plan = record["cost"].get("levels_max"), record["cost"].get("plan")
        for site, counts in levels.items() if isinstance(levels, dict) else ():
            widths = plan.get(site) if isinstance(plan, dict) else None
            if not isinstance(counts, list | tuple) or not isinstance(widths, list | tuple):
                continue
            for what, count, width in zip(("weights", "activations"), counts, widths, strict=False):
                if number(count) is None or number(width) is None or width >= FLOAT_BITS:
                    continue
                checked = True
                if count > 2**width:
                    over.append(f"{one_line(site)} ({what}: {count} codes > 2^{width}, run {record['run_id']})")
    return (not over if checked else None), "; ".join(over)


# ---- comparison


def _gaps(cells: list[Cell], records: list[Record]) -> list[Cell]:
    """The distance to the float network that was trained as long, over the seeds that both have."""
    reference = [c for c in cells if c.is_float and c.accuracy]
    if len(reference) != 1:
        return cells
    by_id = {r["run_id"]: r for r in records if r["status"] == "done"}

    def by_seed(cell: Cell) -> dict[int | None, float]:
        runs = [by_id[i] for i in cell.run_ids if i in by_id]
        known = {seed(r): number(r["metrics"].get("test/acc")) for r in runs}
        return {s: v for s, v in known.items() if v is not None}

    base = by_seed(reference[0])
    return [
        replace(c, gap=Mean.of(v - base[s] for s, v in by_seed(c).items() if s in base)) if not c.is_float else c
        for c in cells
    ]


def _ranked(cells: list[Cell]) -> list[Cell]:
    """Mark in each group of equal bits the best cell, and those that are within one standard deviation of it."""
    best: dict[str, Cell] = {}
    for cell in cells:  # sorted: the first one is the best
        if cell.accuracy:
            best.setdefault(cell.bits, cell)
    alone = {b for b in best if sum(c.bits == b for c in cells) == 1}
    return [
        replace(c, best=c is best.get(c.bits) and c.bits not in alone, tied=_tied(c, best.get(c.bits))) for c in cells
    ]


def _tied(cell: Cell, best: Cell | None) -> bool:
    if best is None or cell is best or not cell.accuracy or not best.accuracy:
        return False
    if cell.accuracy.sd is None or best.accuracy.sd is None:
        return False  # one seed: no spread to judge by, which the notes say
    return best.accuracy.mean - cell.accuracy.mean <= max(cell.accuracy.sd, best.accuracy.sd)


def _problems(cells: list[Cell], records: list[Record]) -> tuple[Problem, ...]:
    names = {i: cell.name for cell in cells for i in cell.run_ids}
    found = []
    for r in records:
        reason = None if r["reason"] is None else scrub(one_line(r["reason"]))
        if r["status"] != "done":
            log = r["provenance"].get("log")
            reason = (reason or "no reason given") + (
                f" (log: {one_line(log)})" if log and r["status"] == "failed" else ""
            )
        elif number(r["metrics"].get("test/acc")) is None:
            reason = "its record holds no test accuracy"
        else:
            continue
        found.append(Problem(r["run_id"], names[r["run_id"]], seed(r), r["status"], reason))
    found += [Problem("", cell.name, s, "missing", "no record yet") for cell in cells for s in cell.absent]
    return tuple(sorted(found, key=lambda p: (p.status, p.cell, p.seed or 0, p.run_id)))


def _notes(cells: list[Cell], records: list[Record]) -> list[str]:
    """What keeps these numbers from being compared as they stand."""
    notes = []
    known = [c for c in cells if c.accuracy]
    single = [c for c in known if c.accuracy and c.accuracy.n == 1]
    if single and len(known) > 1:
        who = "every cell" if len(single) == len(known) else ", ".join(c.name for c in single)
        notes.append(f"n=1 for {who}: with one seed, differences cannot be judged.")
    everyone = {s for c in cells for s in c.seeds}
    fewer = [c for c in cells if c.seeds and set(c.seeds) != everyone]
    if fewer:
        which = "; ".join(f"{c.name}: {', '.join(map(str, c.seeds))}" for c in fewer)
        notes.append(
            f"Not all cells have the same seeds ({', '.join(map(str, sorted(everyone)))}), "
            f"so means are not of like runs: {which}."
        )
    partial = [c for c in cells if c.accuracy and c.accuracy.n < len(c.seeds)]
    notes += [
        f"{c.name}: {len(c.seeds)} runs are done, but only {c.accuracy.n} hold a test accuracy."
        for c in partial
        if c.accuracy
    ]
    notes += [f"{c.name}: more codes than its bits allow: {c.levels_over}." for c in cells if c.levels is False]
    twice = [c for c in cells if len(set(c.seeds)) < len(c.seeds)]
    notes += [f"{c.name}: a seed was run more than once; all of its runs are in the mean." for c in twice]
    splits: dict[int | None, set[str]] = defaultdict(set)
    for record in records:
        if record["provenance"].get("split"):
            splits[seed(record)].add(str(record["provenance"]["split"]))
    notes += [
        f"Seed {s}: the runs did not all use the same split of the data."
        for s, hashes in splits.items()
        if len(hashes) > 1
    ]
    dirty = sum(bool(r["provenance"].get("dirty")) for r in records)
    if dirty:
        notes.append(f"{dirty} of {len(records)} runs were made with uncommitted changes in the code.")
    if any(c.tied for c in cells):
        notes.append(
            '"=": within one standard deviation (the larger of the two) of the best of the same bits; '
            "not to be told apart by these seeds."
        )
    return notes
