"""The result store: what is written is whole, what is no record is named and kept."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qatbench.bench import store as store_module
from qatbench.bench.disk import sealed_json
from qatbench.bench.errors import UserError
from qatbench.bench.spec import content_hash
from qatbench.bench.store import SCHEMA, BusyError, Store
from support import open_to_all


def record(seed: int = 0, status: str = "done", **more) -> dict:
    named = {"spec": {"method": "lsq", "seed": seed}, "code": {"method lsq": "1"}, "data": "da7a"}
    head = {"schema": SCHEMA, "run_id": content_hash(named), "status": status, "reason": None, "spec": named["spec"]}
    return {**head, "provenance": {k: named[k] for k in ("code", "data")}, **more}


ID = record()["run_id"]


def test_a_record_comes_back_as_written(tmp_path):
    """A record would lose a value on the way to the disk, or leave a temporary file."""
    store = Store(tmp_path / "new" / "store")
    assert store.read(ID) is None
    assert store.records() == []
    written = record(metrics={"test/acc": 0.97, "test/map50": None}, cost={"levels_max": {"conv": [15, 16]}})
    store.write(written)
    read = store.read(ID)
    assert read is not None
    assert {k: read[k] for k in written} == written
    assert store.records() == [read]
    assert [p.name for p in store.path(ID).iterdir()] == ["result.json"]


def test_nan_becomes_null(tmp_path):
    """A loss that is NaN would make a file that is no JSON, which other programs refuse."""
    Store(tmp_path).write(record(metrics={"loss": float("nan"), "acc": 0.5}, cost={"plan": {"a": (4, float("inf"))}}))
    text = (tmp_path / ID / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"loss": None, "acc": 0.5}


def test_what_is_done_is_never_overwritten(tmp_path):
    """A second launch would replace a finished result."""
    store = Store(tmp_path)
    store.write(record(status="failed", reason="diverged"))
    store.write(record(status="skipped", reason="no"))
    store.write(record(metrics={"test/acc": 0.5}))
    for status in ("done", "failed"):
        with pytest.raises(UserError, match="is done already"):
            store.write(record(status=status))
    assert store.records()[0]["metrics"] == {"test/acc": 0.5}


def sealed(**changes) -> str:
    return sealed_json({**record(), **changes}).decode()


BAD = {
    "": "truncated, or not JSON",
    '{"schema": 1, "run_id": "0123': "truncated, or not JSON",
    "\x00\x01": "truncated, or not JSON",
    "[" * 100_000: "truncated, or not JSON",
    "[1, 2]": "not a table of ours",
    '{"loss": 0.5}': "names no schema",
    json.dumps(record(schema=99)): f"of schema 99, later than this qatbench's {SCHEMA}; upgrade",
    json.dumps(record(schema=1)): "of schema 1, without the digest that it could be checked by; run it again",
    json.dumps(record(schema="1")): "names no schema",
    json.dumps(record()): "holds no digest by which it could be checked; run it again",
    sealed().replace('"lsq"', '"lsp"'): "has changed since it was written",
    sealed(metrics={"test/acc": 0.5}).replace("0.5", "NaN"): "truncated, or not JSON",
    sealed(metrics={"test/acc": 0.5}).replace("0.5", "1e999"): "has changed since it was written",
    sealed(run_id="fedcba9876543210"): "is of run 'fedcba9876543210', but lies in the folder of",
    sealed(spec={"method": "lsq", "seed": 7}): "its spec, code and data are not those that its run id stands for",
    sealed(provenance={}): "its spec, code and data are not those",
    sealed(status="great"): "status 'great'",
    sealed(spec=None): "has no spec",
    sealed(metrics=[1]): "metrics is not a table",
    sealed(per_class=[1], cost=[1]): "cost is not a table",
    sealed(metrics={"test/acc": "high"}): "metric 'test/acc' is 'high'",
    sealed(metrics={"test/acc": True}): "metric 'test/acc' is True",
    sealed(metrics={"test/acc": 14.5}): "metric 'test/acc' is 14.5, not a number from 0 to 1",
    sealed(metrics={"test/acc_worst": -1.0}): "metric 'test/acc_worst' is -1.0, not a number from 0 to 1",
    sealed(metrics={"float/test/acc/left": 9.17}): "not a number from 0 to 1",
    sealed(metrics={"val/ece/left": 1.5}): "not a number from 0 to 1",
    sealed(per_class={"left": [0.5, None, 2]}): "a class of 'left' is 2",
    sealed(cost={"size_bytes": -1.0}): "cost 'size_bytes' is -1.0",
}


@pytest.mark.parametrize("text", BAD, ids=[f"{n}" for n, _ in enumerate(BAD)])
def test_what_is_no_record_is_named_and_kept(tmp_path, text):
    """A truncated, changed, foreign or later record would crash the report, be a number in it, or be deleted by the next launch."""
    store = Store(tmp_path)
    path = tmp_path / ID / "result.json"
    path.parent.mkdir()
    path.write_text(text)
    other = record(1)
    store.write(other)
    assert [r["run_id"] for r in store.records()] == [other["run_id"]]
    ((where, why),) = store.aside
    assert where == path
    assert BAD[text] in why
    assert "\n" not in why
    assert store.read(ID) is None
    assert path.read_text() == text

    store.write(record())  # the run is run again
    assert path.with_name("result.json.aside-1").read_text() == text
    assert len(store.records()) == 2
    assert store.aside == []


def test_every_flipped_bit_of_a_record_is_seen(tmp_path):
    """A disk that rots, or a hand that slips, would change a number on the leaderboard without a word."""
    store = Store(tmp_path)
    store.write(record(metrics={"test/acc": 0.97}))
    path = tmp_path / ID / "result.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert store.records() == [], place
    path.write_bytes(whole)
    assert len(store.records()) == 1


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe or a device in a record's place would hang `report` and `status` for ever."""
    store = Store(tmp_path)
    store.write(record(1))
    for name, make in {
        "pipe": os.mkfifo,
        "zero": lambda p: p.symlink_to("/dev/zero"),
        "loop": lambda p: p.symlink_to(p.name),
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "result.json")
    assert [r["run_id"] for r in store.records()] == [record(1)["run_id"]]
    assert [why for _, why in store.aside] == [
        "cannot be read: Too many levels of symbolic links",
        "is no file, but a pipe or a device",
        "is no file, but a pipe or a device",
    ]


def test_a_done_record_is_kept_where_locks_do_not_work(tmp_path, monkeypatch):
    """On a file system without locks, the second of two machines would replace the first one's finished record."""
    store, path = Store(tmp_path), tmp_path / ID / "result.json"
    store.write(record(status="failed", reason="x"))
    real = store_module._status

    def late(where, run_id):  # the other machine finishes between our look and our move
        found = real(where, run_id)
        if where == path and found == "failed":
            path.unlink()
            Store(tmp_path).write(record(metrics={"test/acc": 0.5}))
        return found

    monkeypatch.setattr(store_module, "_status", late)
    with pytest.raises(UserError, match="is done already"):
        store.write(record(metrics={"test/acc": 0.123}))
    assert store.records()[0]["metrics"] == {"test/acc": 0.5}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ESTALE, errno.EINTR])
def test_a_lock_that_is_not_to_be_had_is_one_line(tmp_path, monkeypatch, number):
    """NFS without a lock service, or a stale handle, would be a traceback, or end a sweep with a number."""
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError) as told, Store(tmp_path).lock(ID):
        pass
    assert re.fullmatch(rf"cannot lock .*{ID}.lock: {os.strerror(number)}; put the store on .*", str(told.value))


def test_what_is_in_the_way_of_a_lock_is_named(tmp_path):
    """A folder or a link in a lock's place would be a traceback."""
    store = Store(tmp_path)
    (tmp_path / "locks" / "a.lock").mkdir(parents=True)
    (tmp_path / "locks" / "b.lock").symlink_to(tmp_path / "victim")
    for name in ("a", "b"):
        with pytest.raises(UserError, match=rf"locks/{name}\.lock is in the way of a file; move it"), store.lock(name):
            pass
        assert not store.locked(name)
    assert not (tmp_path / "victim").exists()


def test_other_things_in_the_store_are_passed_over(tmp_path):
    """A folder in progress, a stray file, or a record that is a directory would end the scan."""
    store = Store(tmp_path)
    store.write(record())
    (tmp_path / "in-progress").mkdir()
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "odd" / "result.json").mkdir(parents=True)
    (tmp_path / "float" / "1" / "x").mkdir(parents=True)
    assert [r["run_id"] for r in store.records()] == [ID]
    assert [path.parent.name for path, _ in store.aside] == ["odd"]
    (tmp_path / ("x" * 200)).mkdir()
    with pytest.raises(UserError, match="File name too long; give another path"):
        Store(tmp_path / ("x" * 300))


@given(
    st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers()), max_size=5), st.data()
)
def test_no_json_object_crashes_the_scan(tmp_path_factory, noise, data):
    """Any JSON that somebody's tool left in a record's place would be a traceback."""
    root = tmp_path_factory.mktemp("store")
    keys = data.draw(st.sets(st.sampled_from(list(record(metrics={}, cost={}, wandb=None)))))
    value = {k: v for k, v in record(metrics={}, cost={}, wandb=None).items() if k in keys} | noise | {"x": 1}
    (root / ID).mkdir()
    (root / ID / "result.json").write_bytes(sealed_json(value))
    store = Store(root)
    assert len(store.records()) + len(store.aside) == 1


def test_a_suite_manifest_comes_back(tmp_path):
    """`status` and `report` would not know which runs a suite asked for."""
    store = Store(tmp_path)
    assert store.read_suite("quickstart") is None
    assert store.suites() == []
    store.write_suite("quickstart", {"suite": {}, "run_ids": [ID], "command": "qatbench sweep quickstart"})
    manifest = store.read_suite("quickstart")
    assert manifest is not None
    assert manifest["run_ids"] == [ID]
    assert store.suites() == ["quickstart"]
    path = tmp_path / "suites" / "quickstart.json"
    for text in (b"", b'{"run_ids": 3}', sealed_json({"run_ids": 3}), sealed_json({"run_ids": ["../x"]}),
                 sealed_json({"run_ids": [], "labels": [1]}), path.read_bytes().replace(b"sweep", b"sweet")):  # fmt: skip
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"quickstart\.json .*; write it again: qatbench sweep quickstart"):
            store.read_suite("quickstart")


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "a\nb"])
def test_a_name_is_no_path(tmp_path, name):
    """`qatbench export ../..` would read or write outside of the store."""
    for method in (Store(tmp_path).path, Store(tmp_path).float_path, Store(tmp_path).read_suite):
        with pytest.raises(UserError, match="is no name"):
            method(name)


def test_a_store_that_is_a_file(tmp_path):
    """`--store results.csv` would be a traceback."""
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        Store(tmp_path / "x")
    store = Store(tmp_path / "x" / "y")
    with pytest.raises(UserError, match="is in the way of a folder"):
        store.write(record())


def as_child(code: str, *arguments: str) -> subprocess.Popen:
    head = "import os, resource, sys, time\nfrom qatbench.bench.errors import UserError\nfrom qatbench.bench.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A record cut short by a full disk would take the place of the one before, or be a traceback."""
    store = Store(tmp_path)
    store.write(record(status="failed", reason="before"))
    child = as_child(
        f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow beyond
        try:
            Store(sys.argv[1]).write({record(metrics={str(i): i for i in range(1000)})!r})
        except UserError as error:
            print(error)
        """,
        str(tmp_path),
    )
    text, _ = child.communicate(timeout=60)
    assert text == f"no space left on the disk of store {tmp_path}; free some and try again\n"
    assert store.records()[0]["reason"] == "before"
    assert [p.name for p in store.path(ID).iterdir()] == ["result.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs to be root, to become somebody else")
def test_a_read_only_store_is_one_line_and_can_be_read(tmp_path):
    """A report from somebody else's store would fail; writing to it would be a traceback."""
    store = Store(tmp_path / "store")
    store.write(record(status="failed", reason="x"))
    with store.lock(ID):
        pass
    open_to_all(tmp_path)
    child = as_child(
        f"""
        store = Store(sys.argv[1])
        os.setresuid(65534, 65534, 65534)
        print(len(store.records()), store.locked({ID!r}))
        for act in (lambda: store.write({record()!r}), lambda: store.write_suite("s", {{}}), lambda: store.lock("x").__enter__()):
            try:
                act()
            except UserError as error:
                print(error)
        """,
        str(store.root),
    )
    text, _ = child.communicate(timeout=60)
    told = f"store {store.root} is read-only; choose another with --store or QATBENCH_STORE"
    assert text.splitlines() == ["1 False", told, told, told]


def test_a_writer_killed_at_any_instant_leaves_a_whole_record(tmp_path):
    """A kill in mid-write would leave half a record."""
    child = as_child(
        f"""
        store, n = Store(sys.argv[1]), 0
        while True:
            n += 1
            store.write({record(status="failed")!r} | {{"metrics": {{str(i): n for i in range(500)}}}})
        """,
        str(tmp_path),
    )
    store = Store(tmp_path)
    end = time.monotonic() + 30
    while not store.records() and time.monotonic() < end:
        time.sleep(0.01)
    seen = [r["metrics"] for _ in range(50) for r in store.records()]  # while it is being replaced
    child.kill()
    child.communicate()
    seen += [r["metrics"] for r in store.records()]  # none, if it was killed between the failed record and the next one
    assert store.aside == []
    assert seen
    assert all(len(m) == 500 and len(set(m.values())) == 1 for m in seen)


def test_a_lock_keeps_others_out_and_dies_with_its_holder(tmp_path):
    """Two processes would train one run; or a run whose process was killed would be locked for ever."""
    store = Store(tmp_path)
    holder = as_child(
        f"with Store(sys.argv[1]).lock({ID!r}):\n    print('held', flush=True)\n    time.sleep(60)", str(tmp_path)
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert store.locked(ID)
    with pytest.raises(BusyError), store.lock(ID, wait=False):
        pass
    with store.lock("another", wait=False):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert not store.locked(ID)
    with store.lock(ID, wait=False), store.lock(ID, wait=False):  # again in the same thread: the runner takes it, too
        pass


def test_records_come_sorted(tmp_path):
    """A leaderboard made twice from one store would differ in the order of its rows."""
    store = Store(tmp_path)
    names = [record(i)["run_id"] for i in range(101)]
    for i in range(101):
        store.write(record(i))
    assert [r["run_id"] for r in store.records()] == sorted(names)
