"""A worker process: takes jobs from its parent, trains them, tells how far it is. ``python -m qatbench.sweeps.worker``.

Jobs come pickled on standard input and events leave on standard output; while a job runs, whatever it prints, in Python
or in C, goes to the run's own log. A worker whose parent died ends at once: nothing runs on unseen.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ..bench.errors import RunFailed, UserError, trouble
from ..bench.fit import one_line
from ..bench.resolve import Resolved
from ..bench.secrets import scrub, scrub_file
from ..bench.store import BusyError, Store, writing
from .status import float_lock

Send = Callable[..., None]


@dataclass(frozen=True)
class Setting:
    """What all jobs of a sweep share."""

    store: Path
    suite: str
    data_root: Path | None = None
    device: str = "auto"
    wandb: bool = True
    plugins: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Job:
    """A float network to train, or a run.

    Attributes:
        float_net: Train the float network that `resolved` starts from, and not the run itself.
        resolved: The run.
        label: Its name, for people.
        known: The record it had when the sweep began (a failed one that is to be tried again). Any other record that is
            there by now was written by another process, and is taken as it is.
    """

    float_net: bool
    resolved: Resolved
    label: str
    known: dict[str, Any] | None = None

    @property
    def lock(self) -> str:
        """The name of the lock that whoever trains it holds; the runner's own."""
        return float_lock(self.resolved.float_id) if self.float_net else self.resolved.run_id

    def log(self, store: Store) -> Path:
        """What it said."""
        return self.float_folder(store) / "log.txt" if self.float_net else store.log_path(self.resolved.run_id)

    def float_folder(self, store: Store) -> Path:
        """Where the float network is, or will be."""
        return store.float_path(self.resolved.float_id)

    def has_float(self, store: Store) -> bool:
        """Whether the float network is trained, and whole."""
        return store.has_float(self.resolved.float_id)


def unmeasured(status: str, resolved: Resolved, reason: str, log: Path | None = None) -> dict[str, Any]:
    """The record of a run that was skipped, or that could not tell itself how it failed."""
    return {
        "run_id": resolved.run_id,
        "status": status,
        "reason": scrub(reason),
        "spec": resolved.spec.model_dump(mode="json"),
        "provenance": {"code": resolved.code, "data": resolved.data_hash, "log": log and str(log)},
    }


def main() -> None:
    """Read jobs until the parent says that there are no more."""
    events, commands = os.fdopen(os.dup(1), "wb", buffering=0), os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)  # a stray print must not land among the events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    signal.signal(signal.SIGTERM, _die)
    faulthandler.enable()
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, jobs), daemon=True).start()
    send = _sender(events)

    setting: Setting = jobs.get()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ..bench import registry, runner  # torch and Lightning, once for all jobs

    for plugin in setting.plugins:
        registry.load_file(plugin)
    send("ready")
    store = Store(setting.store)
    while (job := jobs.get()) is not None:
        _do(job, setting, store, runner, send)


def _die(number: int, _: object) -> None:
    """Die of the signal at once: Lightning would go on to the end of the batch, and then end as if nothing had happened."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _listen(commands: IO[bytes], jobs: queue.SimpleQueue) -> None:
    with contextlib.suppress(EOFError):
        while True:
            jobs.put(command := pickle.load(commands))
            if command is None:
                return
    if os.getpgrp() == os.getpid():  # take along what the run started, e.g. the W&B service
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _sender(events: IO[bytes]) -> Send:
    lock = threading.Lock()  # a progress event may come from another thread

    def send(kind: str, value: Any = None) -> None:
        try:
            with lock:
                events.write(pickle.dumps((kind, value)))
        except BrokenPipeError:
            os._exit(1)

    return send


def _fresh_peak() -> None:
    """Forget the peak memory of the jobs before, so that a run reports its own (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _do(job: Job, setting: Setting, store: Store, runner: Any, send: Send) -> None:
    try:
        with writing(store.root), store.lock(job.lock, wait=False):
            if (there := _there(job, store)) is not None:
                send(*there)
                return
            with _logged(job.log(store)):
                _fresh_peak()
                try:
                    send(*_train(job, setting, store, runner, send))
                except Exception as error:
                    print(scrub(traceback.format_exc()), end="", file=sys.stderr)
                    _give_back(job, error, store, send)
    except BusyError:
        send("busy")
    except (UserError, OSError) as error:
        send("unwritable", scrub(str(error)))


def _there(job: Job, store: Store) -> tuple[str, Any] | None:
    """What another process has left there since the sweep began."""
    if job.float_net:
        return ("float", None) if job.has_float(store) else None
    now = store.read(job.resolved.run_id)
    return ("elsewhere", now) if now is not None and now["status"] != "skipped" and now != job.known else None


def _train(job: Job, setting: Setting, store: Store, runner: Any, send: Send) -> tuple[str, Any]:
    shared: dict[str, Any] = {"data_root": setting.data_root, "device": setting.device}
    shared["progress"] = lambda event: send("progress", event)
    if job.float_net:
        notes: list[str] = []
        runner.train_float(job.resolved, store, **shared, notes=notes)
        return "float", notes
    return "ended", runner.run(job.resolved, store, **shared, wandb=setting.wandb, suite=setting.suite)


def _give_back(job: Job, error: Exception, store: Store, send: Send) -> None:
    """A job that ended otherwise: left if the machine did it, and failed if it was the method or the request."""
    told, reason = isinstance(error, UserError | RunFailed), one_line(error)
    if trouble(error) is not None:
        send("left", reason if told else trouble(error))
        return
    reason = reason if told else f"{type(error).__name__}: {reason}"
    if job.float_net:
        send("no float", reason)
    else:
        record = unmeasured("failed", job.resolved, reason, job.log(store))
        store.write(record)
        send("ended", record)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to the end of `path`, so that C libraries are caught too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}", file=sys.stderr, flush=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        os.dup2(kept, 1)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(log)
        scrub_file(path)


if __name__ == "__main__":
    main()
