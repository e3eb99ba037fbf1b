"""Files as their owners publish them: fetched whole, and checked against their hash.

FILE            whole and verified; until it is, there is none
FILE.part       what has come so far; the next fetch goes on from there
FILE.part.from  what it is a part of: a hash of the address, and the server's ETag or date
FILE.lock       held by the process that fetches, while others wait; it stays
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib import error, request
from urllib.parse import urlsplit

from .disk import locked, no_link, one_line, replace_file
from .errors import UserError

TIMEOUT = 30.0  # seconds, to connect and then between two bytes
LONGEST = 60.0  # seconds, of a pause between two attempts
ENOUGH = 2**20  # bytes: an attempt that brings so many is no failed one, or a large file would never arrive
CHUNK = 2**18  # bytes

_HTTP = (  # build_opener would also open file://, ftp:// and data:
    request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler,
    request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler, request.UnknownHandler,
)  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """A file as its owner publishes it.

    Attributes:
        path: Where it lies, relative to a data root, with slashes.
        urls: The owner's address first, then mirrors; empty if it is only to be had by hand.
        sha256: Only where it was computed or published.
        md5: Where the publisher gives only that.
        size: Bytes, where known.
        accept: sha256 of other files known to hold the same content, e.g. packed anew.
        unpack: The folder, relative to a data root, that holds the archive's members.
        tried: Whether one of the addresses was tried from where this was written.
        note: How to get it by hand (form, login).
    """

    path: str
    urls: tuple[str, ...] = ()
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    accept: tuple[str, ...] = ()
    unpack: str | None = None
    tried: bool = False
    note: str = ""

    @property
    def hashes(self) -> dict[str, str]:
        """Algorithm -> hexadecimal digest, of those that are known."""
        return {k: v.lower() for k, v in (("sha256", self.sha256), ("md5", self.md5)) if v}


class _Cut(Exception):
    """This attempt failed; another one may not."""


class _Stale(_Cut):
    """What came earlier is no part of what this address has now."""


class _Refused(Exception):
    """This address will not give the file."""


_Tell = Callable[[int, float], None]  # bytes so far, bytes in all


def fetch(remote: Remote, folder: Path, *, show: bool = True, attempts: int = 5, pause: float = 1.0) -> Path:
    """The file at ``folder/remote.path``, verified; downloaded if it is not there. Of two processes one works, one waits.

    Args:
        remote: What to fetch.
        folder: The data root.
        show: A progress bar, if stderr is a terminal.
        attempts: How often in a row an address may fail before the next is tried.
        pause: Seconds after the first failure; doubled after each further one.

    Raises:
        UserError: It cannot be had, or is not what its owner published.
    """
    path = Path(folder) / remote.path
    if not _there(path):
        if not remote.urls:
            raise UserError(f"{path} is missing, and no address is known to fetch it from; {_by_hand(path, remote)}")
        with locked(path, show):
            if not _there(path):  # else another process has fetched it while this one waited
                return _download(remote, path, show, attempts, pause)
    verify(path, remote)
    return path


def verify(path: Path, remote: Remote) -> None:
    """Read the whole file and compare size, sha256 and md5, as far as they are known.

    Raises:
        UserError: One differs, or the file cannot be read.
    """
    try:
        wrong = _mismatch(path, remote)
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror or failure}; {_by_hand(path, remote)}") from None
    if wrong:
        how = "delete it and fetch it again (qatbench data prepare)" if remote.urls else _by_hand(path, remote)
        raise UserError(f"{path} is not the file that was published: {wrong}; {how}")


def _mismatch(path: Path, remote: Remote) -> str:
    """What differs from the published file; empty if nothing does."""
    size = path.stat().st_size
    if remote.accept and _digest(path, "sha256") in remote.accept:
        return ""
    if remote.size not in (None, size):
        return f"it has {size:,} bytes, expected {remote.size:,}"
    for name, expected in remote.hashes.items():
        if (found := _digest(path, name)) != expected:
            return f"its {name} is {found}, expected {expected}"
    return ""


def _digest(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _there(path: Path) -> bool:
    if os.path.isfile(path):
        return True
    if os.path.lexists(path):
        raise UserError(f"{path} should be a file, but is a folder, or a link that leads to no file; move it away")
    return False


def _by_hand(path: Path, remote: Remote) -> str:
    return f"put the file there by hand{f' ({remote.note})' if remote.note else ''}: {path}"


# ---- download


def _download(remote: Remote, path: Path, show: bool, attempts: int, pause: float) -> Path:
    part = Path(f"{path}.part")
    reasons = []
    with one_line(path), _bar(path.name, show) as tell:
        for url in remote.urls:
            try:
                _download_from(url, remote, part, attempts, pause, tell)
            except _Refused as reason:
                reasons.append(f"{_without_keys(url)}: {reason}")
                continue
            os.replace(part, path)
            _drop(part)
            return path
    raise UserError(
        f"cannot fetch {path.name} ({'; '.join(reasons)}); give --data-root if it is here, or {_by_hand(path, remote)}"
    )


def _download_from(url: str, remote: Remote, part: Path, attempts: int, pause: float, tell: _Tell) -> None:
    """Bring `part` to the whole, verified file, in several attempts; else _Refused."""
    failed, furthest = 0, _size(part)
    while True:
        try:
            return _attempt(url, remote, part, tell)
        except _Cut as cut:
            if isinstance(cut, _Stale):
                _drop(part)
            if _size(part) >= furthest + ENOUGH:
                failed, furthest = 0, _size(part)
            failed += 1
            if failed >= attempts:
                raise _Refused(f"{cut}, {attempts} times" if attempts > 1 else str(cut)) from None
            time.sleep(min(pause * 2 ** (failed - 1), LONGEST))


def _attempt(url: str, remote: Remote, part: Path, tell: _Tell) -> None:
    condition = _condition(url, part)
    have = _size(part) if condition or remote.hashes else 0  # else nothing would show that the file has changed
    if not have or have != remote.size:
        with _ask(url, have, condition) as answer:
            have, total = _place(answer, have, condition)
            if remote.size is not None and total not in (None, remote.size):
                raise _Refused(f"has {total:,} bytes, expected {remote.size:,}")
            if total is None and not (answer.chunked or remote.hashes or remote.size):
                raise _Refused("does not say how long the file is, and nothing is known to check it against")
            _receive(answer, url, part, have, remote.size if total is None else total, tell)
    wrong = _web_page(part) or _mismatch(part, remote)
    if wrong and have:  # its beginning may be another mirror's
        raise _Stale(wrong)
    if wrong:
        _drop(part)
        raise _Refused(wrong)


def _condition(url: str, part: Path) -> str:
    """What the server must say of its file, to show that `part` is still a part of it; empty if that is not known."""
    with suppress(OSError, ValueError):
        origin, condition = Path(f"{part}.from").read_text("utf-8").split("\n")
        if origin == _sha(url):
            return condition
    return ""


def _validator(answer: http.client.HTTPResponse) -> str:
    """What changes when the file does; empty if the server says nothing of that kind."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")  # a weak tag stays when bytes change


def _ask(url: str, have: int, condition: str) -> http.client.HTTPResponse:
    headers = {"User-Agent": "qatbench"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if have and condition:
        headers["If-Range"] = condition
    opener = request.OpenerDirector()
    for handler in _HTTP:
        opener.add_handler(handler())
    try:
        answer = opener.open(request.Request(url, headers=headers), timeout=TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as failure:
        if isinstance(failure, error.HTTPError):
            failure.close()
        raise _reason(failure) from None
    return cast(http.client.HTTPResponse, answer)


def _place(answer: http.client.HTTPResponse, have: int, condition: str) -> tuple[int, int | None]:
    """Where in the file the answer belongs, and how long the whole file is, where the server says so."""
    if answer.status == 200:
        return 0, answer.length
    if answer.status != 206 or not have:
        raise _Refused(f"answered {answer.status} {http.client.responses.get(answer.status, '')}".rstrip())
    told = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", answer.headers.get("Content-Range", ""))
    if not told or int(told[1]) != have or (condition and _validator(answer) not in ("", condition)):
        raise _Stale("went on with another part of the file, or with another file")
    return have, None if told[2] == "*" else int(told[2])


def _receive(
    answer: http.client.HTTPResponse, url: str, part: Path, start: int, expected: int | None, tell: _Tell
) -> None:
    """Write the answer's bytes to `part`, from `start` on."""
    end = math.inf if expected is None else expected
    done = start
    with open(part, "ab" if start else "wb", opener=no_link) as out:
        if not start:  # after the old bytes have gone: they must not pass for those of this address
            replace_file(Path(f"{part}.from"), f"{_sha(url)}\n{_validator(answer)}".encode())
        answer.length = None  # we count ourselves, to see a body that is longer than it says
        while done <= end and (chunk := _read(answer, done == end)):
            out.write(chunk)
            done += len(chunk)
            tell(done, end)
        out.flush()
        os.fsync(out.fileno())  # a crash must not leave the name without the bytes
    if expected is not None and done < expected:
        raise _Cut(f"was cut off at {done:,} of {expected:,} bytes")
    if done > end:
        _drop(part)
        raise _Refused(f"sends more than the {expected:,} bytes that were announced")


def _read(answer: http.client.HTTPResponse, whole: bool) -> bytes:
    try:
        return answer.read1(CHUNK)
    except (OSError, http.client.HTTPException, ValueError) as failure:
        if whole:  # the server should have closed the connection
            return b""
        raise _reason(failure) from None


def _reason(failure: Exception) -> _Cut | _Refused:
    """In words of ours: what a server or an exception says may hold keys, control characters or a page of text."""
    if isinstance(failure, error.HTTPError):
        if 300 <= failure.code < 400:
            return _Refused("redirects in a circle, or to what is not http(s)")
        if failure.code == 416:
            return _Stale("has fewer bytes than had come before")
        kind = _Cut if failure.code >= 500 or failure.code in (408, 425, 429) else _Refused
        return kind(f"answered {failure.code} {http.client.responses.get(failure.code, '')}".rstrip())
    cause = failure.reason if isinstance(failure, error.URLError) else failure
    if isinstance(cause, TimeoutError):
        return _Cut(f"gave no answer for {TIMEOUT:g} s")
    if isinstance(cause, socket.gaierror):  # trying again for a minute helps nobody who has no network
        return _Refused("there is no such server, or no network")
    if isinstance(cause, OSError):
        return _Cut((cause.strerror or "connection closed").lower())
    if isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.InvalidURL):
        return _Cut("was cut off" if isinstance(cause, http.client.IncompleteRead) else "gave no valid HTTP answer")
    return _Refused("is, or leads to, no http(s) address")


def _web_page(part: Path) -> str:
    """Login forms and "are you sure" pages come with status 200."""
    with open(part, "rb") as file:
        head = file.read(256).lstrip().lower()
    return "gives a web page, not the file" if head.startswith((b"<!doctype html", b"<html")) else ""


def _without_keys(url: str) -> str:
    """The address as it may be shown and logged."""
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname:
            return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    return "an address without a server"


def _sha(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    Path(f"{part}.from").unlink(missing_ok=True)


@contextmanager
def _bar(name: str, show: bool) -> Iterator[_Tell]:
    from rich import progress
    from rich.console import Console
    from rich.markup import escape

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    hidden = not (show and sys.stderr.isatty())
    with progress.Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(escape(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=None if total == math.inf else total)
