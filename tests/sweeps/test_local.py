"""The launcher, with real worker processes on a tiny data set."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from qatbench.bench import registry
from qatbench.bench.errors import UserError
from qatbench.bench.spec import SuiteSpec
from qatbench.bench.store import Store
from qatbench.sweeps.local import SweepResult, find_gpus, parse_duration, places, sweep, usable_cores
from qatbench.sweeps.status import status
from rich.console import Console
from support import open_to_all

PLUGIN = Path(__file__).with_name("tiny.py")


@pytest.fixture(autouse=True)
def plugin():
    registry.load_file(PLUGIN)
    yield
    registry._files.pop(PLUGIN)  # other tests look at all methods that there are


def suite(*methods: str, **settings) -> SuiteSpec:
    values = {
        "name": "tiny",
        "data": "tiny",
        "bits": "w32a32",
        "epochs": 1,
        "float_epochs": 1,
        "batch": 32,
        "calibration": 32,
    }
    return SuiteSpec(method=methods, **{**values, **settings})


def launch(asked: SuiteSpec, store: Store, **settings) -> tuple[SweepResult, str]:
    console = Console(file=io.StringIO(), width=80)
    result = sweep(asked, store, wandb=False, plugins=[PLUGIN], console=console, **settings)
    return result, console.file.getvalue()


def drive(asked: SuiteSpec, store: Store) -> subprocess.Popen:
    """`qatbench sweep`, as from a terminal of its own."""
    file = store.root / "tiny.yaml"
    file.write_text(asked.model_dump_json())  # JSON is YAML
    options = ["--store", str(store.root), "--plugin", str(PLUGIN), "--workers", "2", "--no-wandb"]
    command = [sys.executable, "-m", "qatbench", "sweep", str(file), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=store.root)


def by_method(store: Store) -> dict[str, dict]:
    return {r["spec"]["method"]: r for r in store.records()}


def until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)


def unfinished(store: Store) -> list[Path]:
    """The folders of runs that have a checkpoint, but no record."""
    return [p.parent for p in store.root.glob("*/last.ckpt") if not (p.parent / "result.json").exists()]


def attempts(store: Store) -> dict[str, int]:
    """How often each run and float network was begun: a worker writes one line into its log then."""
    logs = [*store.root.glob("*/log.txt"), *store.root.glob("float/*/log.txt")]
    return {log.parent.name: len(re.findall(r"^--- .* process \d+$", log.read_text(), re.MULTILINE)) for log in logs}


@pytest.mark.slow
def test_a_failing_run_is_recorded_and_the_sweep_goes_on(tmp_path, capfd):
    """A method that raises, or takes its process down, would end the sweep, or be lost, or be tried for ever."""
    store, asked = Store(tmp_path), suite("boom", "crashes", "noisy", "fp32")
    result, text = launch(asked, store, workers=1)
    assert (result.done, result.failed, result.left, result.exit_status) == (2, 2, 0, 1)
    records = by_method(store)
    assert records["boom"]["reason"] == "boom.start raised ValueError: boom [1]"
    assert records["crashes"]["reason"] == "worker was killed by signal 11 (segmentation fault)"
    for name in ("boom", "crashes"):
        assert Path(records[name]["provenance"]["log"]).exists()
        assert records[name]["reason"] in text
        assert records[name]["provenance"]["log"] in text
    assert "Traceback" in Path(records["boom"]["provenance"]["log"]).read_text()

    log = store.log_path(records["noisy"]["run_id"]).read_text()
    assert all(f"said {how}" in log for how in ("in Python", "on stderr", "by a program"))
    out, err = capfd.readouterr()
    assert out + err == "", "workers wrote on the terminal"
    assert "\x1b" not in text

    # failed runs stay failed until asked; the rest is never run again
    result, text = launch(asked, store)
    assert (result.done, result.failed, result.left, result.exit_status) == (2, 2, 0, 1)
    assert text.count("not tried again without --retry-failed") == 2
    assert set(attempts(store).values()) == {1}
    result, _ = launch(asked, store, retry_failed=True, workers=2)
    assert (result.done, result.failed) == (2, 2)
    again = {m: attempts(store)[r["run_id"]] for m, r in by_method(store).items()}
    assert again == {"boom": 2, "crashes": 2, "noisy": 1, "fp32": 1}

    found = status("tiny", store)
    assert {e.label: e.state for e in found.entries} == {
        "boom w32a32 s0": "failed", "crashes w32a32 s0": "failed", "noisy w32a32 s0": "done", "fp32 w32a32 s0": "done",
    }  # fmt: skip


@pytest.mark.slow
def test_what_the_machine_ended_is_left(tmp_path):
    """A worker that the kernel kills, or a full disk, would count as the method's failure, and would not be tried again."""
    store, asked = Store(tmp_path), suite("killed", "full", "fp32")
    for begun in (1, 2):  # a plain rerun tries again, once
        result, text = launch(asked, store, workers=1, command="the same command")
        assert (result.done, result.failed, result.left, result.broken_off, result.exit_status) == (1, 0, 2, 2, 1)
        assert set(by_method(store)) == {"fp32"}
        assert "left   killed w32a32 s0: worker was killed by signal 9 (out of memory?)" in text
        assert "left   full w32a32 s0: " in text
        assert text.splitlines()[-1] == (
            "The machine ended 2 runs: 1 of 3 runs are done, nothing finished is lost. Go on with: the same command"
        )
        assert [e.state for e in status("tiny", store).entries] == ["left", "left", "done"]
        assert sorted(attempts(store).values()) == sorted([1, 1, begun, begun])  # the float network, fp32


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_worker_killed_from_outside_leaves_its_run(tmp_path, number):
    """`kill`, or the end of a batch job, would be recorded as a failure of the method, or as an exit with status 0."""
    store = Store(tmp_path)
    process = drive(suite("slow", epochs=60), store)
    until(lambda: unfinished(store))
    (worker,) = (p for p in psutil.Process(process.pid).children() if store.locked(unfinished(store)[0].name))
    worker.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1, text
    assert f"left   slow w32a32 s0: worker was killed by signal {int(number)}" in text
    assert store.records() == []


@pytest.mark.slow
def test_hung_workers_are_waited_for_together(tmp_path):
    """A batch system that grants half a minute would kill a sweep of eight hung workers before it had ended."""
    store = Store(tmp_path)
    process = drive(suite("slow", "slower", epochs=60), store)
    until(lambda: len(unfinished(store)) == 2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 9, "5 s for all"
    assert process.returncode == 143, text
    assert not [p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_interrupted_sweep_goes_on_where_it_was(tmp_path):
    """Ctrl-C would lose finished runs, leave workers running on, or not say how to go on; a rerun would repeat the finished."""
    store, asked = Store(tmp_path), suite("fp32", "slow", epochs=5)
    process = drive(asked, store)
    until(lambda: "fp32" in by_method(store) and unfinished(store))
    (slow,) = unfinished(store)
    assert [e.state for e in status("tiny", store).entries] == ["done", "running"]
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1].startswith("Interrupted: 1 of 2 runs are done")
    assert f"Go on with: qatbench sweep {tmp_path / 'tiny.yaml'} --store" in text.splitlines()[-1]
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert [e.state for e in status("tiny", store).entries] == ["done", "left"]

    done = store.path(by_method(store)["fp32"]["run_id"]) / "result.json"
    before = done.stat().st_mtime_ns
    (slow / "result.json").write_text('{"schema": 1, "run_id": "')  # as a crash of the file system would leave it
    result, text = launch(asked, store)
    assert (result.done, result.failed, result.exit_status) == (2, 0, 0)
    assert done.stat().st_mtime_ns == before
    assert f"{slow / 'result.json'} is set aside: truncated" in text
    assert (slow / "result.json.aside-1").read_text() == '{"schema": 1, "run_id": "'
    assert len((slow / "metrics.csv").read_text().splitlines()) == 1 + 5
    begun = (slow / "log.txt").read_text().count("an epoch begins")
    assert begun <= 5 + 1, "the run began again, and not from its last checkpoint"


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    """Workers of a sweep that was killed would train on unseen, and hold the locks of their runs."""
    store = Store(tmp_path)
    process = drive(suite("slow", epochs=60), store)
    until(lambda: unfinished(store))
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.kill()
    process.communicate()
    until(lambda: not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 10)
    # A process is a zombie as soon as its main thread has ended; its locks go with the last one.
    until(lambda: [e.state for e in status("tiny", store).entries] == ["left"], 10)


@pytest.mark.slow
def test_two_sweeps_share_a_store(tmp_path):
    """Two terminals on one suite would train the same run twice, or one would end before all is done."""
    store, asked = Store(tmp_path), suite("fp32", "slow", "slower", seed=[0, 1])
    processes = [drive(asked, store) for _ in range(2)]
    texts = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], texts
    assert [r["status"] for r in store.records()] == ["done"] * 6
    assert set(attempts(store).values()) == {1}


@pytest.mark.slow
def test_time_limit_stops_what_runs(tmp_path):
    """A sweep in a two-hour slot would run over it, or report its unfinished runs as failed."""
    store = Store(tmp_path)
    result, text = launch(suite("slow", epochs=500), store, time_limit="8s", command="the same command")
    assert (result.done, result.failed, result.left, result.exit_status) == (0, 0, 1, 0)
    assert result.out_of_time
    assert text.splitlines()[-1] == (
        "Time limit of 8s reached: 0 of 1 runs are done, nothing finished is lost. Go on with: the same command"
    )
    assert store.records() == []


@pytest.mark.slow
def test_a_failed_float_network_fails_its_runs(tmp_path):
    """Runs whose float network cannot be trained would wait for ever."""
    store = Store(tmp_path)
    result, text = launch(suite("fp32", "noisy", float_lr=1e30), store)
    assert (result.done, result.failed, result.exit_status) == (0, 2, 1)
    assert {r["reason"].split(":")[0] for r in store.records()} == {"float network"}
    assert "and with it 2 runs" in text
    assert Path(store.records()[0]["provenance"]["log"]).exists()


def test_dry_run_prints_the_plan_and_runs_nothing(tmp_path):
    """`--dry-run` would train, or leave a suite behind that was never launched."""
    store = Store(tmp_path)
    result, text = launch(suite("fp32", "ptq", bits=["w4a4", "w2a2"], seed=[0, 1]), store, dry_run=True, workers=3)
    assert (result.left, result.exit_status) == (6, 0)
    assert re.search(r"^ptq w2a2 +s0, s1 *$", text, re.MULTILINE)
    assert "tiny: 6 runs: 6 to run, 2 float networks to train, 3 workers" in text
    assert store.records() == []
    assert store.suites() == []


def test_a_worker_that_cannot_start_is_one_line(tmp_path):
    """A plugin file that vanished between two launches would hang the sweep."""
    gone = tmp_path / "gone.py"
    with pytest.raises(UserError, match=r"a worker could not start: .*gone\.py"):
        sweep(suite("fp32"), Store(tmp_path / "runs"), workers=1, plugins=[gone], console=Console(file=io.StringIO()))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs to be root, to become somebody else")
def test_read_only_store(tmp_path):
    """A store that may not be written to would be a traceback, after the first run was trained."""
    root = tmp_path / "runs"
    launch(suite("fp32"), Store(root), dry_run=True)  # prepares the data
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from qatbench.bench import registry
        from qatbench.bench.errors import UserError
        from qatbench.bench.spec import SuiteSpec
        from qatbench.bench.store import Store
        from qatbench.sweeps.local import sweep
        registry.load_file({str(PLUGIN)!r})
        suite = SuiteSpec.model_validate_json({suite("fp32").model_dump_json()!r})
        import torch._dynamo  # before the rights are gone: the checkout may be in root's home
        os.setresuid(65534, 65534, 65534)
        try:
            sweep(suite, Store({str(root)!r}), wandb=False)
        except UserError as error:
            print(error)
            sys.exit(2)
    """)
    open_to_all(tmp_path)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2, process.stderr
    assert (
        process.stdout.splitlines()[-1] == f"store {root} is read-only; choose another with --store or QATBENCH_STORE"
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    """A time limit would mean something else."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "0s", "-2h", "2 hours", "30m2h"])
def test_bad_durations_are_refused(text):
    """A limit that cannot be read would be no limit."""
    with pytest.raises(UserError, match=r"write e\.g\. 2h"):
        parse_duration(text)


def test_workers_share_cores_and_gpus():
    """A sweep would start a worker for every core although each takes four, or put all workers on the first GPU."""
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(None, 1, ["4", "7"], 9)] == ["4", "7"]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(3, 1, ["4", "7"], 9)] == ["4", "7", "4"]
    assert places(2, 4, [], 9) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert len(places(None, 1, [], 10**6)) == usable_cores()
    assert len(places(None, 10**6, [], 9)) == 1
    assert len(places(None, 1, [], 1)) == 1
    assert places(None, 1, [], 0) == []


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "cuda:4096", ""])
def test_no_such_device(tmp_path, device):
    """A misspelt device would fail every run of the sweep, one by one."""
    with pytest.raises(UserError, match=r"use auto(,| or) cpu"):
        launch(suite("fp32"), Store(tmp_path), device=device)
    assert find_gpus("cpu") == []
