"""Run a suite in worker processes on this machine.

What is done stays done; a run that failed in an earlier sweep is tried again only when asked for. Float networks
come first, and a run is ready when its float network is there. Every run is held by a lock, so several sweeps may work
on one store at once: a run that another process trains is passed over and looked at again at the end. A time limit
stops what runs then, as Ctrl-C does; both lose nothing but the epoch in progress.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..bench.alone import environment
from ..bench.errors import UserError
from ..bench.resolve import Resolved
from ..bench.secrets import scrub, scrub_file
from ..bench.spec import SuiteSpec
from ..bench.store import BusyError, Store
from .expand import expand, labels
from .progress import LiveProgress, Progress, plan_table
from .status import Entry, standing
from .worker import Job, Setting, unmeasured

_LOOK_AGAIN = 2.0  # seconds between looks at what another process trains
_CRASHES = {  # signals that code brings on itself; all others come from outside
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS")
    if hasattr(signal, name)
}
_GRACE = 5.0  # seconds between asking a worker to end and killing it


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: numbers of runs, and the signal or time limit that stopped it, if one did.

    `left` are those that have no result yet; of these, the machine ended `broken_off` (a full disk, a process killed from outside).
    """

    done: int
    failed: int
    skipped: int
    left: int
    signal: int | None = None
    out_of_time: bool = False
    dry_run: bool = False
    broken_off: int = 0

    @property
    def exit_status(self) -> int:
        """0: nothing failed (the time limit may have been reached); 1: some failed or were broken off; 130 or 143: interrupted."""
        return 128 + self.signal if self.signal else int(self.failed + self.broken_off > 0 and not self.dry_run)


def sweep(
    suite: SuiteSpec,
    store: Store,
    *,
    workers: int | None = None,
    data_root: Path | None = None,
    wandb: bool = True,
    retry_failed: bool = False,
    dry_run: bool = False,
    time_limit: str | None = None,
    device: str = "auto",
    plugins: Sequence[Path] = (),
    command: str = "",
    console: Console | None = None,
) -> SweepResult:
    """Fill in what the suite lacks.

    Args:
        suite: What to run.
        store: Where results are and go.
        workers: Processes; by default as many as there are usable cores for the suite's threads, or one a GPU.
        data_root: Where data sets are.
        wandb: Whether runs are tracked by W&B.
        retry_failed: Also run what failed in an earlier sweep.
        dry_run: Print what would be run, and run nothing.
        time_limit: E.g. ``2h``, ``30m``, ``90s``: then no run is begun, and those in progress are stopped; they go on
            from their last epoch when the sweep is launched again.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        plugins: Files of methods and data sets that workers load.
        command: What the user typed, for the manifest and for the line that says how to go on.
        console: Where to print.
    """
    console = console or Console()
    seconds = parse_duration(time_limit) if time_limit else None
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    gpus = find_gpus(device)
    began = time.monotonic()
    runs = expand(suite, data_root=data_root, cache=store.cache)
    names = dict(zip((r.run_id for r in runs), labels([r.spec for r in runs]), strict=True))
    records = {r.run_id: store.read(r.run_id) for r in runs}
    entries = [standing(store, r.run_id, names[r.run_id], records[r.run_id], r.skip) for r in runs]
    todo = {e.run_id for e in entries if e.state in ("left", "running") or (retry_failed and e.state == "failed")}
    jobs = [Job(False, r, names[r.run_id], records[r.run_id]) for r in runs if r.run_id in todo]
    floats = _floats(jobs, store)
    at = places(workers, suite.threads, gpus, len(jobs))
    for path, reason in store.aside:
        console.print(f"{path} is set aside: {reason}", soft_wrap=True, markup=False, highlight=False)
    if dry_run:
        console.print(plan_table(entries, retry_failed))
    _tell_plan(console, suite.name, entries, len(jobs), len(floats), len(at), retry_failed)
    counts = {s: sum(e.state == s for e in entries) for s in ("done", "failed", "skipped")}
    if dry_run:
        left = len(entries) - sum(counts.values())
        return SweepResult(counts["done"], counts["failed"], counts["skipped"], left, dry_run=True)

    store.write_suite(suite.name, _manifest(suite, runs, names, command))
    _write_skipped(runs, records, store)
    counts["failed"] -= sum(e.state == "failed" for e in entries) if retry_failed else 0
    if not jobs:
        return SweepResult(counts["done"], counts["failed"], counts["skipped"], 0)
    place = "cuda" if gpus else device  # a worker sees only its own GPU
    setting = Setting(store.root, suite.name, data_root, place, wandb, tuple(Path(p).resolve() for p in plugins))
    kind = LiveProgress if console.is_terminal else Progress
    total = len(entries) - counts["skipped"]
    with kind(console, suite.name, total, counts["done"], counts["failed"], len(at)) as progress:
        launch = _Launch(jobs, floats, store, setting, at, progress, None if seconds is None else began + seconds)
        launch.run()
    _tell_end(console, progress, launch, command or f"qatbench sweep {suite.name}", time_limit)
    left = total - progress.done - progress.failed
    skipped = len(entries) - progress.total
    ended = (launch.signal, launch.late)
    return SweepResult(progress.done, progress.failed, skipped, left, *ended, broken_off=progress.broken_off)


class _Worker:
    """One worker process, its job, and a thread that passes its events on."""

    def __init__(self, number: int, place: dict[str, str], setting: Setting, inbox: queue.SimpleQueue) -> None:
        self.number, self.place = number, place
        self.job: Job | None = None
        self.ready = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  what it says outside of a job, e.g. if it cannot start
        command = [
            sys.executable,
            "-P",
            "-m",
            "qatbench.sweeps.worker",
        ]  # -P: the current folder is no place for modules
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**environment(), **place},
            start_new_session=True,  # Ctrl-C is for the parent; and what a run started can be ended with it
        )
        self._send(setting)
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def give(self, job: Job) -> None:
        self.job = job
        self._send(job)

    def ask_to_end(self, hard: bool = False) -> None:
        with contextlib.suppress(OSError):
            if hard:
                os.killpg(self.process.pid, signal.SIGTERM)
            else:
                self._send(None)

    def end(self, grace: float = _GRACE) -> int:
        """Wait for it, then kill it and all that it started; its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return scrub(lines[-1]) if lines else "it said nothing"

    def _send(self, value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: its thread tells
            assert self.process.stdin is not None
            self.process.stdin.write(pickle.dumps(value))
            self.process.stdin.flush()

    def _listen(self, inbox: queue.SimpleQueue) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(EOFError, pickle.UnpicklingError, OSError):
            while True:
                inbox.put((self, *pickle.load(self.process.stdout)))
        inbox.put((self, "died", None))


class _Launch:
    """Jobs on one side, workers on the other, until there is nothing left or something stops it.

    A job is in one place: `ready`, `blocked` (its float network is not there), at a worker, or `waiting` (another
    process holds its lock).
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        floats: Sequence[Job],
        store: Store,
        setting: Setting,
        places: Sequence[dict[str, str]],
        progress: Progress,
        deadline: float | None,
    ) -> None:
        self.store, self.setting, self.progress, self.deadline = store, setting, progress, deadline
        self.ready = deque(floats)
        self.blocked: defaultdict[str, list[Job]] = defaultdict(list)
        missing = {job.resolved.float_id for job in floats}
        for job in jobs:
            (self.blocked[job.resolved.float_id] if job.resolved.float_id in missing else self.ready).append(job)
        self.waiting: list[Job] = []
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.workers: list[_Worker] = []
        self.signal: int | None = None
        self.late = False
        self._places = places
        self._looked = 0.0

    def run(self) -> None:
        """Work until nothing is left, a signal comes or the time is up."""
        clean = False
        with _signals(self._stop):
            try:
                for number, place in enumerate(self._places, 1):
                    self.workers.append(_Worker(number, place, self.setting, self.inbox))
                while self._going_on():
                    self._turn()
                clean = not (self.signal or self.late)
            finally:
                for worker in self.workers:
                    worker.ask_to_end(hard=not clean)
                end = time.monotonic() + _GRACE  # for all of them: a batch system gives us half a minute
                for worker in self.workers:
                    worker.end(max(0.0, end - time.monotonic()))
                    if worker.job:
                        scrub_file(worker.job.log(self.store))

    def _going_on(self) -> bool:
        self.late = self.deadline is not None and time.monotonic() >= self.deadline
        busy = any(w.job for w in self.workers)
        return not self.signal and not self.late and bool(self.ready or self.blocked or self.waiting or busy)

    def _stop(self, number: int, _: Any) -> None:
        self.signal = number
        self.inbox.put((None, "signal", None))  # may be called in the midst of inbox.get: SimpleQueue.put allows that

    def _turn(self) -> None:
        for worker in self.workers:
            if worker.ready and worker.job is None and self.ready:
                worker.give(job := self.ready.popleft())
                self.progress.started(worker.number, job)
        self.progress.left = [*self.ready, *(job for jobs in self.blocked.values() for job in jobs)]
        self.progress.waiting = self.waiting
        try:
            worker, kind, value = self.inbox.get(timeout=0.25)
        except queue.Empty:
            self._look_elsewhere()
        else:
            if worker is not None:
                self._take(worker, kind, value)

    def _take(self, worker: _Worker, kind: str, value: Any) -> None:
        job = worker.job
        if kind == "ready":
            worker.ready = True
        elif kind == "progress":
            self.progress.moved(worker.number, value)
        elif kind == "unwritable":
            raise UserError(value)
        elif kind == "died":
            self._died(worker)
        elif job is not None:
            worker.job = None
            if kind == "ended":
                self.progress.ended(worker.number, job, value)
            elif kind == "float":
                self.progress.float_ended(worker.number, job, value or [])
                self._release(job)
            else:
                self.progress.stopped(worker.number)
                self._not_trained(job, kind, value)

    def _not_trained(self, job: Job, kind: str, value: Any) -> None:
        if kind == "busy":
            self.waiting.append(job)
        elif kind == "elsewhere":
            self.progress.ended(None, job, value, "by another process")
        elif kind == "no float":
            self._float_failed(job, value)
        elif kind == "left":
            self._break_off(job, value)

    def _release(self, net: Job) -> None:
        self.ready.extend(self.blocked.pop(net.resolved.float_id, ()))

    def _float_failed(self, net: Job, reason: str) -> None:
        """Record the failure of every run that starts from this float network."""
        jobs, log = self.blocked.pop(net.resolved.float_id, []), net.log(self.store)
        self.progress.float_failed(net, reason, log, len(jobs))
        for job in jobs:
            self._fail(job, f"float network: {reason}", log, told=True)

    def _break_off(self, job: Job, reason: str) -> None:
        """Leave a job to the next sweep, and the runs that need it: what the machine did is no result of theirs."""
        runs = self.blocked.pop(job.resolved.float_id, []) if job.float_net else [job]
        self.progress.broke_off(job, reason, job.log(self.store), len(runs))

    def _fail(self, job: Job, reason: str, log: Path, told: bool = False) -> None:
        """Record a run as failed, unless another process has it by now."""
        run_id = job.resolved.run_id
        try:
            with self.store.lock(job.lock, wait=False):
                record = self.store.read(run_id)
                if record is None or record == job.known or record["status"] == "skipped":
                    record = unmeasured("failed", job.resolved, reason, log)
                    self.store.write(record)
            self.progress.ended(None, job, record, quiet=told)
        except BusyError:
            self.waiting.append(job)

    def _died(self, worker: _Worker) -> None:
        status = worker.end(grace=1.0)
        if not worker.ready:
            raise UserError(f"a worker could not start: {worker.last_words()}")
        if worker.job:
            scrub_file(worker.job.log(self.store))
        self.progress.stopped(worker.number)
        place = self.workers.index(worker)
        self.workers[place] = _Worker(worker.number, worker.place, self.setting, self.inbox)
        job = worker.job
        if job and status < 0 and -status not in _CRASHES:
            self._break_off(job, _death(status))
        elif job and job.float_net:
            self._float_failed(job, _death(status))
        elif job:
            self._fail(job, _death(status), job.log(self.store))

    def _look_elsewhere(self) -> None:
        if time.monotonic() < self._looked + _LOOK_AGAIN:
            return
        self._looked = time.monotonic()
        waiting, self.waiting = self.waiting, []
        for job in waiting:
            record = None if job.float_net else self.store.read(job.resolved.run_id)
            if record and record["status"] != "skipped" and record != job.known:
                self.progress.ended(None, job, record, "by another process")
            elif job.float_net and job.has_float(self.store):
                self._release(job)
            elif self.store.locked(job.lock):
                self.waiting.append(job)
            else:
                self.ready.appendleft(job)  # its process died, or gave it up


@contextlib.contextmanager
def _signals(stop: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `stop` meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _death(status: int) -> str:
    if status >= 0:
        return f"worker ended with exit status {status}"
    guess = {9: " (out of memory?)", 11: " (segmentation fault)"}.get(-status, "")
    return f"worker was killed by signal {-status}{guess}"


def _floats(jobs: Sequence[Job], store: Store) -> list[Job]:
    """One job for each float network that is not there."""
    missing: dict[str, Job] = {}
    for job in jobs:
        if not job.has_float(store) and job.resolved.broken is None:
            label = " ".join(["float network", *job.label.split(" ")[2:]])
            missing.setdefault(job.resolved.float_id, Job(True, job.resolved, label))
    return list(missing.values())


def parse_duration(text: str) -> float:
    """``2h``, ``30m``, ``90s``, ``1h30m`` -> seconds."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip())
    seconds = sum(float(n) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True) if n) if match else 0
    if not seconds:
        raise UserError(f"time limit {text!r} is no duration; write e.g. 2h, 30m, 90s or 1h30m")
    return seconds


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def places(workers: int | None, threads: int, gpus: Sequence[str], jobs: int) -> list[dict[str, str]]:
    """The environment of each worker: its threads, and its GPU if there are any. No more workers than jobs."""
    usual = len(gpus) or max(1, usable_cores() // threads)
    found = [{"OMP_NUM_THREADS": str(threads)} for _ in range(min(workers or usual, jobs))]
    for number, place in enumerate(found):
        if gpus:
            place["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return found


def find_gpus(device: str) -> list[str]:
    """The GPUs that `device` means, as CUDA_VISIBLE_DEVICES names them; none for the CPU.

    Raises:
        UserError: There is no such device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not re.fullmatch("[0-9]{1,4}", index))):
        raise UserError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (named.split(",") if named else [str(i) for i in range(count)])[:count]
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device {device!r} is not there: {count} CUDA devices found; use auto or cpu")
    return [visible[int(index)]] if index else visible


def _manifest(suite: SuiteSpec, runs: Sequence[Resolved], names: dict[str, str], command: str) -> dict[str, Any]:
    """What `status` and `report` need to know about the suite without resolving it again."""
    return {
        "suite": suite.model_dump(mode="json"),
        "run_ids": [r.run_id for r in runs],
        "float_ids": sorted({r.float_id for r in runs}),
        "labels": names,
        "skips": {r.run_id: scrub(r.skip) for r in runs if r.skip},
        "command": command,
    }


def _write_skipped(runs: Sequence[Resolved], records: dict[str, dict[str, Any] | None], store: Store) -> None:
    for run in runs:
        if run.skip and records[run.run_id] is None:
            store.write(unmeasured("skipped", run, run.skip))


def _tell_plan(
    console: Console, suite: str, entries: Sequence[Entry], todo: int, floats: int, workers: int, retry_failed: bool
) -> None:
    """One line of numbers, and what failed before, if that is not tried again."""
    numbers = {s: sum(e.state == s for e in entries) for s in ("done", "failed", "skipped")}
    parts = [f"{n} {word}" for word, n in numbers.items() if n]
    parts.append(f"{todo} to run" if todo else "nothing to run")
    if todo:
        parts += [f"{floats} float network{'s' * (floats != 1)} to train"] if floats else []
        parts.append(f"{workers} worker{'s' * (workers != 1)}")
    console.print(f"{suite}: {len(entries)} runs: {', '.join(parts)}", highlight=False, soft_wrap=True)
    if retry_failed:
        return
    for entry in entries:
        if entry.state == "failed":
            line = f"[red]failed[/] {escape(entry.label)}: {escape(str(entry.reason))}"
            console.print(f"{line} [dim](not tried again without --retry-failed)[/]", highlight=False, soft_wrap=True)


def _tell_end(console: Console, progress: Progress, launch: _Launch, command: str, time_limit: str | None) -> None:
    """How to go on, if it was stopped."""
    if launch.signal or launch.late or progress.broken_off:
        runs = f"{progress.broken_off} run{'s' * (progress.broken_off != 1)}"
        what = f"The machine ended {runs}" if progress.broken_off else f"Time limit of {time_limit} reached"
        what = "Interrupted" if launch.signal else what
        numbers = f"{progress.done} of {progress.total} runs are done, nothing finished is lost"
        console.print(f"{what}: {numbers}. Go on with: {command}", highlight=False, soft_wrap=True, markup=False)
