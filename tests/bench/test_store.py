"""The result store: what is written is whole, what is no record is named and kept."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.store import SCHEMA, BusyError, Store
from support import open_to_all

ID = "0123456789abcdef"


def record(run_id: str = ID, status: str = "done", **more) -> dict:
    return {"schema": SCHEMA, "run_id": run_id, "status": status, "reason": None, "spec": {"method": "lsq"}, **more}


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


BAD = {
    "": "truncated, or not JSON",
    '{"schema": 1, "run_id": "0123': "truncated, or not JSON",
    "\x00\x01": "truncated, or not JSON",
    "[" * 100_000: "truncated, or not JSON",
    "[1, 2]": "not a qatbench record",
    '{"loss": 0.5}': "names no schema",
    json.dumps(record(schema=99)): "of schema 99, later than this qatbench's 1; upgrade",
    json.dumps(record(schema="1")): "names no schema",
    json.dumps(record(run_id="fedcba9876543210")): "is of run 'fedcba9876543210', but lies in the folder of",
    json.dumps(record(status="great")): "status 'great'",
    json.dumps({**record(), "spec": None}): "has no spec",
    json.dumps(record(metrics=[1])): "metrics is not a table",
    json.dumps(record(metrics={"test/acc": "high"})): "metric 'test/acc' is 'high'",
}


@pytest.mark.parametrize("text", BAD, ids=lambda t: t[:30] or "empty")
def test_what_is_no_record_is_named_and_kept(tmp_path, text):
    """A truncated, foreign or later record would crash the report, or be deleted by the next launch."""
    store = Store(tmp_path)
    path = tmp_path / ID / "result.json"
    path.parent.mkdir()
    path.write_text(text)
    store.write(record("f" * 16))
    assert [r["run_id"] for r in store.records()] == ["f" * 16]
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


@given(
    st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers()), max_size=5), st.data()
)
def test_no_json_object_crashes_the_scan(tmp_path_factory, noise, data):
    """Any JSON that somebody's tool left in a record's place would be a traceback."""
    root = tmp_path_factory.mktemp("store")
    keys = data.draw(st.sets(st.sampled_from(list(record(metrics={}, cost={}, wandb=None)))))
    value = {k: v for k, v in record(metrics={}, cost={}, wandb=None).items() if k in keys} | noise
    (root / ID).mkdir()
    (root / ID / "result.json").write_text(json.dumps(value))
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
    (tmp_path / "suites" / "quickstart.json").write_text('{"run_ids": 3}')
    assert store.read_suite("quickstart") is None


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
    seen = [store.records()[0]["metrics"] for _ in range(50)]  # while it is being replaced
    child.kill()
    child.communicate()
    (last,) = store.records()
    assert store.aside == []
    assert all(len(m) == 500 and len(set(m.values())) == 1 for m in [*seen, last["metrics"]])


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
    names = [f"{i * 7919 % 101:016x}" for i in range(101)]
    for name in names:
        store.write(record(name))
    assert [r["run_id"] for r in store.records()] == sorted(names)
