"""A report: every table and figure, from the store alone. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..bench.disk import replace_file
from ..bench.errors import UserError
from ..bench.store import Store
from .frame import Selection, one_line, rows, seed, select
from .leaderboard import Table, tables
from .render import Page, html, leaderboard_csv, markdown, to_csv


@dataclass(frozen=True)
class ReportPaths:
    """What `make_report` wrote, and the tables in it."""

    folder: Path
    html: Path
    markdown: Path
    csv: Path
    runs: Path
    png: Path
    svg: Path
    tables: list[Table]


def make_report(store: Store, suite: str | None, out: Path | None, command: str) -> ReportPaths:
    """Write the leaderboard of a suite, or of the whole store, into a folder.

    The same store gives the same bytes: dates come from the records. A file is replaced whole or not at all.

    Args:
        store: Where the results are.
        suite: A suite that was launched on this store; None for all results.
        out: The folder; None: ``report`` in the store.
        command: What the user typed, for the footer.

    Raises:
        UserError: The suite is unknown, there is no result, or the folder cannot be written.
    """
    from .figure import accuracy_figure

    selection = select(store, suite)
    boards = tables(selection)
    page = _page(selection, boards, command)
    short = f"{one_line(command)} · {' · '.join(f'{name}: {text}' for name, text in page.footer[:3])}"
    png, svg = accuracy_figure(boards, short)
    folder = Path(out).expanduser() if out else store.root / "report"
    paths = ReportPaths(
        folder,
        html=folder / "index.html",
        markdown=folder / "leaderboard.md",
        csv=folder / "leaderboard.csv",
        runs=folder / "runs.csv",
        png=folder / "accuracy_vs_bits.png",
        svg=folder / "accuracy_vs_bits.svg",
        tables=boards,
    )
    _write(
        {
            paths.png: png,
            paths.svg: svg,
            paths.csv: leaderboard_csv(boards, short).encode(),
            paths.runs: to_csv([row | {"made_by": short} for row in rows(selection)]).encode(),
            paths.markdown: markdown(page, boards, paths.png.name).encode(),
            paths.html: html(page, boards, svg).encode(),
        }
    )
    return paths


def _page(selection: Selection, boards: list[Table], command: str) -> Page:
    records = selection.records
    statuses = Counter(r["status"] for r in records) + Counter(missing=len(selection.missing))
    provenance = [r["provenance"] for r in records]
    footer = {
        "qatbench": __version__,
        "git": _listed(
            f"{str(p['git'])[:12]}{' (modified)' if p.get('dirty') else ''}" for p in provenance if p.get("git")
        ),
        "newest record": _newest(records),
        "records": ", ".join(f"{statuses[s]} {s}" for s in ("done", "failed", "skipped", "missing") if statuses[s]),
        "seeds": _listed(seed(r) for r in records),
        "selection": _listed(
            p.get("selection") or r["spec"].get("selection") for r, p in zip(records, provenance, strict=True)
        ),
        "device": _listed(p.get("device") for p in provenance),
    }
    notes = []
    if selection.missing:
        total = len(records) + len(selection.missing)
        notes.append(
            f"{len(selection.missing)} of the suite's {total} runs have no record; "
            f"see which with: qatbench status {selection.suite}; make them with: qatbench sweep {selection.suite}"
        )
    if selection.aside:
        files = "1 file" if len(selection.aside) == 1 else f"{len(selection.aside)} files"
        notes.append(f"{files} of the store set aside as no record of this version; named at the end.")
    notes += _mixed(provenance)
    title = f"Leaderboard: {selection.suite}" if selection.suite else "Leaderboard"
    return Page(title, one_line(command), tuple(footer.items()), tuple(notes), tuple(selection.aside.items()))


def _mixed(provenance: list[dict[str, Any]]) -> list[str]:
    """What a reader of means and of paired differences must know: that runs began, or ran, in unequal places."""
    starts: defaultdict[str, set[str]] = defaultdict(set)
    for start in (p.get("float") for p in provenance):
        if isinstance(start, dict):
            starts[one_line(start.get("id"))].add(one_line(start.get("sha256")))
    notes = []
    if unequal := sorted(i for i, digests in starts.items() if len(digests) > 1):
        notes.append(
            f"Some runs of one float recipe start from unequal weights, since its network was made again between them (maybe on "
            f"another machine): float networks {', '.join(unequal[:5])}. Their differences are not only those of the methods."
        )
    if len({one_line(p["device"]) for p in provenance if p.get("device")}) > 1:
        notes.append(
            "The runs were made on different devices (see the footer), whose numbers differ in the last digits."
        )
    return notes


def _listed(values: Any) -> str:
    known = sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
    return ", ".join(one_line(v) for v in known) or "unknown"


def _newest(records: list[dict[str, Any]]) -> str:
    dates = []
    for record in records:
        try:
            date = datetime.fromisoformat(str(record["time"].get("started")))
        except ValueError:
            continue  # a run that failed before its clock was started
        dates.append(date if date.tzinfo else date.replace(tzinfo=UTC))
    return f"{max(dates).astimezone(UTC):%Y-%m-%d %H:%M} UTC" if dates else "unknown"


def _write(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        except OSError as error:
            raise UserError(
                f"cannot write the report to {path.parent}: {error.strerror}; choose another folder with --out"
            ) from error
