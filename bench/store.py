"""Where results live: a folder a run, one JSON record in each, written whole or not at all.

    <store>/<run id>/          result.json, last.ckpt, metrics.csv, log.txt, wandb/
    <store>/float/<float id>/  the float network that runs start from
    <store>/suites/NAME.json   which runs a suite asked for, and by which command
    <store>/locks/             one lock a run and a float network; the system frees it when its holder dies
    <store>/data/              prepared data sets

The records are the truth; the rest can be made again.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from .errors import UserError, nearest

SCHEMA = 1
STATUSES = ("done", "failed", "skipped")
RECORD = "result.json"

_OWN = frozenset({"float", "suites", "locks", "data"})
_SECTIONS = ("metrics", "cost", "time", "provenance", "wandb")
_NAMED = 20  # known runs in a message
_BIGGEST = 16 * 2**20  # a record is some kilobytes; whatever is larger was not written by us
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BusyError(Exception):
    """Another process holds the lock."""


class RecordError(Exception):
    """The file is no record that this version can read; the message says why."""


class Store:
    """A folder of results. Reading needs nothing but read permission; folders are made when something is written.

    Attributes:
        root: The folder.
        aside: (file, reason) of what was met and is no record. Such files are left where they are.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()
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
        except RecordError as bad:
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
                except RecordError as bad:
                    self.aside.append((Path(path), str(bad)))
        finally:
            if collecting:
                gc.enable()
        return found

    def write(self, record: dict[str, Any]) -> None:
        """Write a finished run's record, whole or not at all.

        A `done` record is never replaced. A file that is no record (truncated, foreign, of a later schema) is kept
        beside the new one, as ``result.json.aside-1``.
        """
        run_id = record["run_id"]
        record = _finite({**record, "schema": SCHEMA})
        _check(record, run_id)
        path = self.path(run_id) / RECORD
        with writing(self.root):
            try:
                old = _load(str(path), run_id)
            except FileNotFoundError:
                old = None
            except RecordError:
                old = None
                path.rename(_free(path.with_name(f"{RECORD}.aside")))
            if old and old["status"] == "done":
                raise UserError(f"run {run_id} is done already: its record in {path} is never overwritten")
            write_json(path, record)

    def find(self, text: str) -> str:
        """The id of the run that has a record and whose id begins with ``text``.

        Raises:
            UserError: There is none (the nearest is named), or more than one.
        """
        known = [run_id for run_id in self._folders() if (self.root / run_id / RECORD).exists()]
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
            record = _load(str(path), run_id)
            write_json(path, {**record, section: _finite(value)})

    # ---- suites

    def write_suite(self, name: str, manifest: dict[str, Any]) -> None:
        """Keep which runs a suite asked for: ``{"suite": {...}, "run_ids": [...], "command": "..."}``."""
        with writing(self.root):
            write_json(self._suite(name), {"schema": SCHEMA, **manifest})

    def read_suite(self, name: str) -> dict[str, Any] | None:
        """The suite's manifest; None if it was never launched on this store, or cannot be read."""
        try:
            manifest = _parse(str(self._suite(name)))
        except (FileNotFoundError, RecordError):
            return None
        ids = manifest.get("run_ids")
        return manifest if isinstance(ids, list) and all(isinstance(i, str) for i in ids) else None

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
                held.acquire(timeout=-1 if wait else 0, poll_interval=0.2)
            except Timeout:
                raise BusyError(f"{name} is locked by another process") from None
        try:
            yield
        finally:
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
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"store {root}: {error.filename} is in the way of a folder; move it") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: after a crash there is the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _file_lock(path: Path) -> BaseFileLock:
    return FileLock(path, is_singleton=True)  # one object a file, so that the same thread can take it twice


def _plain(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name!r} is no name for a run or suite: letters, digits, '.', '_', '+' and '-' only")
    return name


def _free(path: Path) -> Path:
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{n}")).exists())


def _load(path: str, run_id: str) -> dict[str, Any]:
    return _check(_parse(path), run_id)


def _parse(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > _BIGGEST:
                raise RecordError("too large for a qatbench record")
            text = file.read()
        value = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # ValueError: JSON's and Unicode's
        raise RecordError("truncated, or not JSON") from None
    if not isinstance(value, dict):
        raise RecordError("not a qatbench record")
    return value


def _check(record: dict[str, Any], run_id: str) -> dict[str, Any]:
    """The record itself, with every section there, or RecordError."""
    schema = record.get("schema")
    if type(schema) is not int or schema < 1:
        raise RecordError("not a qatbench record: it names no schema")
    if schema > SCHEMA:
        raise RecordError(f"of schema {schema}, later than this qatbench's {SCHEMA}; upgrade qatbench to read it")
    if record.get("run_id") != run_id:
        raise RecordError(f"is of run {record.get('run_id')!r}, but lies in the folder of {run_id!r}")
    if record.get("status") not in STATUSES:
        raise RecordError(f"status {record.get('status')!r} is none of {', '.join(STATUSES)}")
    if not isinstance(record.get("spec"), dict):
        raise RecordError("has no spec")
    for section in _SECTIONS:
        if record.get(section) is None:
            record[section] = {}
        elif not isinstance(record[section], dict):
            raise RecordError(f"{section} is not a table")
    for name, value in record["metrics"].items():
        if value is not None and type(value) not in (int, float):
            raise RecordError(f"metric {name!r} is {value!r}, not a number")
    record.setdefault("reason", None)
    return record


def _finite(value: Any) -> Any:
    """The same with NaN and infinity, which JSON does not know, as None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
