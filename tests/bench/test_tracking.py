"""Tracking: what W&B is given, that it stays offline and silent, and that it can break without breaking a run."""

from __future__ import annotations

import csv
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from qatbench.bench.tracking import Tracker, write_history
from support import read_offline

RUN = "0123456789abcdef"
CONFIG = {"method": "lsq", "bits": "w4a4", "params": {"lsq": {"grad_scale": 0.5}}, "seed": 0, "protocol": None}
KEY = "5ecre75ecre75ecre75ecre75ecre75ecre75ecre"[:40].replace("r", "0")  # 40 hexadecimal digits, like a real one


@pytest.fixture(autouse=True)
def fresh_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user who has never set W&B up, and a wandb that has not read its settings yet."""
    import wandb

    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.chdir(tmp_path)  # a ./wandb/settings of the developer's is not read
    (tmp_path / "home").mkdir()
    yield
    wandb.teardown()


def wandb_cli(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "wandb", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def track(run_dir: Path, epochs: range = range(3), **options: Any) -> dict[str, str | None]:
    run_dir.mkdir(exist_ok=True)
    tracker = Tracker(run_dir, RUN, CONFIG, group="quickstart", job_type="lsq", tags=["optdigits", "w4a4"], **options)
    for epoch in epochs:
        tracker.log({"train/loss": 1 / (epoch + 1), "val/acc": 0.5 + epoch / 10, "val/acc/scan": None}, epoch)
    tracker.table("plan", ["site", "weight bits", "activation bits"], [["conv1", 8, 8], ["layer1.conv1", 4, 4]])
    return tracker.finish({"test/acc": 0.97, "val/acc": 0.6, "test/map50": None})


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/*run-[0-9]*/*.wandb"))  # not latest-run, which is a link to one of them


def test_offline_run_reads_back_whole(tmp_path: Path) -> None:
    """Without it, a run could look tracked while its config, history, plan or final metrics are missing."""
    assert track(tmp_path / "run") == {"id": RUN, "mode": "offline"}
    (file,) = wandb_files(tmp_path / "run")
    found = read_offline(file)
    config = {key: value for key, value in found["config"].items() if key != "_wandb"}
    assert config == CONFIG
    assert [row["epoch"] for row in found["history"]] == [row["_step"] for row in found["history"]] == [0, 1, 2]
    assert [row["val/acc"] for row in found["history"]] == pytest.approx([0.5, 0.6, 0.7])
    assert found["summary"]["test/acc"] == 0.97
    assert found["summary"]["val/acc"] == 0.6, "the last epoch was written over the final metrics"
    assert "test/map50" not in found["summary"]
    table = json.loads((file.parent / "files" / found["summary"]["plan"]["path"]).read_text())
    assert table["data"] == [["conv1", 8, 8], ["layer1.conv1", 4, 4]]
    run = found["run"]
    assert (run["run_id"], run["project"], run["run_group"], run["job_type"]) == (RUN, "qatbench", "quickstart", "lsq")
    assert run["tags"] == ["optdigits", "w4a4"]
    assert run["display_name"] == "lsq w4a4 seed 0"
    assert found["exit"]["exit_code"] == 0


def test_summary_command_shows_metrics(tmp_path: Path) -> None:
    """Without it, the command that the user is told to look with could show an empty run."""
    track(tmp_path / "run")
    shown = wandb_cli("leet", "inspect", "--summary", tmp_path / "run" / "wandb")
    assert any(line.split() == ["test/acc", "0.97"] for line in shown.splitlines())
    assert any(line.split() == ["method", "lsq"] for line in shown.splitlines())


def test_every_file_is_in_the_run_folder(tmp_path: Path) -> None:
    """Without it, each run leaves files in the user's home, and a moved store loses its tables."""
    track(tmp_path / "run")
    elsewhere = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "run" not in path.parents]
    assert [path for path in elsewhere if "logs" not in path.parts] == []  # wandb's service keeps its own log
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"wandb"}


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without it, W&B writes over the progress display."""
    track(tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_resumed_run_keeps_its_id_and_steps(tmp_path: Path) -> None:
    """Without it, a retried run is a second run in W&B, or its later epochs overwrite the first ones."""
    track(tmp_path / "run", epochs=range(2))
    track(tmp_path / "run", epochs=range(2, 4))
    parts = [read_offline(file) for file in wandb_files(tmp_path / "run")]
    assert [part["run"]["run_id"] for part in parts] == [RUN, RUN]
    assert [row["_step"] for part in parts for row in part["history"]] == [0, 1, 2, 3]


def test_exception_marks_run_failed(tmp_path: Path) -> None:
    """Without it, a run that died looks finished."""
    tmp_path.joinpath("run").mkdir()
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path / "run", RUN, CONFIG):
        _ = 1 / 0
    (file,) = wandb_files(tmp_path / "run")
    assert read_offline(file)["exit"]["exit_code"] == 1


def test_killed_run_keeps_its_history(tmp_path: Path) -> None:
    """Without it, a run that is killed, or still going on, is empty in W&B."""
    code = (
        "import pathlib, time; from qatbench.bench.tracking import Tracker\n"
        f"t = Tracker(pathlib.Path({str(tmp_path)!r}), {RUN!r}, {{}}); t.log({{'a': 1.0}}, 0); t.log({{'a': 2.0}}, 1)\n"
        "time.sleep(120)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as running:
        deadline = time.monotonic() + 60
        history: list[dict[str, Any]] = []
        while len(history) < 2:
            assert time.monotonic() < deadline, "nothing was written while the run was going on"
            time.sleep(0.2)
            history = [row for file in wandb_files(tmp_path) for row in read_offline(file)["history"]]
        running.kill()
    assert [row["a"] for row in history] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), (None, "--no-wandb")]
)
def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str) -> None:
    """Without it, W&B runs for users who said no."""
    if variable:
        monkeypatch.setenv(variable, value)
    assert track(tmp_path / "run", enabled=variable is not None) == {"id": RUN, "mode": "disabled"}
    assert list((tmp_path / "run").iterdir()) == []


def test_switched_off_imports_no_wandb(tmp_path: Path) -> None:
    """Without it, --no-wandb still pays for wandb, and fails where wandb is broken."""
    code = (
        "import sys, pathlib; from qatbench.bench.tracking import Tracker\n"
        f"t = Tracker(pathlib.Path({str(tmp_path)!r}), 'a', {{}}, enabled=False); t.log({{'a': 1.0}}, 0)\n"
        "t.table('plan', ['a'], [[1]]); t.finish({}); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("where", ["file", "environment"])
def test_offline_setting_wins_over_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Without it, a user who chose offline is contacted to a server because a key is at hand."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if where == "file":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
    assert track(tmp_path / "run")["mode"] == "offline"
    assert [folder.name for folder in (tmp_path / "run" / "wandb").glob("run-*")] == [], "it tried to go online"
    assert KEY not in all_text(tmp_path)


def all_text(folder: Path) -> str:
    return "\n".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a run's log gets; wandb's own loggers do not go there."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("qatbench")]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_dead_server_costs_seconds_and_no_key_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: str
) -> None:
    """Without it, a logged-in user without network waits for minutes, loses the run, or finds the key in a file."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "is silent":
            listener.listen(50)  # takes every connection, answers none
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        started = time.monotonic()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.txt").touch()
        handler = logging.FileHandler(tmp_path / "run" / "log.txt")
        logging.getLogger("qatbench").addHandler(handler)
        try:
            record = track(tmp_path / "run")
        finally:
            logging.getLogger("qatbench").removeHandler(handler)
            handler.close()
        assert time.monotonic() - started < 60
    assert record == {"id": RUN, "mode": "offline"}
    (warning,) = ours(caplog)
    assert "\n" not in warning
    offline = [file for file in wandb_files(tmp_path / "run") if "offline" in file.parent.name]
    assert read_offline(offline[0])["summary"]["test/acc"] == 0.97
    (tmp_path / "run" / "result.json").write_text(json.dumps(record))
    assert KEY not in all_text(tmp_path)


def test_dead_service_ends_tracking_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without it, a crash of wandb's service ends a training that was going well."""
    tmp_path.joinpath("run").mkdir()
    tracker = Tracker(tmp_path / "run", RUN, CONFIG)
    tracker.log({"loss": 1.0}, 0)
    (service,) = [child for child in psutil.Process().children() if "wandb" in child.name()]
    service.kill()
    service.wait(10)
    for epoch in range(1, 20):
        tracker.log({"loss": 1.0}, epoch)
        time.sleep(0.02)
    tracker.table("plan", ["site"], [["conv1"]])
    assert tracker.finish({"test/acc": 0.9}) == {"id": RUN, "mode": None}
    (warning,) = ours(caplog)
    assert warning.startswith("W&B is off for this run: ")
    assert track(tmp_path / "next")["mode"] == "offline", "the next run of the same process is not tracked either"


def test_bad_setting_ends_tracking_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, a typing error in a W&B variable fails every run of a sweep; or the key is in the error's text."""
    monkeypatch.setenv("WANDB_MODE", f"ofline-{KEY}")
    assert track(tmp_path / "run")["mode"] is None
    assert "W&B is off for this run" in caplog.text
    assert KEY not in caplog.text


def test_history_has_every_key_and_no_half_written_file(tmp_path: Path) -> None:
    """Without it, a column that appears late is lost, or a crash leaves half a file."""
    path = tmp_path / "metrics.csv"
    rows: list[dict[str, Any]] = [{"epoch": 0, "loss": 0.1 + 0.2}]
    write_history(path, rows)
    rows += [{"epoch": 1, "loss": 0.25, "val/acc/a,b": 0.5}, {"epoch": 2, "loss": None}]
    write_history(path, rows)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["epoch", "loss", "val/acc/a,b"],
            ["0", repr(0.1 + 0.2), ""],
            ["1", "0.25", "0.5"],
            ["2", "", ""],
        ]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("metrics")] == ["metrics.csv"]
