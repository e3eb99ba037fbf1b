"""Where results live: a folder a run, one JSON record in each, written whole or not at all, and checked when it is read.

    <store>/<run id>/          result.json, last.ckpt, best.pt, metrics.csv, log.txt, wandb/
    <store>/float/<float id>/  the float network that runs start from
    <store>/suites/NAME.json   which runs a suite asked for, and by which command
    <store>/locks/             one lock a run and a float network; the system frees it when its holder dies
    <store>/data/              prepared data sets

The records are the truth; the rest can be made again. A record holds a digest of itself and of the weights beside it.
"""

from __future__ import annotations

import errno
import gc
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from .disk import (
    BIGGEST,
    FULL,
    Damaged,
    changed,
    create_file,
    file_digest,
    parse_json,
    read_file,
    read_json,
    sealed_json,
    temporary_name,
    write_json,
)
from .errors import UserError, nearest
from .paths import usable
from .spec import content_hash

SCHEMA = 2
"""Of records and of float results: 2 brought the digests. Without them a number cannot be checked, so 1 is not read."""

STATUSES = ("done", "failed", "skipped")
RECORD = "result.json"
NET = "net.pt"

_OWN = frozenset({"float", "suites", "locks", "data"})
_SECTIONS = ("metrics", "cost", "time", "files", "provenance", "wandb")
_NAMED = 20  # known runs in a message
_NAME = re.compile(r"\w[\w.+-]*")
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_SHARES = re.compile(r"acc(_\w+)?|bacc|ece")
"""Metrics that are from 0 to 1; all others are finite."""


class BusyError(Exception):
    """Another process holds the lock."""


class Store:
    """A folder of results. Reading needs nothing but read permission; folders are made when something is written.

    Attributes:
        root: The folder.
        aside: (file, reason) of what was met and is no record. Such files are left where they are.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = usable(root, "store")
        self.aside: list[tuple[Path, str]] = []
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"store {self.root} is a file; give a folder with --store")

    @property
    def cache(self) -> Path:
        """The folder of prepared data sets."""
        return self.root / "data"

    def path(self, run_id: str) -> Path:
        """The run's folder, there or not."""
        return self.root / _plain(run_id)

    def float_path(self, float_id: str) -> Path:
        """The float network's folder, there or not."""
        return self.root / "float" / _plain(float_id)

    def log_path(self, run_id: str) -> Path:
        """What the run said."""
        return self.path(run_id) / "log.txt"

    # ---- records

    def read(self, run_id: str) -> dict[str, Any] | None:
        """The run's record; None if it has none, or none that can be read (then it is named in `aside`)."""
        path = self.path(run_id) / RECORD
        try:
            return _load(str(path), run_id)
        except FileNotFoundError:
            return None
        except Damaged as bad:
            if (path, str(bad)) not in self.aside:
                self.aside.append((path, str(bad)))
            return None

    def records(self) -> list[dict[str, Any]]:
        """Every valid record, sorted by run id. What is no valid record is named in `aside`, and never touched."""
        found, self.aside = [], []
        collecting = gc.isenabled()
        gc.disable()  # half of the time for 100,000 records went into looking for garbage among them
        try:
            for run_id in self._folders():
                path = f"{self.root}{os.sep}{run_id}{os.sep}{RECORD}"
                try:
                    found.append(_load(path, run_id))
                except FileNotFoundError:
                    continue  # not finished
                except Damaged as bad:
                    self.aside.append((Path(path), str(bad)))
        finally:
            if collecting:
                gc.enable()
        return found

    def write(self, record: dict[str, Any]) -> None:
        """Write a finished run's record, whole or not at all.

        A `done` record is never replaced, also where locks do not work: a record takes a name that is free, or none. A
        file that is no record (truncated, changed, of another schema) is kept beside the new one, as ``result.json.aside-1``.
        """
        run_id = record["run_id"]
        record = _finite({**record, "schema": SCHEMA})
        try:
            _check(record, run_id)
        except Damaged as bad:
            raise UserError(f"the record of run {run_id} cannot be kept: {bad}") from None
        path = self.path(run_id) / RECORD
        with writing(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(100):  # another process may be as fast, again and again
                try:
                    return create_file(path, sealed_json(record))
                except FileExistsError:
                    self._make_way(path, run_id)
        raise UserError(f"{path} is written by other processes all the time; see which: qatbench status")

    def _make_way(self, path: Path, run_id: str) -> None:
        """Take a record that is not `done` out of the way of a new one.

        What was moved is looked at again: between look and move, another machine may have published a `done` one.
        """
        done = UserError(f"run {run_id} is done already: its record in {path} is never overwritten")
        moved = temporary_name(path)
        try:
            if _status(path, run_id) == "done":
                raise done
            path.rename(moved)
        except FileNotFoundError:
            return  # somebody else was faster
        status = _status(moved, run_id)
        if status == "done":
            with suppress(FileExistsError):
                os.link(moved, path)
        if status is None:
            moved.rename(_free(path.with_name(f"{RECORD}.aside")))
        else:
            moved.unlink()
        if status == "done":
            raise done

    def find(self, text: str) -> str:
        """The id of the run that has a record and whose id begins with ``text``.

        Raises:
            UserError: There is none (the nearest is named), or more than one.
        """
        known = [run_id for run_id in self._folders() if os.path.lexists(self.root / run_id / RECORD)]
        if text in known:
            return text
        found = [run_id for run_id in known if text and run_id.startswith(text)]
        if len(found) > 1:
            raise UserError(f"run {text!r} may be any of {', '.join(found[:_NAMED])}; give more of its id")
        if not found:
            hint = nearest(text, known) if len(known) <= _NAMED else f"; it holds {len(known):,} others"
            raise UserError(f"there is no run {text!r} in store {self.root}{hint}")
        return found[0]

    def add(self, run_id: str, section: str, value: dict[str, Any]) -> None:
        """Put what was found out after a run into its record, under a key of its own; nothing else in the record changes."""
        path = self.path(run_id) / RECORD
        with self.lock(run_id), writing(self.root):
            try:
                record = _load(str(path), run_id)
            except Damaged as bad:
                raise UserError(f"{path} {bad}") from None
            write_json(path, _check({**record, section: _finite(value)}, run_id))

    # ---- float networks

    def read_float(self, float_id: str) -> dict[str, Any] | None:
        """What is known of a float network whose weights are there and whole; None if it was not trained yet.

        Raises:
            Damaged: Its result or its weights are not as they were written; the message names the file.
        """
        folder = self.float_path(float_id)
        try:
            result = _load_float(folder / RECORD, float_id)
        except FileNotFoundError:
            return None
        check_digest(folder / NET, result["files"][NET])
        return result

    def has_float(self, float_id: str) -> bool:
        """Whether the float network is there, whole."""
        try:
            return self.read_float(float_id) is not None
        except Damaged:
            return False

    # ---- suites

    def write_suite(self, name: str, manifest: dict[str, Any]) -> None:
        """Keep which runs a suite asked for: ``{"suite": {...}, "run_ids": [...], "command": "..."}``."""
        with writing(self.root):
            write_json(self._suite(name), {"schema": SCHEMA, **_finite(manifest)})

    def read_suite(self, name: str) -> dict[str, Any] | None:
        """The suite's manifest; None if it was never launched on this store.

        Raises:
            UserError: It cannot be read, or is not as it was written.
        """
        path = self._suite(name)
        try:
            return _manifest(read_json(path))
        except FileNotFoundError:
            return None
        except Damaged as bad:
            raise UserError(f"{path} {bad}; write it again: qatbench sweep {name}") from None

    def suites(self) -> list[str]:
        """The names of the suites launched on this store."""
        return sorted(p.stem for p in (self.root / "suites").glob("*.json"))

    # ---- locks

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock of a run or a float network; the same thread may take it again.

        Raises:
            BusyError: Another process holds it, and `wait` is false.
        """
        lock = self._lock(name)
        with writing(self.root):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held = _file_lock(lock)
            try:
                _acquire(held, wait)
            except Timeout:
                raise BusyError(f"{name} is locked by another process") from None
        try:
            yield
        finally:
            with suppress(OSError):  # a lock that cannot be given back is free when this process ends
                held.release()

    def locked(self, name: str) -> bool:
        """Whether a process holds the lock now."""
        if not self._lock(name).exists():
            return False
        try:
            with self.lock(name, wait=False):
                return False
        except BusyError:
            return True
        except UserError:
            return False  # a store that we may only read: nobody's lock can be asked after

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{_plain(name)}.lock"

    def _suite(self, name: str) -> Path:
        return self.root / "suites" / f"{_plain(name)}.json"

    def _folders(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if e.name not in _OWN and e.is_dir())
        except FileNotFoundError:
            return []
        except PermissionError:
            raise UserError(f"store {self.root} may not be read; choose another with --store") from None


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written to into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _READ_ONLY:
            raise UserError(f"store {root} is read-only; choose another with --store or QATBENCH_STORE") from error
        if error.errno in FULL:
            raise UserError(f"no space left on the disk of store {root}; free some and try again") from error
        place = error.filename or root
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"store {root}: {place} is in the way of a folder; move it") from error
        if error.errno in (errno.EISDIR, errno.ELOOP):
            raise UserError(f"store {root}: {place} is in the way of a file; move it") from error
        reason = error.strerror or error
        raise UserError(f"store {root}: {place}: {reason}; mend that, or choose another with --store") from error


def check_digest(path: Path, digest: Any) -> None:
    """Hold a file of weights against the digest in a record.

    Raises:
        Damaged: It is missing, or another; the message names it.
    """
    try:
        found = file_digest(path)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
        raise Damaged(f"{path} {reason}") from None
    if found != digest:
        raise Damaged(f"{path} has changed since it was written: its digest is another than {RECORD} says")


def _acquire(held: BaseFileLock, wait: bool) -> None:
    """Take a lock; one line if the file system has none to give. Timeout: another process holds it."""
    for patience in (2, 1, 0):
        try:
            held.acquire(timeout=-1 if wait else 0, poll_interval=0.2)
            return
        except NotImplementedError as error:
            raise UserError(_no_locks(held, error)) from None
        except OSError as error:
            if isinstance(error, Timeout) or error.errno in (*_READ_ONLY, *FULL, errno.EISDIR, errno.ELOOP):
                raise
            if not patience or error.errno not in (errno.EINTR, errno.ESTALE):
                raise UserError(_no_locks(held, error)) from None


def _no_locks(held: BaseFileLock, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"cannot lock {held.lock_file}: {reason}; put the store on a file system with locks (--store)"


def _file_lock(path: Path) -> BaseFileLock:
    return FileLock(path, is_singleton=True)  # one object a file, so that the same thread can take it twice


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a run or suite: letters, digits, '.', '_', '+' and '-' only")
    return name


def _free(path: Path) -> Path:
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{n}")).exists())


def _load(path: str, run_id: str) -> dict[str, Any]:
    record, intact = parse_json(read_file(path, BIGGEST))
    _check_schema(record, intact)
    return _check(record, run_id)


def _status(path: Path, run_id: str) -> str | None:
    """The status of a record; None if it is none."""
    try:
        return _load(str(path), run_id)["status"]
    except Damaged:
        return None


def _load_float(path: Path, float_id: str) -> dict[str, Any]:
    try:
        result, intact = parse_json(read_file(path, BIGGEST))
        _check_schema(result, intact)
        if result.get("float_id") != float_id:
            raise Damaged(f"is of float network {result.get('float_id')!r}")
        for section in ("metrics", "files"):
            if not isinstance(result.get(section), dict):
                raise Damaged(f"{section} is not a table")
        if not isinstance(result["files"].get(NET), str):
            raise Damaged(f"has no digest of {NET}")
        _check_metrics(result["metrics"])
    except Damaged as bad:
        raise Damaged(f"{path} {bad}") from None
    return result


def _check_schema(record: dict[str, Any], intact: bool) -> None:
    schema = record.get("schema")
    if type(schema) is not int or schema < 1:
        raise Damaged("not a qatbench record: it names no schema")
    if schema > SCHEMA:
        raise Damaged(f"of schema {schema}, later than this qatbench's {SCHEMA}; upgrade qatbench to read it")
    if schema < SCHEMA:
        raise Damaged(f"of schema {schema}, without the digest that it could be checked by; run it again")
    if not intact:
        raise Damaged(f"{changed(record)}; run it again")


def _check(record: dict[str, Any], run_id: str) -> dict[str, Any]:
    """The record itself, with every section there, or Damaged."""
    if record.get("run_id") != run_id:
        raise Damaged(f"is of run {record.get('run_id')!r}, but lies in the folder of {run_id!r}")
    if record.get("status") not in STATUSES:
        raise Damaged(f"status {record.get('status')!r} is none of {', '.join(STATUSES)}")
    if not isinstance(record.get("spec"), dict):
        raise Damaged("has no spec")
    for section in _SECTIONS:
        if record.get(section) is None:
            record[section] = {}
        elif not isinstance(record[section], dict):
            raise Damaged(f"{section} is not a table")
    _check_metrics(record["metrics"])
    for section in ("cost", "time"):
        for name, value in record[section].items():
            _check_number(f"{section} {name!r}", value, 0.0, math.inf)
    recalls_of = record.get("per_class")
    for domain, recalls in recalls_of.items() if isinstance(recalls_of, dict) else ():
        for recall in recalls if isinstance(recalls, list) else []:
            _check_number(f"a class of {domain!r}", recall, 0.0, 1.0)
    _check_name(record, run_id)
    record.setdefault("reason", None)
    return record


def _check_metrics(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if value is not None and type(value) not in (int, float):
            raise Damaged(f"metric {name!r} is {value!r}, not a number")
        kind = [*name.removeprefix("float/").split("/"), ""][1]
        low, high = (0.0, 1.0) if _SHARES.fullmatch(kind) else (-math.inf, math.inf)
        _check_number(f"metric {name!r}", value, low, high)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return  # the caller asks for numbers, where there is nothing else
    if not math.isfinite(value) or not low <= value <= high:
        raise Damaged(f"{name} is {value!r}, not a number from {low:g} to {high:g}")


def _check_name(record: dict[str, Any], run_id: str) -> None:
    """Hold the run's id against the hash of what determines its number: no number stands under another method's name."""
    provenance = record["provenance"]
    if "code" not in provenance and record["status"] != "done":
        return  # skipped, or failed before anything was known
    named = {"spec": record["spec"], "code": provenance.get("code"), "data": provenance.get("data")}
    if content_hash(named) != run_id:
        raise Damaged("its spec, code and data are not those that its run id stands for")


def _manifest(value: dict[str, Any]) -> dict[str, Any]:
    for key, kind in {"run_ids": list, "float_ids": list, "labels": dict, "skips": dict, "command": str}.items():
        if not isinstance(value.get(key, kind()), kind) or (key == "run_ids" and key not in value):
            raise Damaged(f"has no {key}")
    names = [*value["run_ids"], *value.get("float_ids", [])]
    texts = [*value.get("labels", {}).values(), *value.get("skips", {}).values()]
    if not all(isinstance(i, str) and _NAME.fullmatch(i) for i in names) or not all(isinstance(t, str) for t in texts):
        raise Damaged("names something that is no run")
    return value


def _finite(value: Any) -> Any:
    """The same with NaN and infinity, which JSON does not know, as None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
