"""Files on a disk that may be full, shared, damaged or odd: written whole or not at all, read only if they are as written.

A file is written under a temporary name that nobody can foretell, synced, and then renamed (`replace_file`) or linked
(`create_file`, which never replaces anything). A JSON file ends with a digest of the rest of it, which `read_json` checks.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from .errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}$")
_STALE = 24 * 3600  # seconds after which a temporary file of another machine is of a process that died
BIGGEST = 16 * 2**20  # of a JSON file: ours are some kilobytes
_SEAL = re.compile(rb',\n "digest": "([0-9a-f]{64})"\n}\n\Z')
_SEAL_LENGTH = len(b',\n "digest": ""\n}\n') + 64

Content = bytes | memoryview


class Damaged(Exception):
    """A file is not what was written, or not one of ours; the message says what it is, the caller knows its name."""


# ---- Writing


def replace_file(path: Path, content: Content) -> None:
    """Put a file there: after a crash there is the old one or the new one, never half of one, and nothing temporary."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def create_file(path: Path, content: Content) -> None:
    """Put a file there that is not there yet, whole; also where locks do not work, two processes cannot both succeed.

    Raises:
        FileExistsError: There is one, which stays as it is.
    """
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if os.stat(temporary).st_nlink != 2:  # NFS may answer so to a request that it carried out and sent twice
                raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # takes the name
            os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`replace_file` with a table as JSON, sealed by its digest. The folder is made. NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, sealed_json(value))


def sealed_json(value: dict[str, Any]) -> bytes:
    """A table as JSON whose last key, ``digest``, is the SHA-256 of the text without it."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    text = json.dumps(rest, indent=1, allow_nan=False).encode() + b"\n"
    if not rest:
        raise ValueError("an empty table has nothing to seal")
    return text[:-3] + b',\n "digest": "%s"\n}\n' % hashlib.sha256(text).hexdigest().encode()


@contextmanager
def _written(path: Path, content: Content) -> Iterator[Path]:
    """The content in a file of its own beside `path`, on the disk for good; gone in the end, if it has not been renamed."""
    temporary = temporary_name(path)
    # O_EXCL: neither another's file nor the target of a link that somebody has put there.
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flags("O_NOFOLLOW", "O_CLOEXEC"), 0o666)
    try:
        with open(file, "wb", buffering=0) as out:
            rest = memoryview(content).cast("B")
            while rest:
                rest = rest[out.write(rest) :]
            os.fsync(file)
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody can foretell, and that tells whose it is: machine, process, chance."""
    return path.with_name(f"{path.name}.tmp-{_here()}-{os.getpid()}-{secrets.token_hex(8)}")


def clear_temporaries(folder: Path, of: str = "") -> None:
    """Remove what writers that died left in a folder, and what this process left; another process's work stays.

    Args:
        folder: Where.
        of: Only what was to become the file of this name.
    """
    with contextlib.suppress(OSError):
        for path in list(folder.glob(f"{of}*")):
            if (match := _TEMPORARY.search(path.name)) and _abandoned(path, match[1], int(match[2])):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def no_link(path: str, flags: int) -> int:
    """An ``opener`` for `open`: a link is refused, so that nothing is written where somebody else has pointed it."""
    return os.open(path, flags | _flags("O_NOFOLLOW", "O_CLOEXEC"), 0o666)


def _abandoned(path: Path, where: str, process: int) -> bool:
    if where != _here():
        return time.time() - path.lstat().st_mtime > _STALE
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # it is another user's
    return False


@functools.cache
def _here() -> str:
    """Eight digits that stand for this machine, since it was started, and this container: where a process id means a process."""
    parts = [platform.node()]
    for source in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(source())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def _flags(*names: str) -> int:
    return functools.reduce(lambda flags, name: flags | getattr(os, name, 0), names, 0)


# ---- Reading


def read_file(path: Path | str, limit: int | None = None) -> bytes:
    """The bytes of a regular file; a pipe or a device, which may have no end, is not opened.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is something else, cannot be read, or is larger than `limit` bytes.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise Damaged("is a folder, not a file" if stat.S_ISDIR(kind) else "is no file, but a pipe or a device")
        with open(os.open(path, os.O_RDONLY | _flags("O_NONBLOCK", "O_CLOEXEC")), "rb", buffering=0) as file:
            now = os.fstat(file.fileno())
            if not stat.S_ISREG(now.st_mode):
                raise Damaged("is no file, but a pipe or a device")
            if limit is not None and now.st_size > limit:
                raise Damaged(f"has {now.st_size:,} bytes, too many for what it should be")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from None


def read_json(path: Path | str) -> dict[str, Any]:
    """A table that `write_json` wrote, without its digest, which has been checked.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is no such table, or is not as it was written.
    """
    value, intact = parse_json(read_file(path, BIGGEST))
    if not intact:
        raise Damaged(changed(value))
    return value


def parse_json(text: bytes) -> tuple[dict[str, Any], bool]:
    """A table, and whether its digest fits. NaN and Infinity, which JSON does not know, are refused.

    Raises:
        Damaged: It is no JSON, or no table.
    """
    intact = False
    if (seal := _SEAL.search(text[-_SEAL_LENGTH:])) and len(text) > _SEAL_LENGTH:
        digest = hashlib.sha256(text[:-_SEAL_LENGTH])
        digest.update(b"\n}\n")
        intact = digest.hexdigest().encode() == seal[1]
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):  # ValueError: JSON's and Unicode's
        raise Damaged("truncated, or not JSON") from None
    if not isinstance(value, dict):
        raise Damaged("not a table of ours")
    if intact:
        del value["digest"]
    return value, intact


def changed(value: dict[str, Any]) -> str:
    """What to say of a table whose digest does not fit."""
    if "digest" not in value:
        return "holds no digest by which it could be checked"
    return "has changed since it was written: its digest is that of another content"


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def file_digest(path: Path, again: bool = False) -> str:
    """The SHA-256 of a file's bytes, read without a map of them in memory.

    A process reads a file once, unless size, inode or one of its times has changed since; the time of change (ctime) also
    moves when the time of writing is set back.

    Args:
        path: The file.
        again: Read it, whatever is known of it.

    Raises:
        OSError: It cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | _flags("O_NONBLOCK", "O_CLOEXEC")), "rb", buffering=0) as file:
        now = os.fstat(file.fileno())
        if not stat.S_ISREG(now.st_mode):
            raise OSError(errno.EINVAL, "is no file, but a pipe or a device", str(path))
        key = (os.path.abspath(path), now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns)
        if again or key not in _digests:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


_digests: dict[tuple[Any, ...], str] = {}


# ---- Locks, and one line for what goes wrong


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
def one_line(path: Path, mend: str = "mend that or choose another folder") -> Iterator[None]:
    """Turn a full disk or a folder that may not be written to into one line that names `path` and ends with `mend`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            line = f"no space left on the disk of {path.parent} for {path.name}; free some and start again"
        else:
            line = f"cannot write {path}: {error.strerror or error}; {mend}"
        raise UserError(line) from error
