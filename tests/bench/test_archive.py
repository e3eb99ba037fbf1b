"""Unpacking real archives, good and bad."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qatbench.bench import archive as archive_module
from qatbench.bench.archive import extract
from qatbench.bench.errors import UserError

BODY = random.Random(0).randbytes(300_000)

FILES = {"set/a/1.png": b"one" * 1000, "set/a/2.png": b"", "set/b/3.png": random.Random(3).randbytes(40_000)}
KINDS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")
PACK = {"": lambda d: d, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def names(folder: Path) -> set[str]:
    """What lies there, but for locks, which stay."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix != ".lock"}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys\nfrom pathlib import Path\nfrom qatbench.bench.errors import UserError\n"
    head += "from qatbench.bench.archive import extract\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def tar_of(*members: tarfile.TarInfo | tuple[str, bytes], kind: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return PACK[kind](out.getvalue())


def entry(name: str, kind: bytes, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def in_tar(member: tuple[str, bytes]) -> tarfile.TarInfo | tuple[str, bytes]:
    return entry(member[0], tarfile.DIRTYPE) if member[0].endswith("/") else member


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def zip_entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def pack(kind: str, files: dict[str, bytes] = FILES) -> bytes:
    return zip_of(*files.items()) if kind == "zip" else tar_of(*files.items(), kind=kind[4:])


def tried(data: bytes, folder: Path, **options: Any) -> str:
    """What is said about an archive that must be refused; nothing may be left of it."""
    archive = folder / "archive"
    archive.write_bytes(data)
    with pytest.raises(UserError) as told:
        extract(archive, folder / "out" / "set", **options)
    assert str(archive) in str(told.value)
    assert "\n" not in str(told.value)
    assert names(folder) == {"archive", "out"}
    return str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_unpacked_whatever_its_name(tmp_path, kind):
    """Some kind of archive could not be read, or would be judged by its name."""
    archive = tmp_path / "set.bin"
    archive.write_bytes(pack(kind))
    folder = extract(archive, tmp_path / "deep" / "out")
    assert folder == tmp_path / "deep" / "out"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")} == FILES
    assert names(tmp_path / "deep") - {f"out/{n}" for n in names(folder)} == {"out"}
    (folder / "set/a/1.png").unlink()
    archive.unlink()
    assert extract(archive, folder) == folder  # as it is
    assert not (folder / "set/a/1.png").exists()


def test_permissions_and_macos_leftovers(tmp_path):
    """Files would be unreadable or set-uid as their packer left them; `._1.png` would be taken for an image."""
    junk = ("__MACOSX/set/._1.png", "set/._1.png", "set/.DS_Store", "./")
    members = [entry(n, tarfile.DIRTYPE if n.endswith("/") else tarfile.REGTYPE, mode=0) for n in junk]
    odd = entry("./set/1.png", tarfile.REGTYPE, mode=0o6777, uid=1234)
    shut = entry("set/shut", tarfile.DIRTYPE, mode=0)
    (tmp_path / "x").write_bytes(tar_of(*members, shut, odd, ("set/shut/2.png", b"2")))
    folder = extract(tmp_path / "x", tmp_path / "out")
    assert names(folder) == {"set", "set/1.png", "set/shut", "set/shut/2.png"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((folder / "set/1.png").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((folder / "set/shut").stat().st_mode) == 0o777 & ~mask
    assert (folder / "set/1.png").stat().st_uid == os.geteuid()


OUTSIDE = (
    "../x",
    "a/../../x",
    "/etc/x",
    "//x",
    "a\\..\\..\\x",
    "..\\x",
    "\\x",
    "..",
)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leads_out(tmp_path, kind, name):
    """An archive could write anywhere."""
    data = pack(kind, {"fine.png": b"1", name: b"2"})
    assert "holds a path that could lead out of its folder" in tried(data, tmp_path)
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (entry("x", tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
        (entry("x", tarfile.SYMTYPE, linkname="fine"), "a symbolic link"),
        (entry("x", tarfile.LNKTYPE, linkname="fine"), "a hard link"),
        (entry("x", tarfile.CHRTYPE), "a device"),
        (entry("x", tarfile.BLKTYPE), "a device"),
        (entry("x", tarfile.FIFOTYPE), "a device, a pipe"),
        (entry("x", b"Z"), "unknown"),
        (entry("x", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    ],
)
def test_a_tar_with_what_is_no_file(tmp_path, member, what):
    """A link could lead a later member out of the folder; a pipe would stop whoever reads it."""
    told = tried(tar_of(("fine", b"1"), member, ("x/y", b"2")), tmp_path)
    assert f"holds {what}" in told or what in told
    assert "'x'" in told


def test_a_zip_with_what_is_no_file(tmp_path):
    """As for tar: Info-ZIP keeps links and pipes, too."""
    for mode, what in ((stat.S_IFLNK | 0o777, "a symbolic link"), (stat.S_IFIFO, "a device, pipe or socket")):
        assert f"holds {what}: 'x'" in tried(zip_of((zip_entry("x", mode), b"/etc/passwd")), tmp_path)


def test_a_zip_that_cannot_be_read_here(tmp_path):
    """An encrypted member would ask for a password in a traceback; one packed by bzip2 could fill the memory."""
    data = bytearray(pack("zip", {"x": b"1"}))
    data[6] |= 1  # flag bits of the local header and of the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert "holds an encrypted file: 'x'" in tried(bytes(data), tmp_path)
    assert "packed by method 12" in tried(zip_of(("x", b"1"), method=zipfile.ZIP_BZIP2), tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_for_one_place(tmp_path, kind):
    """A later member would silently replace an earlier one."""
    pairs: list[tuple[str, bytes]] = [("a", b"1"), ("./a", b"2")]
    data = zip_of(*pairs) if kind == "zip" else tar_of(*pairs)
    assert "holds two members for one place: './a'" in tried(data, tmp_path)
    pairs[1] = ("a/b", b"2")
    data = zip_of(*pairs) if kind == "zip" else tar_of(*pairs)
    assert "holds two members for one place: 'a/b'" in tried(data, tmp_path)


def test_a_member_of_10_gb(tmp_path):
    """Ten gigabytes would be written before anybody noticed; each of these archives is a few kilobytes."""
    huge = entry("big.bin", tarfile.REGTYPE, size=10 * 10**9).tobuf(tarfile.GNU_FORMAT)
    said = "holds a member of 10.0 GB, 'big.bin'; at most 8.6 GB are unpacked"
    for pack_it in PACK.values():
        assert said in tried(pack_it(tar_of(("fine", b"1"))[:1024] + huge + bytes(2048)), tmp_path)
    data = bytearray(pack("zip", {"big.bin": bytes(1000)}))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 4 * 10**9)
    assert "holds a member of 4.0 GB" in tried(bytes(data), tmp_path, most=3 * 10**9)


@pytest.mark.parametrize("kind", KINDS)
def test_many_members_that_are_too_much_together(tmp_path, kind):
    """A bomb of many small members would pass the check of each."""
    files = {f"{i}.bin": bytes(10**5) for i in range(20)}
    said = "holds a member that makes it 500.0 kB in all, '4.bin'; at most 450.0 kB are unpacked"
    assert said in tried(pack(kind, files), tmp_path, most=450_000)
    assert len(names(extract(tmp_path / "archive", tmp_path / "fits", most=2 * 10**6))) == 20


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({f"{i}.png": b"x" * (i % 32) for i in range(60_000)}, "files of less than 32 bytes, or more; at most 1,000"),
        ({f"{i}/": b"" for i in range(21_000)}, "folders, or more; at most 20,000"),
    ],
)
def test_members_that_are_many_and_tiny(tmp_path, kind, made, said):
    """60,000 empty files would be written for minutes, and take places on the disk that images need."""
    data = zip_of(*made.items()) if kind == "zip" else tar_of(*map(in_tar, made.items()), kind=kind[4:])
    assert said in tried(data, tmp_path)


def test_members_without_number(tmp_path, monkeypatch):
    """A bomb of members that are each large enough would be written until the disk is full."""
    monkeypatch.setattr(archive_module, "MEMBERS", 10)
    files = {f"{i}.bin": bytes(50) for i in range(11)}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        assert "11 members, or more; at most 10 are unpacked" in tried(pack(kind, files), tmp_path / kind)


@pytest.mark.parametrize("says", [10, 2000])
def test_a_header_that_lies_about_the_size(tmp_path, says):
    """A small number in the header would let a large member through, or a member end early unnoticed."""
    data = bytearray(pack("zip", {"x": bytes(1000)}))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, says)
    told = tried(bytes(data), tmp_path)
    assert "truncated or corrupt" in told or "size is not" in told


def test_headers_that_have_tarfile_read_without_end(tmp_path, monkeypatch):
    """A long name of 4 GB would be read to memory; a negative size would have tarfile turn in a circle."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        name = entry("x", kind, size=4 * 2**30).tobuf(tarfile.GNU_FORMAT)
        assert "corrupt" in tried(PACK["gz"](name + bytes(2**20)), tmp_path)
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"Z"):
        back = entry("x", kind, size=-1024).tobuf(tarfile.GNU_FORMAT)
        assert str(tmp_path) in tried(tar_of(("fine", b"1"))[:1024] + back + bytes(1024), tmp_path)
    long = entry("x", tarfile.GNUTYPE_LONGNAME, size=2**20).tobuf(tarfile.GNU_FORMAT) + b"a" * 2**20
    monkeypatch.setattr(archive_module, "HEADER", 2**18)
    assert "corrupt" in tried(long + tar_of(("x", b"1")), tmp_path)  # refused before it is read, not when it is written


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_cut_anywhere(tmp_path, kind):
    """Half of a data set would be taken for all of it."""
    data = pack(kind)
    assert len(data) > 40_000
    cuts = {len(data) * i // 10 for i in range(10)} | {len(data) - 1}
    if (
        kind == "tar"
    ):  # also between two members, where every header is good; whole, when a block of its end mark is there
        end = (len(data.rstrip(b"\0")) + 511) // 512 * 512
        cuts = {end * i // 10 for i in range(11)} | {data.index(b"set/a/2.png"), data.index(b"set/b/3.png")}
    for cut in sorted(cuts):
        assert "truncated or corrupt; delete it and fetch it again" in tried(data[:cut], tmp_path), cut


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_the_middle(tmp_path, kind):
    """Damaged headers or data would be passed over in silence, and members with them."""
    data = bytearray(pack(kind))
    # A plain tar has no checksum but those of its headers.
    data[data.index(b"set/a/2.png") + 3 if kind == "tar" else len(data) // 2] ^= 0xFF
    assert "truncated or corrupt" in tried(bytes(data), tmp_path)


@given(kind=st.sampled_from(KINDS), where=st.integers(0, 10**6), bits=st.binary(min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_is_a_traceback(tmp_path_factory, kind, where, bits):
    """Some damaged byte would end in a traceback, or leave half of the members."""
    data = bytearray(pack(kind, {"set/1": b"one" * 50, "set/2": b"two" * 50}))
    where %= len(data)
    data[where : where + len(bits)] = bits
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "archive").write_bytes(data)
    try:
        extract(folder / "archive", folder / "out")
    except UserError:
        assert names(folder) == {"archive"}
    else:
        assert "out" in names(folder)
        assert "out.unpacking" not in names(folder)


def test_what_is_no_archive(tmp_path):
    """A web page, a single compressed file, an empty file or a folder would be a traceback, or an empty data set."""
    for data in (b"", b"<html>", gzip.compress(b"one file"), b"PK", bytes(10_240), BODY, bz2.compress(b"")):
        told = tried(data, tmp_path)
        assert "no zip or tar archive" in told or "holds no files" in told
    assert "holds no files" in tried(zip_of(("empty/", b"")), tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        extract(tmp_path / "missing", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_tar_whose_last_member_is_a_zip(tmp_path):
    """An archive of archives would be taken for its last member."""
    inner = pack("zip")
    (tmp_path / "x").write_bytes(tar_of(("a.zip", inner)))
    assert (extract(tmp_path / "x", tmp_path / "out") / "a.zip").read_bytes() == inner


def test_what_is_in_the_way_of_the_folder(tmp_path):
    """Somebody's file or link would be replaced."""
    archive = tmp_path / "x"
    archive.write_bytes(pack("zip"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} should be a folder"):
            extract(archive, tmp_path / name)


LIMIT = """
    import resource, signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond
"""

EXTRACT = """
    try:
        print(len(list(extract(Path(sys.argv[1]), Path(sys.argv[2])).rglob("*.bin"))))
    except UserError as error:
        print(error)
"""


def test_two_processes_unpack_at_once_and_one_is_killed(tmp_path):
    """Two would write into each other's folder; one that was killed would leave half a set, or a lock, for ever."""
    archive, folder = tmp_path / "x", tmp_path / "out"
    archive.write_bytes(pack("tar", {f"{i}.bin": b"1" for i in range(500)}))
    hang = "import os, time\nos.sync = lambda: time.sleep(60)\n"  # all is written, but it has not its name yet
    killed = child(hang + textwrap.dedent(EXTRACT), archive, folder)
    wait_for(lambda: (tmp_path / "out.unpacking" / "499.bin").exists())
    waiting = child(EXTRACT, archive, folder)
    time.sleep(0.5)
    assert waiting.poll() is None
    assert not folder.exists()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [waiting, child(EXTRACT, archive, folder)]
    assert [p.communicate(timeout=60)[0] for p in both] == ["500\n", "500\n"]
    assert not (tmp_path / "out.unpacking").exists()


def test_a_full_disk_while_unpacking(tmp_path):
    """A full disk would be a traceback, be taken for a damaged archive, or leave half a set."""
    (tmp_path / "x").write_bytes(pack("zip", {"a": b"1", "b": bytes(200_000)}))
    code = textwrap.dedent(LIMIT) + textwrap.dedent(EXTRACT)
    told = child(code, tmp_path / "x", tmp_path / "out").communicate(timeout=60)[0]
    assert told == f"no space left on the disk of {tmp_path} for out; free some and start again\n"
    assert names(tmp_path) == {"x"}


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    """A Ctrl-C would leave gigabytes that nobody looks for."""
    (tmp_path / "x").write_bytes(pack("zip"))

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_module.os, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "x", tmp_path / "out")
    assert names(tmp_path) == {"x"}
