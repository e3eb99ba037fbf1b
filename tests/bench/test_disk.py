"""Files on a disk: whole or not at all, never through a link, and nothing temporary left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qatbench.bench import disk
from qatbench.bench.disk import (
    Damaged,
    clear_temporaries,
    create_file,
    file_digest,
    parse_json,
    read_file,
    read_json,
    replace_file,
    sealed_json,
    temporary_name,
    write_json,
)


def test_a_file_is_replaced_whole_and_synced(tmp_path, monkeypatch):
    """A power cut after the rename would leave an empty file, or the old name."""
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    replace_file(tmp_path / "x", b"one")
    replace_file(tmp_path / "x", memoryview(b"two"))
    assert (tmp_path / "x").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert [Path(p).name.split(".tmp-")[0] for p in synced] == ["x", tmp_path.name] * 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """A full disk would stay full of half files, or the old file be lost."""
    replace_file(tmp_path / "x", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (replace_file, create_file):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    """In a store that others may write to, a link in a temporary's place would have its target overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(disk, "temporary_name", lambda path: path.with_name("foretold"))
    (tmp_path / "foretold").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "x", b"evil")
    (tmp_path / "foretold").unlink(missing_ok=True)
    (tmp_path / "x").symlink_to(victim)
    replace_file(tmp_path / "x", b"new")  # the link itself is replaced
    assert victim.read_text() == "precious"
    assert not (tmp_path / "x").is_symlink()
    names = {temporary_name(tmp_path / "x").name for _ in range(100)}
    assert len(names) == 100


def test_a_created_file_is_never_replaced(tmp_path, monkeypatch):
    """Where locks do not work, the second of two machines would replace the first one's record."""
    create_file(tmp_path / "x", b"first")
    for broken in (False, True):  # a file system without hard links, too

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        if broken:
            monkeypatch.setattr(os, "link", refuse)
            create_file(tmp_path / "y", b"whole")
            assert (tmp_path / "y").read_bytes() == b"whole"
        with pytest.raises(FileExistsError):
            create_file(tmp_path / "x", b"second")
        assert (tmp_path / "x").read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_only_what_is_abandoned_is_cleared(tmp_path):
    """A run that ends would remove the file that another process, or another machine, is writing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, chance = disk._here(), "0" * 16
    fate = {
        f"a.tmp-{here}-{os.getpid()}-{chance}": False,
        f"a.tmp-{here}-{dead.pid}-{chance}": False,
        f"a.tmp-{here}-{os.getppid()}-{chance}": True,
        f"a.tmp-ffffffff-{dead.pid}-{chance}": True,
        f"b.tmp-ffffffff-{dead.pid}-{chance}": False,  # of another machine, two days old
        "model.tmp-data.onnx": True,
        "x.tmp": True,
    }
    for name in fate:
        (tmp_path / name).write_text("")
    old = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / f"b.tmp-ffffffff-{dead.pid}-{chance}", (old, old))
    clear_temporaries(tmp_path)
    assert {name: (tmp_path / name).exists() for name in fate} == fate


def test_a_sealed_table_comes_back_and_is_plain_json(tmp_path):
    """A record could not be read by other programs, or not be checked by us."""
    value = {"a": [1, 2.5, None], "b": {"text": 'x"digest": "y'}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json") == value
    plain = json.loads((tmp_path / "new" / "x.json").read_text())
    assert list(plain) == ["a", "b", "digest"]
    assert sealed_json(plain) == sealed_json(value)
    with pytest.raises(ValueError, match="JSON compliant"):
        sealed_json({"a": float("nan")})


def test_what_is_not_sealed_is_not_believed(tmp_path):
    """A table that was cut, edited, or has a digest of something else would pass for what was written."""
    good = sealed_json({"a": 1, "b": {"c": 2}})
    assert parse_json(good) == ({"a": 1, "b": {"c": 2}}, True)
    digest = b'"%s"' % good[-68:-4]
    for bad in (
        good.replace(b'"a": 1', b'"a": 2'), good[:-1], good + b"\n", b" " + good, good.replace(b"\n", b"\r\n"),
        json.dumps(json.loads(good)).encode(), b'{"digest": ' + digest + b"}", b"{}",
    ):  # fmt: skip
        assert parse_json(bad)[1] is False, bad
        (tmp_path / "x.json").write_bytes(bad)
        with pytest.raises(Damaged, match="digest"):
            read_json(tmp_path / "x.json")
    for broken in (b"", b"{", b"\xff", b"[1]", b"NaN", b'{"a": NaN}', b"[" * 100_000):
        with pytest.raises(Damaged, match=r"JSON|table"):
            parse_json(broken)


def test_only_files_are_read(tmp_path):
    """A pipe or a device in a file's place would be read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(bytes(100))
    for name, reason in {
        "pipe": "a pipe or a device", "zero": "a pipe or a device", "folder": "is a folder", "large": "100 bytes",
    }.items():  # fmt: skip
        with pytest.raises(Damaged, match=reason):
            read_file(tmp_path / name, limit=99)
    for name in ("none", "large/none"):
        with pytest.raises(FileNotFoundError):
            read_file(tmp_path / name)
    with pytest.raises(OSError, match="a pipe or a device"):
        file_digest(tmp_path / "pipe")


def test_a_change_that_keeps_the_time_of_writing_is_seen(tmp_path):
    """A file restored by `rsync -t` or `cp -p` would be taken for the one that was read before."""
    path = tmp_path / "x"
    path.write_bytes(b"one")
    before, stamp = file_digest(path), path.stat()
    assert file_digest(path) == before
    time.sleep(0.02)  # the clock of some file systems ticks 100 times a second
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns
    assert file_digest(path) != before
