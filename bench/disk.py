"""Files that several processes may want at once, on a disk that may be full: a lock, and one line for what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from .errors import UserError
from .store import FULL


@contextmanager
def locked(path: Path, show: bool = False) -> Iterator[None]:
    """Of the processes that make `path`, let one work while the others wait. `PATH.lock` stays; its folder is made.

    Args:
        path: What is made under the lock.
        show: Say so while waiting, if stderr is a terminal.
    """
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if show and sys.stderr.isatty():
                print(f"waiting for another process that makes {path.name}", file=sys.stderr)
            lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written to into one line that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            line = f"no space left on the disk of {path.parent} for {path.name}; free some and start again"
        else:
            line = f"cannot write {path}: {error.strerror or error}; mend that or choose another folder"
        raise UserError(line) from error
