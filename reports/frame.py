"""The store as a table: one row a run. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.errors import UserError, nearest
from ..bench.secrets import scrub
from ..bench.store import Store

if TYPE_CHECKING:
    import pandas as pd

# One entry a layer or a class: kept in the record, too wide for a row.
_WIDE = ("levels_max", "plan", "classes", "class_counts")


@dataclass(frozen=True)
class Selection:
    """The part of a store that a report is about.

    Attributes:
        suite: The suite's name; None for the whole store.
        records: Records of finished runs, by run id.
        missing: Runs of the suite that have no record -> why.
        seeds: The suite's seeds; None if there is no suite to say how many to expect.
        aside: Files of the store that are no record -> why.
    """

    suite: str | None
    records: list[dict[str, Any]]
    missing: dict[str, str]
    seeds: tuple[int, ...] | None
    aside: dict[str, str]


def select(store: Store, suite: str | None = None) -> Selection:
    """The records of a suite, or of the whole store.

    Raises:
        UserError: No such suite was launched on this store, or it has no result yet.
    """
    manifest = None if suite is None else _manifest(store, suite)
    records = {record["run_id"]: record for record in store.records()}
    aside = {_relative(path, store.root): one_line(why) for path, why in store.aside}
    missing: dict[str, str] = {}
    if manifest is not None:
        unreadable = {path.parent.name: why for path, why in store.aside}
        ids = list(dict.fromkeys(manifest["run_ids"]))
        missing = {
            i: f"its record was set aside: {one_line(unreadable[i])}" if i in unreadable else "not run yet"
            for i in ids
            if i not in records
        }
        records = {i: records[i] for i in sorted(ids) if i in records}
    if not records:
        raise UserError(_nothing(store, suite, len(aside)))
    return Selection(suite, list(records.values()), missing, _seeds(manifest), aside)


def results(store: Store, suite: str | None = None) -> pd.DataFrame:
    """Every run as a row of a data frame.

    A run's specification, status and reason, and its metrics, under their own names (``test/acc/mnist``); what it cost,
    took and came from under ``cost/``, ``time/`` and ``provenance/``. Nested settings are JSON. A run of the suite that
    is not there yet has the status ``missing``.

    Raises:
        UserError: The suite is unknown, or there is no result.
    """
    import pandas as pd

    frame = pd.DataFrame(rows(select(store, suite)))
    frame["seed"] = frame["seed"].astype("Int64")
    return frame


def rows(selection: Selection) -> list[dict[str, Any]]:
    """`results` as dictionaries, which need no pandas. All have the same keys."""
    flat = [_flatten(record) for record in selection.records]
    flat += [{"run_id": i, "status": "missing", "reason": why} for i, why in selection.missing.items()]
    names = dict.fromkeys(name for row in flat for name in row)
    return [{name: row.get(name) for name in names} for row in flat]


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def one_line(value: Any) -> str:
    """Text without line breaks or control characters: a reason may hold a traceback, or a terminal's colour codes."""
    return "".join(c for c in " ".join(str(value).split()) if c.isprintable())


def seed(record: dict[str, Any]) -> int | None:
    """The seed that the run was made with."""
    value = number(record["spec"].get("seed"))
    return None if value is None else int(value)


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    reason = record["reason"]
    row = {
        "run_id": record["run_id"],
        "status": record["status"],
        "reason": None if reason is None else scrub(one_line(reason)),
    }
    row |= {name: _plain(value) for name, value in record["spec"].items()} | {"seed": seed(record)}
    row |= {name: number(value) for name, value in record["metrics"].items()}
    for section in ("cost", "time", "provenance"):
        for name, value in record[section].items():
            if name not in _WIDE:
                row[f"{section}/{name}"] = _plain(value)
    return row


def _plain(value: Any) -> Any:
    """A value that fits a cell: nested ones as JSON, NaN and infinity as None."""
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True)
    return number(value) if isinstance(value, float) else value


def _manifest(store: Store, suite: str) -> dict[str, Any]:
    known = store.suites()
    if suite not in known:
        raise UserError(f"no suite {suite!r} was launched on store {store.root}{nearest(suite, known)}")
    manifest = store.read_suite(suite)
    if manifest is None:
        raise UserError(f"suite {suite!r} cannot be read in store {store.root}; write it again: qatbench sweep {suite}")
    return manifest


def _seeds(manifest: dict[str, Any] | None) -> tuple[int, ...] | None:
    suite = (manifest or {}).get("suite")
    seeds = suite.get("seed") if isinstance(suite, dict) else None
    seeds = seeds if isinstance(seeds, list) else [seeds]
    return tuple(sorted({s for s in seeds if isinstance(s, int)})) or None


def _nothing(store: Store, suite: str | None, aside: int) -> str:
    where = f"store {store.root}" + (f" of suite {suite!r}" if suite else "")
    what = f" ({aside} files set aside as no records)" if aside else ""
    return f"no results in {where}{what}; make some with: qatbench " + (f"sweep {suite}" if suite else "quickstart")


def _relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
