"""Archives as they come from elsewhere: unpacked whole or not at all, and never outside their folder.

FOLDER            the members, all of them
FOLDER.unpacking  some of them; removed when it fails, or by the next process if its writer was killed
FOLDER.lock       held by the process that unpacks, while others wait; it stays
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from rich.filesize import decimal

from .disk import locked, one_line
from .errors import UserError

CHUNK = 2**18  # bytes
MEMBERS = 2_000_000  # of an archive; the largest data set that is known here has 1,300,000 images
FOLDERS = 20_000
TINY = 1_000  # files of less than 32 bytes, which no image has: each takes time and a place on the disk
HEADER = 2**20  # bytes of a long name and the like in a tar: tarfile reads it at once, however long it says it is

_DAMAGE = (  # what the readers raise on damaged bytes, besides OSError
    ArithmeticError, EOFError, LookupError, RuntimeError, ValueError,
    lzma.LZMAError, struct.error, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class _Unsafe(Exception):
    """The archive holds what is not unpacked."""


class _Member(NamedTuple):
    name: str
    size: int  # bytes, as its header says
    kind: str  # "file", "folder"; else what it is
    open: Callable[[], IO[bytes]]


def extract(archive: Path, folder: Path, *, most: int = 8 * 2**30) -> Path:
    """Unpack a zip or tar (plain, gz, bz2, xz: judged by content) to `folder`, which appears whole or not at all.

    A `folder` that exists is returned as it is. Each header is checked before its member is written, and its size again
    while it is.

    Args:
        archive: The file.
        folder: Where its members go.
        most: Bytes that the members may have together.

    Raises:
        UserError: The archive is damaged, encrypted or too large, or holds a link, a device, or a path that leads elsewhere.
    """
    if _there(folder):
        return folder
    if not os.access(archive, os.R_OK):
        raise UserError(f"cannot unpack {archive}: there is no such file, or it may not be read")
    with locked(folder), one_line(folder):
        if _there(folder):  # by another process, while this one waited
            return folder
        unpacking = Path(f"{folder}.unpacking")
        shutil.rmtree(unpacking, ignore_errors=True)  # its writer was killed: the lock is ours
        try:
            _unpack(archive, unpacking, folder, most)
            os.sync()  # a crash must not leave the name without the bytes; one call is faster than one a file
            os.rename(unpacking, folder)
        finally:
            shutil.rmtree(unpacking, ignore_errors=True)
    return folder


def _there(folder: Path) -> bool:
    if os.path.isdir(folder):
        return True
    if os.path.lexists(folder):
        raise UserError(f"{folder} should be a folder, but is a file or a link that leads to none; move it away")
    return False


def _unpack(archive: Path, unpacking: Path, folder: Path, most: int) -> None:
    damaged = f"{archive} is no zip or tar archive, or is truncated or corrupt; delete it and fetch it again"
    try:
        unpacking.mkdir()
        files = 0
        with open(archive, "rb") as file:
            for where, member in _members(file, most):
                _write(unpacking / where, member)
                files += member.kind == "file"
        if not files:
            raise _Unsafe("holds no files")
    except _Unsafe as bad:
        how = f"nothing was unpacked; get it anew from its owner, or unpack it by hand to {folder} if you trust it"
        raise UserError(f"archive {archive} {bad}; {how}") from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # bz2's and gzip's way to say it; a seek to before the beginning
            raise UserError(damaged) from error
        raise
    except _DAMAGE as error:
        raise UserError(damaged) from error


def _members(file: IO[bytes], most: int) -> Iterator[tuple[PurePosixPath, _Member]]:
    """What is to be written, with its place in the folder. Of each member the header is checked before it is yielded."""
    total, counts = 0, Counter[str]()
    for member in _headers(file):
        counts[_sort(member)] += 1
        _check_counts(counts)
        where = PurePosixPath(member.name)
        if where.is_absolute() or ".." in where.parts or "\\" in member.name:
            raise _Unsafe(f"holds a path that could lead out of its folder: {member.name!r}")
        if member.kind not in ("file", "folder"):
            raise _Unsafe(f"holds {member.kind}: {member.name!r}")
        if member.size < 0:
            raise tarfile.ReadError("negative size")
        total += member.size
        if total > most:
            what = f"of {decimal(member.size)}" if member.size > most else f"that makes it {decimal(total)} in all"
            raise _Unsafe(f"holds a member {what}, {member.name!r}; at most {decimal(most)} are unpacked")
        made_by_macos = any(p in ("__MACOSX", ".DS_Store") or p.startswith("._") for p in where.parts)
        if where.parts and not made_by_macos:
            yield where, member


def _sort(member: _Member) -> str:
    return "tiny" if member.kind == "file" and member.size < 32 else member.kind


def _check_counts(counts: Counter[str]) -> None:
    """Refuse what would take hours to write, or all of a disk's places for files."""
    for what, found, most in (
        ("members", counts.total(), MEMBERS),
        ("folders", counts["folder"], FOLDERS),
        ("files of less than 32 bytes", counts["tiny"], TINY),
    ):
        if found > most:
            raise _Unsafe(f"holds {found:,} {what}, or more; at most {most:,} are unpacked")


def _write(target: Path, member: _Member) -> None:
    """One member, with the permissions of a new file."""
    written = 0
    try:
        if member.kind == "folder":
            return target.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(target, "xb") as out,
            member.open() as source,
        ):  # "x": nothing is written over, in any case of its name
            while written <= member.size and (chunk := source.read(CHUNK)):
                written += out.write(chunk)
    except (FileExistsError, NotADirectoryError):
        raise _Unsafe(f"holds two members for one place: {member.name!r}") from None
    if written != member.size:
        raise _Unsafe(f"holds a member whose size is not the {member.size:,} bytes it says: {member.name!r}")


# ---- formats


def _headers(file: IO[bytes]) -> Iterator[_Member]:
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"PK"):
        return _zip(file)
    if head.startswith(b"\x1f\x8b"):
        return _tar(cast(IO[bytes], gzip.GzipFile(fileobj=file)))
    if head.startswith(b"BZh"):
        return _tar(bz2.BZ2File(file))
    if head == b"\xfd7zXZ\x00":
        return _tar(lzma.LZMAFile(file))
    return _tar(file)


def _zip(file: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        members = [
            _Member(info.filename, info.file_size, _zip_kind(info), lambda info=info: archive.open(info))
            for info in archive.infolist()
        ]
        _check_counts(Counter(map(_sort, members)))  # all are known before the first is written; a tar's are not
        yield from members


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a symbolic link" if mode == stat.S_IFLNK else "a device, pipe or socket"
    if info.flag_bits & 1:
        return "an encrypted file"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # e.g. 9, large files packed by Windows
        return f"a file packed by method {info.compress_type}, which is not read here"
    return "folder" if info.is_dir() else "file"


class _Header(tarfile.TarInfo):
    """A header of a tar. For tarfile a damaged one, or none, is the end of the archive, too; here only the end mark is."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if buf == bytes(512):
                raise
            raise tarfile.ReadError("no end mark") from None
        if (
            info.type in b"LKxgX" and not 0 <= info.size <= HEADER
        ):  # long names, and what else is said of the next member
            raise tarfile.ReadError("a header of unlikely length")
        return info


def _tar(stream: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
        for info in tar:
            yield _Member(
                info.name, info.size, _tar_kind(info), lambda info=info: cast(IO[bytes], tar.extractfile(info))
            )
    while stream.read(CHUNK):  # to the end of the compressed stream, where its checksum is
        pass


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse file"
    if info.isreg() or info.isdir():
        return "file" if info.isreg() else "folder"
    if info.issym() or info.islnk():
        return "a symbolic link" if info.issym() else "a hard link"
    return "a device, a pipe or what is unknown"
