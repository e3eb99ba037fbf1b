"""What a sweep shows while it runs: a live view on a terminal, one line for each finished run anywhere else."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..bench.secrets import scrub
from .status import Entry

if TYPE_CHECKING:
    from .worker import Job  # which imports torch


def clock(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:07:30``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Active:
    """A job that a worker trains now, as its events tell."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.began = time.monotonic()
        self.event: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None  # a resumed run starts in mid-phase

    def move(self, event: dict[str, Any]) -> None:
        """Take the runner's latest event."""
        if event.get("phase") != self.event.get("phase"):
            self._first = None
        self.event = event
        if self._first is None:
            self._first = (time.monotonic(), event.get("step") or 0)

    @property
    def fraction(self) -> float:
        """How much of the present phase is done."""
        return min(1.0, (self.event.get("step") or 0) / max(1, self.event.get("steps") or 1))

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.began

    @property
    def seconds_to_go(self) -> float | None:
        """Until the training ends, at the rate measured so far; None before there is one."""
        return self.phase_to_go if self.event.get("phase") in ("float", "train") else None

    @property
    def phase_to_go(self) -> float | None:
        """Seconds until the present phase ends, at the rate measured so far; None before there is one."""
        if self._first is None:
            return None
        since, first = self._first
        steps = (self.event.get("step") or 0) - first
        if steps < 5:
            return None
        return (time.monotonic() - since) / steps * ((self.event.get("steps") or 0) - steps - first)


class Clock:
    """How long the jobs take, by method: measured on those that ended, else on those that run."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[float]] = defaultdict(list)

    def ended(self, job: Job, seconds: float) -> None:
        """Take the time of one more job."""
        self._seen[_kind(job)].append(seconds)

    def to_go(self, left: Iterable[Job], active: Sequence[Active], workers: int) -> float | None:
        """Seconds until all is done, on this many workers; None before anything was measured."""
        known = {kind: statistics.mean(seen) for kind, seen in self._seen.items()}
        running = []
        for a in active:
            rest = a.seconds_to_go
            if rest is None and (mean := known.get(_kind(a.job))) is not None:
                rest = max(0.0, mean - a.seconds)
            elif rest is not None:
                known.setdefault(_kind(a.job), a.seconds + rest)
            running.append(rest)
        if not known:
            return None
        usual = statistics.mean(known.values())
        rests = [usual if r is None else r for r in running]
        total = sum(rests) + sum(known.get(_kind(job), usual) for job in left)
        return max([total / max(1, workers), *rests])


def _kind(job: Job) -> str:
    return "" if job.float_net else job.resolved.spec.method


class Progress:
    """One line for each job that ends, without control codes. The base of `LiveProgress`.

    Attributes:
        total: Runs of the suite.
        done, failed: Runs that ended, those of earlier sweeps too.
        left: Jobs that no worker has begun.
        waiting: Jobs that another process trains.
        broken_off: Runs that the machine ended, or that it kept from beginning.
    """

    def __init__(self, console: Console, name: str, total: int, done: int, failed: int, workers: int) -> None:
        self.console, self.name = console, name
        self.total, self.done, self.failed, self.workers = total, done, failed, workers
        self.left: list[Job] = []
        self.waiting: list[Job] = []
        self.broken_off = 0
        self.active: dict[int, Active] = {}
        self.began = time.monotonic()
        self.clock = Clock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, worker: int, job: Job) -> None:
        """A worker takes a job."""
        self.active[worker] = Active(job)

    def moved(self, worker: int, event: dict[str, Any]) -> None:
        """A worker got on."""
        if worker in self.active:
            self.active[worker].move(event)

    def stopped(self, worker: int) -> None:
        """A worker gave its job back."""
        self.active.pop(worker, None)

    def float_ended(self, worker: int, job: Job, notes: Sequence[str] = ()) -> None:
        """A float network is trained; `notes`: what was found damaged."""
        seconds = self._time(worker)
        self.say(f"[green]ok[/]     {escape(job.label)}  [dim]{clock(seconds)}[/]")
        self._notes(notes)

    def float_failed(self, job: Job, reason: str, log: Path, runs: int) -> None:
        """A float network could not be trained, nor can the runs that start from it."""
        self.say(f"[red]failed[/] {escape(job.label)}, and with it {runs} run{'s' * (runs != 1)}: {escape(reason)}")
        self.say(f"       [dim]log: {escape(str(log))}[/]")

    def broke_off(self, job: Job, reason: str, log: Path, runs: int) -> None:
        """The machine ended a job, e.g. by a full disk: it, or the runs that need it, are left."""
        self.broken_off += runs
        more = f", and with it {runs} run{'s' * (runs != 1)}" if job.float_net else ""
        self.say(f"[yellow]left[/]   {escape(job.label)}{more}: {escape(reason)}")
        self.say(f"       [dim]log: {escape(str(log))}[/]")

    def ended(self, worker: int | None, job: Job, record: dict[str, Any], note: str = "", quiet: bool = False) -> None:
        """A run has its record; `quiet`: its failure was told with that of its float network."""
        seconds = self._time(worker) if worker is not None else None
        took = "" if seconds is None else f"  [dim]{clock(seconds)}[/]"
        if record["status"] == "done":
            self.done += 1
            accuracy = (record.get("metrics") or {}).get("test/acc")
            shown = "" if accuracy is None else f"  test {100 * accuracy:.1f} %"
            self.say(f"[green]ok[/]     {escape(job.label)}{shown}{took}{note and f'  [dim]{escape(note)}[/]'}")
            self._notes((record.get("provenance") or {}).get("notes", ()))
        elif record["status"] == "failed":
            self.failed += 1
            if quiet:
                return
            log = (record.get("provenance") or {}).get("log")
            self.say(f"[red]failed[/] {escape(job.label)}: {escape(str(record['reason']))}{took}")
            self.say(f"       [dim]log: {escape(str(log))}[/]")
        else:
            self.total -= 1
            self.say(f"[dim]skipped[/] {escape(job.label)}: {escape(str(record['reason']))}")

    def _notes(self, notes: Iterable[str]) -> None:
        for line in notes:
            self.say(f"       [dim]{escape(line)}[/]")

    def say(self, line: str) -> None:
        """Print one line, not wrapped, so that a path can be copied."""
        self.console.print(scrub(line), soft_wrap=True, highlight=False)

    @property
    def seconds_to_go(self) -> float | None:
        """Until all runs have ended; None before anything was measured."""
        return self.clock.to_go(self.left, list(self.active.values()), self.workers)

    def _time(self, worker: int) -> float:
        active = self.active.pop(worker)
        self.clock.ended(active.job, active.seconds)
        return active.seconds


class LiveProgress(Progress):
    """The same lines, above a bar for the suite and a line for each worker."""

    def __enter__(self) -> Progress:
        self._live = Live(console=self.console, get_renderable=self.view, refresh_per_second=4, transient=True)
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def view(self) -> RenderableType:
        """What stands at the bottom of the terminal now."""
        rows = Table.grid(padding=(0, 1), expand=True)
        for name in ("worker", "label", "phase", "bar", "share", "accuracy"):
            rows.add_column(name, no_wrap=True, ratio={"label": 3, "bar": 2}.get(name), justify="left")
        for number, active in sorted(self.active.items()):
            rows.add_row(Text(f"{number}", style="dim"), Text(active.job.label, overflow="ellipsis"), *_cells(active))
        parts: list[RenderableType] = [self._overall(), rows]
        if self.waiting:
            parts.append(Text(f"waiting for {len(self.waiting)} that another process trains", style="dim"))
        # Not to the last column: the ^C that a terminal echoes there would begin a line more than we know of.
        return Constrain(Group(*parts), max(1, self.console.width - 4))

    def _overall(self) -> RenderableType:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        ended = self.done + self.failed
        words = Text(f"{ended}/{self.total}")
        if self.failed:
            words.append(f"  {self.failed} failed", style="red")
        words.append(f"  {clock(time.monotonic() - self.began)}")
        to_go = self.seconds_to_go
        words.append("" if to_go is None else f", about {clock(to_go)} to go", style="dim")
        row.add_row(Text(self.name, style="bold"), ProgressBar(total=max(1, self.total), completed=ended), words)
        return row


def _cells(active: Active) -> list[RenderableType]:
    event = active.event
    if not event:
        return [Text("working", style="dim"), "", "", ""]
    accuracy = event.get("val/acc")
    shown = Text("" if accuracy is None else f"val {100 * accuracy:5.1f} %")
    if event.get("phase") == "test":
        return [Text("test"), "", "", shown]
    epochs = event.get("epochs") or 0
    what = Text(f"epoch {min((event.get('epoch') or 0) + 1, epochs)}/{epochs}")
    if event.get("phase") == "traces":
        to_go = active.phase_to_go
        what, shown = Text("traces"), Text("" if to_go is None else f"{clock(to_go)} to go")
    bar = ProgressBar(total=1.0, completed=active.fraction)
    return [what, bar, Text(f"{100 * active.fraction:3.0f} %"), shown]


def plan_table(entries: Sequence[Entry], retry_failed: bool) -> Table:
    """The suite, a line for each cell: which seeds are done, failed, to run, skipped and why."""
    table = Table(box=None, pad_edge=False)
    columns = ("cell", "to run", "done", "failed", "skipped")
    for name in columns:
        table.add_column(name, style="dim" if name == "skipped" else None)
    cells: defaultdict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for entry in entries:
        cell, _, seed = entry.label.rpartition(" s")
        cells[cell or entry.label].append((seed if cell else "?", entry))  # a manifest need not have labels as ours
    for cell, runs in cells.items():
        row, why = defaultdict(list), defaultdict(set)
        for seed, e in runs:
            column = _column(e, retry_failed)
            row[column].append(f"s{seed} (running)" if e.state == "running" else f"s{seed}")
            if e.reason and column in ("failed", "skipped"):
                why[column].add(e.reason)
        told = {c: ", ".join(row[c]) + (f": {'; '.join(sorted(why[c]))}" if why[c] else "") for c in columns[1:]}
        table.add_row(escape(cell), *(escape(text) for text in told.values()))
    return table


def _column(entry: Entry, retry_failed: bool) -> str:
    again = entry.state == "failed" and retry_failed
    return "to run" if again or entry.state in ("left", "running") else entry.state
