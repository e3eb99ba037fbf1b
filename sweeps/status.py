"""How far a suite is, from the store alone: no torch, no data set, so it answers at once."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ..bench.errors import UserError, nearest
from ..bench.secrets import scrub
from ..bench.store import Store


@dataclass(frozen=True)
class Entry:
    """Where one run stands: ``done``, ``failed``, ``skipped``, ``running`` (a process holds its lock) or ``left``."""

    run_id: str
    label: str
    state: str
    reason: str | None = None


@dataclass(frozen=True)
class Status:
    """Where each run of a suite stands.

    Attributes:
        suite: Its name.
        command: What launched it last.
        entries: Its runs.
        floats_at_work: Float networks that are being trained; their runs are ``left`` until then.
        seconds_to_go: About how long the rest takes; None if nothing was measured or is at work.
    """

    suite: str
    command: str
    entries: list[Entry]
    floats_at_work: int
    seconds_to_go: float | None

    def count(self, state: str) -> int:
        """How many runs are ``done``, ``failed``, ``skipped``, ``running`` or ``left``."""
        return sum(e.state == state for e in self.entries)


def status(suite: str, store: Store) -> Status:
    """Where a suite that was launched on this store stands."""
    manifest = store.read_suite(suite)
    if manifest is None:
        raise UserError(f"suite {suite!r} was never launched on store {store.root}{nearest(suite, store.suites())}")
    records = {i: store.read(i) for i in manifest["run_ids"]}
    labels, skips = manifest.get("labels", {}), manifest.get("skips", {})
    entries = [standing(store, i, labels.get(i, i), r, skips.get(i)) for i, r in records.items()]
    walls = [r["time"].get("wall_s") for r in records.values() if r and r["status"] == "done"]
    walls = [w for w in walls if w is not None]
    at_work = sum(e.state == "running" for e in entries)
    todo = at_work + sum(e.state == "left" for e in entries)
    seconds = statistics.mean(walls) * todo / at_work if walls and at_work else None
    floats = sum(store.locked(float_lock(f)) for f in manifest.get("float_ids", []))
    return Status(suite, manifest.get("command", ""), entries, floats, seconds)


def float_lock(float_id: str) -> str:
    """The name of the lock that whoever trains the float network holds; the runner's own."""
    return f"float-{float_id}"


def standing(store: Store, run_id: str, label: str, record: dict | None, skip: str | None = None) -> Entry:
    """Where one run stands, given its record."""
    if record and record["status"] != "skipped":
        return Entry(run_id, label, record["status"], record["reason"] and scrub(str(record["reason"])))
    if skip:
        return Entry(run_id, label, "skipped", scrub(skip))
    return Entry(run_id, label, "running" if store.locked(run_id) else "left")
