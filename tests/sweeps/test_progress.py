"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench.errors import UserError
from qatbench.bench.resolve import Resolved
from qatbench.bench.spec import RunSpec, content_hash
from qatbench.bench.store import Store
from qatbench.sweeps.progress import Active, Clock, LiveProgress, Progress, clock, plan_table
from qatbench.sweeps.status import Entry, status
from qatbench.sweeps.worker import Job
from rich.console import Console


def job(method: str = "lsq", float_net: bool = False, label: str | None = None) -> Job:
    return Job(float_net, Resolved(RunSpec(method=method), "r", "f", {}, "d", None), label or f"{method} w4a4 s0")


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, height=24, force_terminal=terminal, color_system=None)


def event(**more) -> dict:
    return {"phase": "train", "epoch": 1, "epochs": 4, "step": 150, "steps": 400, "loss": 0.3, "val/acc": 0.925, **more}


def done(accuracy: float | None) -> dict:
    return {"status": "done", "reason": None, "metrics": {"test/acc": accuracy}}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (62, "1:02"), (3600, "1:00:00"), (11250, "3:07:30")])
def test_clock(seconds, text):
    """Times would be shown wrong."""
    assert clock(seconds) == text


def test_the_view_fits_a_terminal_of_80_columns():
    """Lines that wrap make a live view crawl down the screen."""
    out = console(terminal=True)
    progress = LiveProgress(out, "a-suite-with-a-long-name", 1234, 567, 3, 2)
    progress.started(1, job(label="gabfusion+emaq+kd+lsq w4a4 office31 lodo:amazon resnet56 s12"))
    progress.moved(1, event())
    progress.started(2, job(label="float network s0"))
    progress.waiting = [job()]
    out.print(progress.view())
    lines = out.file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 4
    assert all(len(line) <= 78 for line in lines), "a ^C echoed after the last column would begin a new line"
    assert "570/1234" in lines[0]
    assert "3 failed" in lines[0]
    assert re.search(r"epoch 2/4 .* 38 % val  92.5 %", lines[1])
    assert "working" in lines[2]
    assert lines[3].strip() == "waiting for 1 that another process trains"


def test_one_plain_line_a_run_when_not_on_a_terminal():
    """A log file of a sweep would be full of control codes, or its markup would eat text in brackets."""
    out = console(terminal=False)
    with Progress(out, "s", 3, 0, 0, 1) as progress:
        for record in (
            done(0.973),
            done(None),
            {"status": "failed", "reason": "[red] hot", "provenance": {"log": "x.txt"}},
        ):
            progress.started(1, job())
            progress.moved(1, event())
            progress.ended(1, job(), record)
    text = out.file.getvalue()
    assert text.splitlines() == [
        "ok     lsq w4a4 s0  test 97.3 %  0:00",
        "ok     lsq w4a4 s0  0:00",
        "failed lsq w4a4 s0: [red] hot  0:00",
        "       log: x.txt",
    ]
    assert (progress.done, progress.failed) == (2, 1)


def test_time_to_go_is_measured():
    """The time to go would be a guess, or ignore that workers share the work."""
    times = Clock()
    assert times.to_go([job()], [], 1) is None
    times.ended(job("lsq"), 10)
    times.ended(job("lsq"), 20)
    assert times.to_go([job("lsq")] * 4, [], 1) == pytest.approx(60)
    assert times.to_go([job("lsq")] * 4, [], 2) == pytest.approx(30)
    times.ended(job("ptq"), 1)
    assert times.to_go([job("lsq"), job("ptq"), job("pact")], [], 1) == pytest.approx(15 + 1 + 8), "unknown: the mean"
    times.ended(job("x", float_net=True), 100)
    assert times.to_go([job("lsq", float_net=True)], [], 1) == pytest.approx(100)


def test_time_to_go_of_a_running_job_is_its_step_rate():
    """A run resumed in its middle would seem to have done all its steps in a second."""
    active = Active(job())
    active.move(event(step=200))
    assert active.seconds_to_go is None
    time.sleep(0.2)
    active.move(event(step=300))
    assert active.seconds_to_go == pytest.approx(0.2, rel=0.5)
    assert Clock().to_go([job()], [active], 1) == pytest.approx(0.2 + 0.4, rel=0.6)


def test_the_phase_before_training_is_told_with_its_time_to_go():
    """A run that measures a Hessian for minutes would seem to hang in its first epoch, or be counted as nearly over."""
    out = console(terminal=True)
    progress = LiveProgress(out, "a-suite", 2, 0, 0, 1)
    progress.started(1, job("adq", label="adq avg2.81 s0"))
    traces = {"phase": "traces", "epoch": 0, "epochs": 1, "steps": 1000, "val/acc": None}
    progress.moved(1, event(**{**traces, "step": 1}))
    time.sleep(0.1)
    progress.moved(1, event(**{**traces, "step": 11}))
    out.print(progress.view())
    assert re.search(r"adq avg2.81 s0 +traces .* 1 % 0:\d\d to go", out.file.getvalue())
    active = progress.active[1]
    assert active.seconds_to_go is None
    assert active.phase_to_go == pytest.approx(9.9, rel=0.5)


def test_plan_table():
    """The plan would promise to run what it will not, or hide why something is skipped."""
    entries = [
        Entry("1", "lsq w4a4 s0", "done"),
        Entry("2", "lsq w4a4 s1", "failed", "diverged"),
        Entry("3", "lsq w4a4 s2", "running"),
        Entry("4", "gab w4a4 s0", "skipped", "needs two domains"),
    ]
    for retry, line in ((False, "lsq w4a4 s2 (running) s0 s1: diverged"), (True, "lsq w4a4 s1, s2 (running) s0")):
        out = console(terminal=False)
        out.print(plan_table(entries, retry_failed=retry))
        lines = [" ".join(text.split()) for text in out.file.getvalue().splitlines()]
        assert lines == ["cell to run done failed skipped", line, "gab w4a4 s0: needs two domains"]


@pytest.mark.parametrize("label", ["", "none", " s", "s0", "0123456789abcdef"])
def test_a_plan_of_labels_that_name_no_seed(label):
    """`status` of a manifest from elsewhere would be a traceback."""
    out = console(terminal=False)
    out.print(plan_table([Entry("1", label, "left")], retry_failed=False))
    assert "s?" in out.file.getvalue()


def test_status_of_a_suite_from_the_store_alone(tmp_path):
    """`status` would need the data, or forget why runs failed or were skipped."""
    store = Store(tmp_path)
    with pytest.raises(UserError, match="suite 'quick' was never launched on store"):
        status("quick", store)
    spec: dict[str, Any] = {"spec": {"method": "lsq"}}
    ids = [content_hash({**spec, "code": None, "data": None}), "b", "c", "d", "e"]
    names = dict(zip(ids, ["label a", "label b", "label c", "label d", "label e"], strict=True))
    store.write_suite(
        "quick",
        {"suite": {}, "run_ids": ids, "labels": names, "skips": {"c": "no"}, "command": "cmd", "float_ids": ["f", "g"]},
    )
    store.write({"run_id": ids[0], "status": "done", **spec, "time": {"wall_s": 30.0}})
    store.write({"run_id": "b", "status": "failed", "reason": "diverged", **spec})
    with store.lock("d"), store.lock("float-f"):
        found = []
        other = threading.Thread(target=lambda: found.append(status("quick", store)))  # a lock is its thread's own
        other.start()
        other.join()
    assert [(e.label, e.state, e.reason) for e in found[0].entries] == [
        ("label a", "done", None), ("label b", "failed", "diverged"), ("label c", "skipped", "no"),
        ("label d", "running", None), ("label e", "left", None),
    ]  # fmt: skip
    assert found[0].floats_at_work == 1
    assert found[0].seconds_to_go == pytest.approx(60), "two runs to go, one at work, 30 s each"
    with pytest.raises(UserError, match="did you mean 'quick'"):
        status("qiuck", store)
    assert status("quick", Store(Path(tmp_path))).count("left") == 2
