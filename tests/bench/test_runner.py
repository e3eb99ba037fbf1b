"""One run, from spec to record: exact resume, one float network, selection, and what the record says."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qatbench.bench import fit as fit_module
from qatbench.bench import registry
from qatbench.bench import runner as runner_module
from qatbench.bench.data import DataModule
from qatbench.bench.disk import read_json, write_json
from qatbench.bench.errors import UserError, trouble
from qatbench.bench.fit import load, save
from qatbench.bench.models.resnet import ResNet8
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import load_run, run
from qatbench.bench.site import find_sites
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import SCHEMA, Store

ROOT = Path(__file__).parents[2]
SQUARES = ROOT / "tests" / "squares.py"
TINY: dict[str, Any] = {"data": "squares", "epochs": 1, "float_epochs": 1, "batch": 32, "calibration": 32}

METHODS = '''
import dataclasses, os, signal
import torch
from qatbench import Method
from qatbench.bench.registry import find
from qatbench.methods.lsq import LSQ


class Fragile(LSQ):
    """LSQ that notes every epoch that it begins, and dies in the middle of the third when it is told to."""

    name = "fragile"

    def epoch_start(self, run):
        with open(os.environ["EPOCHS"], "a") as file:
            print(run.scope.epoch, file=file)
        self.updates = 0

    def after_update(self, run):
        self.updates += 1
        if os.environ.get("DIE") and run.scope.epoch == 2 and self.updates == 3:
            os.kill(os.getpid(), signal.Signals[os.environ["DIE"]])


class Raises(LSQ):
    name = "raises"

    def losses(self, out, batch):
        raise ValueError(f"the key is {os.environ['WANDB_API_KEY']}")


class NaN(LSQ):
    name = "nan"

    def losses(self, out, batch):
        return {"task": super().losses(out, batch)["task"] * float("nan")}


class Peeks(LSQ):
    name = "peeks"

    def validated(self, run, metrics):
        for loader in self.data.open_test():
            for batch in loader:
                self.seen = batch


class Quarters(find("datasets", "squares")):
    """Four brightnesses, of which two are dark and two are bright."""

    name = "quarters"
    classes = ("a", "b", "c", "d")
    superclasses = ("dark", "bright")
    superclass = (0, 1, 0, 1)

    def load(self):
        quarters = lambda d: torch.arange(len(d.labels)) // 2 % 2 * 2 + d.labels  # noqa: E731
        return [dataclasses.replace(d, labels=quarters(d)) for d in super().load()]


class Lopsided(find("datasets", "squares")):
    """Ten times as many dark squares as bright ones."""

    name = "lopsided"

    def load(self):
        return [dataclasses.replace(d, labels=(torch.arange(120) % 11 == 0).long()) for d in super().load()]


class Fickle(Method):
    """Right on the left in the first epoch only, right on the right in the last epoch only."""

    name = "fickle"
    changes_net = False
    bits = (32,)

    def __init__(self, params=None):
        super().__init__(params)
        self.register_buffer("when", torch.zeros((), dtype=torch.int64))

    def epoch_start(self, run):
        self.when.fill_(run.scope.epoch)

    def predict(self, net, batch):
        bright, known = batch.x.mean((1, 2, 3)), self.probe.x.mean((1, 2, 3))
        middle = torch.stack([known[self.probe.domain == d].mean() for d in (0, 1)])[batch.domain]
        truth = (bright > middle) ^ (batch.domain == 1)
        good = torch.tensor([[True, False], [False, False], [False, True]])[self.when][batch.domain]
        return torch.nn.functional.one_hot((truth == good).long(), 2).float()
'''


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = dict(registry._files)
    file = tmp_path / "wild.py"
    file.write_text(METHODS)
    monkeypatch.setenv("EPOCHS", str(tmp_path / "epochs.txt"))
    registry.load_file(SQUARES)
    registry.load_file(file)
    yield file
    registry._files.clear()
    registry._files.update(before)


def go(store: Store, method: str, **settings: Any) -> dict[str, Any]:
    resolved = resolve(RunSpec(method=method, **{**TINY, **settings}), data_root=None, cache=store.cache)
    return run(resolved, store, wandb=False)


def weights(store: Store, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    return torch.load(store.path(record["run_id"]) / "last.ckpt", weights_only=True)["state_dict"]


def rows(store: Store, record: dict[str, Any]) -> list[dict[str, float]]:
    with (store.path(record["run_id"]) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# Resume


def test_killed_run_equals_an_uninterrupted_one(tmp_path: Path, plugins: Path) -> None:
    """Without it, a number depends on whether the machine was restarted; or a killed run starts all over."""
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    settings = ("epochs=4", "float_epochs=1", "batch=32", "calibration=32", "selection=best")
    command = [sys.executable, "-m", "qatbench", "run", "--method", "fragile", "--data", "squares", "--no-wandb"]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--plugin", str(SQUARES), "--plugin", str(plugins), "--store", str(killed.root)]
    died = subprocess.run(command, env={**os.environ, "DIE": "SIGKILL"}, capture_output=True, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert killed.records() == []
    epochs = tmp_path / "epochs.txt"
    assert epochs.read_text().split() == ["0", "1", "2"]
    epochs.unlink()
    again = go(killed, "fragile", epochs=4, selection="best")
    assert epochs.read_text().split() == ["2", "3"], "it did not go on where it was killed"
    once = go(whole, "fragile", epochs=4, selection="best")
    assert again["run_id"] == once["run_id"]
    assert again["metrics"] == once["metrics"]
    assert again["cost"] == once["cost"]
    assert rows(killed, again) == rows(whole, once)
    one, other = weights(whole, once), weights(killed, again)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_terminated_run_says_so(tmp_path: Path, plugins: Path) -> None:
    """Without it, a batch system's SIGTERM ends a run with status 0, as if it was done."""
    command = [sys.executable, "-m", "qatbench", "run", "--method", "fragile", "--data", "squares", "--no-wandb"]
    command += ["--set", "epochs=4", "--set", "float_epochs=1", "--set", "batch=32", "--set", "calibration=32"]
    command += ["--plugin", str(SQUARES), "--plugin", str(plugins), "--store", str(tmp_path / "runs")]
    env = {**os.environ, "DIE": "SIGTERM", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr == "qatbench: terminated; the same command goes on from the last finished epoch\n"
    assert Store(tmp_path / "runs").records() == []


def test_who_waits_for_another_process_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, a second `qatbench run` of a run in progress stands still for hours, and says nothing."""
    store = Store(tmp_path)
    resolved = resolve(RunSpec(method="fp32", **TINY), data_root=None, cache=store.cache)
    found: list[dict[str, Any]] = []
    other = threading.Thread(target=lambda: found.append(run(resolved, store, wandb=False)))
    with store.lock(f"float-{resolved.float_id}"):
        with store.lock(resolved.run_id):
            other.start()
            time.sleep(0.5)
            assert capsys.readouterr() == ("", "waiting for another process that trains this run\n")
        time.sleep(0.5)
        assert capsys.readouterr() == ("", "waiting for another process that trains the float network\n")
    other.join(60)
    assert found[0]["status"] == "done"
    assert go(store, "fp32") == found[0]
    assert capsys.readouterr().err == ""


def test_a_machines_fault_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a file server that is gone for a minute leaves failed runs, which nobody tries again."""
    store = Store(tmp_path)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
        fault = OSError(number, os.strerror(number), "/a/file")
        with monkeypatch.context() as patch:
            patch.setattr(runner_module, "fit", lambda *_, fault=fault, **__: (_ for _ in ()).throw(fault))
            with pytest.raises(UserError, match="the same command goes on") as caught:
                go(store, "lsq")
        assert str(store.root) in str(caught.value)
        assert store.records() == []
    with monkeypatch.context() as patch:
        fault = OSError(errno.ENOENT, "No such file or directory", "/a/file")
        patch.setattr(runner_module, "validate", lambda *_, **__: (_ for _ in ()).throw(fault))
        assert go(store, "lsq")["status"] == "failed"


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Without it, a checkpoint copied by hand gives one run the weights of another."""
    store = Store(tmp_path / "runs")
    one, other = go(store, "lsq"), go(store, "lsq", bits="w8a8")
    folder = store.path(one["run_id"])
    (folder / "result.json").unlink()
    (folder / "last.ckpt").write_bytes((store.path(other["run_id"]) / "last.ckpt").read_bytes())
    record = go(store, "lsq")
    assert record["status"] == "failed"
    assert "belongs to another run; delete it to start over" in record["reason"]


# The float network


def test_float_network_is_trained_once(tmp_path: Path) -> None:
    """Without it, methods start from different weights, or each pays for the same training."""
    store = Store(tmp_path / "runs")
    records = [go(store, method) for method in ("fp32", "ptq", "lsq", "kd+lsq")]
    (folder,) = (store.root / "float").iterdir()
    changed = (folder / "net.pt").stat().st_mtime_ns
    starts = {tuple(sorted((k, v) for k, v in r["metrics"].items() if k.startswith("float/"))) for r in records}
    assert len(starts) == 1
    assert {key for key, _ in starts.pop()} == {"float/test/acc", "float/test/acc/left", "float/test/acc/right"}
    go(store, "lsq", epochs=2)  # another length of training after it: the same start
    assert [p.name for p in (store.root / "float").iterdir()] == [folder.name]
    assert (folder / "net.pt").stat().st_mtime_ns == changed
    for other in ({"seed": 1}, {"protocol": "lodo:right"}, {"float_epochs": 2}):
        go(store, "ptq", **other)
    assert len(list((store.root / "float").iterdir())) == 4


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-2000] + bytes([raw[-2000] ^ 2]) + raw[-1999:])


def rewritten(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def other_weights(path: Path) -> None:
    save(path, {name: value + 0.1 if value.is_floating_point() else value for name, value in load(path).items()})


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("net.pt", flip),
        ("net.pt", other_weights),
        ("net.pt", Path.unlink),
        ("net.pt", lambda p: p.write_bytes(b"")),
        ("net.pt", lambda p: (p.unlink(), p.mkdir())),
        ("result.json", Path.unlink),
        ("result.json", lambda p: p.write_text("")),
        ("result.json", lambda p: p.write_text("{}")),
        ("result.json", lambda p: p.write_bytes(p.read_bytes()[:200])),
        ("result.json", lambda p: p.write_bytes(p.read_bytes().replace(b"metrics", b"metrids"))),
        ("result.json", lambda p: rewritten(p, metrics={"test/acc": 9})),
        ("result.json", lambda p: rewritten(p, metrics={"test/acc": "x"})),
        ("result.json", lambda p: rewritten(p, files={})),
        ("result.json", lambda p: rewritten(p, float_id="ff")),
    ],
)
def test_a_damaged_float_network_is_trained_again(tmp_path: Path, name: str, damage: Any) -> None:
    """Without it, every run of a float network starts from other weights than it says, or none can be made any more."""
    store = Store(tmp_path / "runs")
    before = go(store, "ptq", bits="w8a8")
    (folder,) = (store.root / "float").iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    record = go(store, "lsq")
    assert record["status"] == "done", record["reason"]
    (note,) = record["provenance"]["notes"]
    assert note.startswith(str(folder / name))
    assert note.endswith("; the float network is trained again")
    assert record["provenance"]["float"] == before["provenance"]["float"], "the same seeds give the same weights"
    assert {path.name for path in folder.iterdir()} == whole.keys()
    assert (folder / "net.pt").read_bytes() == whole["net.pt"]
    assert "notes" not in go(store, "dorefa")["provenance"]


@pytest.mark.parametrize("damage", [flip, other_weights, Path.unlink, lambda p: p.write_bytes(b"")])
def test_best_weights_that_are_gone_are_not_the_last_ones(tmp_path: Path, plugins: Path, damage: Any) -> None:
    """Without it, the last epoch's weights are measured and recorded as the best epoch's."""
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    once = go(whole, "fickle", epochs=3, selection="best")
    go(killed, "fickle", epochs=3, selection="best")
    folder = killed.path(once["run_id"])
    (folder / "result.json").unlink()
    damage(folder / "best.pt")
    again = go(killed, "fickle", epochs=3, selection="best")
    assert again["metrics"] == once["metrics"]
    (note,) = again["provenance"]["notes"]
    assert note.startswith(str(folder / "best.pt"))
    assert note.endswith("; the training starts over")


def test_a_run_killed_before_its_best_weights_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a kill between checkpoint and best weights loses the epoch, or the selection takes another one's."""
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    once = go(whole, "lsq", epochs=1, selection="best")
    real = fit_module.save

    def dies(path: Path, value: Any) -> None:
        if path.name == "best.pt":
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(fit_module, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        go(killed, "lsq", epochs=1, selection="best")
    monkeypatch.undo()
    assert not (killed.path(once["run_id"]) / "best.pt").exists()
    again = go(killed, "lsq", epochs=1, selection="best")
    assert again["metrics"] == once["metrics"]
    assert "notes" not in again["provenance"]


@pytest.mark.parametrize("name", ["last.ckpt", "best.pt", "result.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda p: p.write_bytes(b""), lambda p: (p.unlink(), p.mkdir())])
def test_a_damaged_run_is_not_loaded(tmp_path: Path, name: str, damage: Any) -> None:
    """Without it, an export or a probe is of other weights than the number beside it, or ends in a traceback."""
    store = Store(tmp_path / "runs")
    record = go(store, "lsq", selection="best")
    path = store.path(record["run_id"]) / name
    damage(path) if name != "result.json" or damage is not flip else path.write_bytes(b" " + path.read_bytes())
    with pytest.raises(UserError) as told:
        load_run(store, record["run_id"])
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value) or (name == "result.json" and "there is no run" in str(told.value))


def test_a_run_that_did_not_train_is_loaded_from_its_own_start(tmp_path: Path) -> None:
    """Without it, a network that was made again on another machine is taken for the one that was measured."""
    store = Store(tmp_path / "runs")
    record = go(store, "ptq", bits="w8a8")
    (folder,) = (store.root / "float").iterdir()
    other_weights(folder / "net.pt")
    digest = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
    rewritten(folder / "result.json", files={"net.pt": digest})
    with pytest.raises(UserError, match=r"net\.pt was made again since, with other weights"):
        load_run(store, record["run_id"])


@pytest.mark.parametrize("name", ["", "log.txt"])
def test_what_is_in_the_way_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    """Without it, a file in a folder's place, or a folder in a file's, is a traceback."""
    store = Store(tmp_path / "runs")
    resolved = resolve(RunSpec(method="ptq", **TINY), data_root=None, cache=store.cache)
    place = store.path(resolved.run_id) / name if name else store.path(resolved.run_id)
    place.mkdir(parents=True) if name else place.write_text("")
    with pytest.raises(UserError, match=f"{re.escape(str(place))} is in the way of a (file|folder); move it"):
        run(resolved, store, wandb=False)


def test_code_that_changed_since_the_run_was_named_is_refused(tmp_path: Path, plugins: Path) -> None:
    """Without it, a worker that is started again runs a changed plugin under the hash of the old one."""
    store = Store(tmp_path / "runs")
    resolved = resolve(RunSpec(method="fickle", **TINY), data_root=None, cache=store.cache)
    del registry._files[plugins]
    plugins.write_text(plugins.read_text() + "\n")
    registry.load_file(plugins)
    with pytest.raises(UserError, match="the code of method fickle has changed since the run was named"):
        run(resolved, store, wandb=False)
    assert store.records() == []


# Failure


def test_failure_is_recorded_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a method that raises takes others with it, its reason is lost, or the user's key is in a file."""
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    store = Store(tmp_path / "runs")
    record = go(store, "raises")
    assert (record["status"], record["metrics"], record["cost"]) == ("failed", {}, {})
    assert record["reason"] == "raises.losses raised ValueError: the key is ***"
    log = Path(record["provenance"]["log"])
    assert log == store.log_path(record["run_id"])
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert re.search(r'wild.py", line \d+, in losses', text)
    assert record["provenance"]["code"]["method raises"].startswith("1+")
    assert store.records() == [record]
    assert go(store, "lsq")["status"] == "done"
    everything = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert key.encode() not in everything


def test_divergence_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    """Without it, a run of NaNs is done, with the accuracy of guessing."""
    record = go(Store(tmp_path / "runs"), "nan")
    assert record["status"] == "failed"
    assert record["reason"].startswith("diverged: ")


def test_a_run_in_bf16_is_used_in_bf16(tmp_path: Path) -> None:
    """An export or a probe would hold another network against the record than the one that was measured."""
    store = Store(tmp_path / "runs")
    record = go(store, "lsq", precision="bf16")
    found, seen = load_run(store, record["run_id"]), []
    found.method.net.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    shares = []
    for loader in found.data.open_test():
        with torch.no_grad():
            right = torch.cat([found.method.use(batch).argmax(1) == batch.y for batch in loader])
        shares.append(float(right.float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(record["metrics"]["test/acc"])
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "advice"), [({"lr": 1e30}, "take a smaller lr"), ({"float_lr": 1e30}, "take a smaller float_lr")]
)
def test_divergence_in_the_last_update_is_seen(tmp_path: Path, settings: dict[str, Any], advice: str) -> None:
    """A run whose weights are infinite after its only update would be done, or fail in the words of a JSON library."""
    record = go(Store(tmp_path / "runs"), "fp32", epochs=1, float_epochs=1, batch=4096, **settings)
    assert record["status"] == "failed"
    assert record["reason"].startswith("diverged: ")
    assert record["reason"].endswith(advice)
    assert record["metrics"] == {}


def test_failed_run_may_succeed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a run that failed for want of memory or disk can never be done."""
    store = Store(tmp_path / "runs")
    monkeypatch.setenv("EPOCHS", str(tmp_path))  # a directory: it cannot be written to
    failed = go(store, "fragile")
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("fragile.epoch_start raised IsADirectoryError")
    monkeypatch.setenv("EPOCHS", str(tmp_path / "epochs.txt"))
    done = go(store, "fragile")
    assert (done["status"], done["run_id"], done["reason"]) == ("done", failed["run_id"], None)
    assert store.records() == [done]


# Selection and the test split


@pytest.mark.parametrize(
    ("rule", "expected"), [("last", (0.0, 1.0)), ("best", (1.0, 0.0)), ("best_per_domain", (1.0, 1.0))]
)
def test_selection_rule(tmp_path: Path, rule: str, expected: tuple[float, float]) -> None:
    """Without it, a table says "best on validation data" and shows another epoch."""
    store = Store(tmp_path / "runs")
    record = go(store, "fickle", epochs=3, selection=rule)
    assert record["status"] == "done", record["reason"]
    epochs = [(row["val/acc/left"], row["val/acc/right"]) for row in rows(store, record)]
    assert epochs == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)], "the method does not do what this test needs"
    for split in ("test", "val"):
        assert (record["metrics"][f"{split}/acc/left"], record["metrics"][f"{split}/acc/right"]) == expected, split
        assert record["metrics"][f"{split}/acc"] == sum(expected) / 2, "not the unweighted mean over domains"
    assert record["provenance"]["selection"] == rule


def test_test_split_is_opened_once_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a method or a selection rule may see test images before the end."""
    store = Store(tmp_path / "runs")
    go(store, "ptq")  # the float network has a test of its own
    opened: list[int] = []
    real = DataModule.open_test

    def watched(self: DataModule) -> Any:
        opened.append(len(next(store.root.glob("*/metrics.csv")).read_text().splitlines()) - 1)
        return real(self)

    monkeypatch.setattr(DataModule, "open_test", watched)
    go(store, "lsq", epochs=3, selection="best_per_domain")
    assert opened == [3], "epochs that were finished when the test split was opened"


def test_test_images_do_not_move_the_weights(tmp_path: Path) -> None:
    """Without it, test images leak into training, normalisation or calibration."""
    found = []
    for name, change in (("one", "images[100:]"), ("two", "255 - images[100:]")):
        del registry._files[SQUARES]
        file = tmp_path / f"{name}.py"
        text = SQUARES.read_text().replace(
            "    return Domain(name, (noise + contrast * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)\n",
            "    images = (noise + contrast * labels.view(-1, 1, 1, 1)).to(torch.uint8)\n"
            f"    images[100:] = {change}\n"
            "    return Domain(name, images, labels, test=torch.arange(100, 120))\n",
        )
        assert change in text
        file.write_text(text.replace('return "1"', f'return "{name}"'))
        registry.load_file(file)
        store = Store(tmp_path / name)
        record = go(store, "lsq", epochs=2)
        found.append(
            (weights(store, record), record["metrics"]["test/acc"], record["metrics"]["val/loss"], record["run_id"])
        )
        registry._files[SQUARES] = registry._files.pop(file)
    one, two = found
    assert one[3] != two[3], "other images, but the same run id"
    assert one[1] > two[1]
    assert one[2] == two[2]
    assert [name for name in one[0] if not torch.equal(one[0][name], two[0][name])] == []


def test_held_out_domain_is_tested_and_not_trained(tmp_path: Path) -> None:
    """Without it, "unseen" domains have been seen."""
    record = go(Store(tmp_path / "runs"), "lsq", protocol="lodo:right")
    metrics = record["metrics"]
    assert metrics["test/acc"] == metrics["test/acc/right"]
    assert {"test/acc/left", "val/acc/left"} <= metrics.keys()
    assert "val/acc/right" not in metrics
    assert metrics["test/acc_ood"] == metrics["test/acc/right"]
    assert metrics["test/acc_id"] == metrics["test/acc/left"]
    assert record["provenance"]["split_sizes"]["right"][2] == 24


def test_a_method_that_asks_for_the_test_split_gets_an_error(tmp_path: Path) -> None:
    """Without it, a method can choose its weights by the images that it is judged by."""
    record = go(Store(tmp_path / "runs"), "peeks")
    assert record["status"] == "failed"
    assert "test split was asked for: the runner alone opens it" in record["reason"]
    assert record["metrics"] == {}


def test_long_tail_is_selected_by_balanced_accuracy_and_measured_by_group(tmp_path: Path) -> None:
    """Without it, a long-tailed run is judged by its head, or its tail is nowhere to be seen."""
    store = Store(tmp_path / "runs")
    record = go(store, "lsq", data_params={"imbalance": 4.0, "domains": ["left"]}, selection="best", epochs=3)
    assert record["spec"]["protocol"] == "longtail"
    assert record["provenance"]["class_counts"] == [42, 11]
    assert record["provenance"]["split_sizes"]["left"] == [53, 7, 24]
    metrics, history = record["metrics"], rows(store, record)
    assert metrics["test/acc_medium"] == record["per_class"]["left"][0]
    assert metrics["test/acc_few"] == record["per_class"]["left"][1]
    assert metrics["test/acc"] == pytest.approx(metrics["test/bacc"]), "the test part is balanced"
    assert metrics["val/bacc"] == max(row["val/bacc"] for row in history)


def test_an_imbalance_below_the_datas_own_is_refused(tmp_path: Path) -> None:
    """Without it, a table names an imbalance that no run had."""
    with pytest.raises(UserError, match=r"imbalance=2 is not reached: 'lopsided' .* take imbalance=\d+ or more"):
        go(Store(tmp_path / "runs"), "lsq", data="lopsided", data_params={"imbalance": 2.0})
    assert go(Store(tmp_path / "runs"), "lsq", data="lopsided", data_params={"imbalance": 12.0})["status"] == "done"


def test_nothing_validates_if_nothing_is_to(tmp_path: Path) -> None:
    """Without it, whoever wants the papers' full training list cannot have it, or `best` picks weights by nothing."""
    record = go(Store(tmp_path / "runs"), "lsq", data_params={"val": 0.0})
    assert record["status"] == "done"
    assert not [name for name in record["metrics"] if name.startswith("val/")]
    with pytest.raises(UserError, match="selection=last"):
        go(Store(tmp_path / "runs"), "lsq", data_params={"val": 0.0}, selection="best")


def test_a_second_task_has_a_head_of_its_own(tmp_path: Path) -> None:
    """Without it, a data set with coarse labels, too, is half a data set: a method may even distil across the two heads."""
    for method in ("lsq", "kd+lsq"):
        record = go(Store(tmp_path / "runs"), method, data="quarters", epochs=2)
        assert record["status"] == "done", record["reason"]
        assert {"test/acc", "test/acc_coarse", "test/acc_coarse/left"} <= record["metrics"].keys()
        assert record["cost"]["plan"].keys() == go(Store(tmp_path / "runs"), "lsq")["cost"]["plan"].keys()
        state = weights(Store(tmp_path / "runs"), record)
        assert any(v.dim() == 2 and len(v) == 4 + 2 for v in state.values())


# The record


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and plain(v) for k, v in value.items())
    return all(map(plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize("method", ["lsq", "fp32", "ptq", "kd+lsq"])
def test_record_is_whole(tmp_path: Path, method: str) -> None:
    """Without it, a number cannot be traced to what made it, or a reader of records breaks."""
    store = Store(tmp_path / "runs")
    record = go(store, method, bits="w3a4")
    assert set(record) == {
        "schema",
        "run_id",
        "status",
        "reason",
        "spec",
        "metrics",
        "per_class",
        "cost",
        "time",
        "files",
        "provenance",
        "wandb",
    }
    assert (record["schema"], record["status"], record["reason"]) == (SCHEMA, "done", None)
    assert plain(record)
    kept = json.loads((store.path(record["run_id"]) / "result.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{64}", kept.pop("digest"))
    assert kept == record
    trained = [] if method == "ptq" else ["last.ckpt"]
    folder = store.path(record["run_id"])
    assert record["files"] == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in trained}
    float_id, digest = record["provenance"]["float"].values()
    assert digest == hashlib.sha256((store.float_path(float_id) / "net.pt").read_bytes()).hexdigest()
    assert set(record["spec"]) == set(RunSpec.model_fields)
    domains = ("left", "right")
    for split in ("test", "val"):
        measured = ("acc", "loss", "bacc", "ece")
        wanted = {f"{split}/{m}{d}" for m in measured for d in ("", *(f"/{d}" for d in domains))}
        assert wanted | {f"{split}/acc_worst"} <= record["metrics"].keys()
    assert {d: len(recalls) for d, recalls in record["per_class"].items()} == {d: 2 for d in domains}
    assert {
        "avg_bits_weight",
        "avg_bits_weight_inner",
        "avg_bits_act",
        "bops",
        "size_bytes",
        "levels_max",
        "plan",
    } <= record["cost"].keys()
    assert {"train_s", "step_ms", "images_per_s", "peak_rss_mb", "started", "wall_s"} <= record["time"].keys()
    provenance = record["provenance"]
    wanted = {
        "code",
        "fidelity",
        "data",
        "split",
        "git",
        "dirty",
        "versions",
        "device",
        "selection",
        "generated",
        "log",
    }
    assert wanted <= provenance.keys()
    ground = {"harness", "data set squares", "network resnet8"}
    assert set(provenance["code"]) == ground | {f"method {m}" for m in method.split("+")}
    assert set(provenance["fidelity"]) == set(method.split("+"))
    assert {"python", "torch", "lightning", "qatbench"} <= set(provenance["versions"])
    assert all(re.fullmatch(r"[0-9a-f]{64}", provenance[k]) for k in ("data", "split"))
    assert record["wandb"] == {"id": record["run_id"], "mode": "disabled"}


def test_commit_is_the_checkouts(tmp_path: Path) -> None:
    """Without it, nobody knows which code made a number, or that it was changed by hand."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    provenance = go(Store(tmp_path / "runs"), "ptq")["provenance"]
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance["git"] == head
    changed = subprocess.run([*git, "diff", "HEAD", "--quiet"], check=False).returncode
    assert re.fullmatch(r"[0-9a-f]{16}", provenance["dirty"]) if changed else provenance["dirty"] is None


def test_commit_through_a_link_and_past_gits_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a symlinked checkout has no commit, and a run started from a hook of git that of another checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    runner_module._git.cache_clear()
    known = runner_module._git()
    assert known[0] is not None
    (tmp_path / "link").symlink_to(ROOT)
    monkeypatch.setattr(runner_module, "ROOT", tmp_path / "link")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    runner_module._git.cache_clear()
    assert runner_module._git() == known
    runner_module._git.cache_clear()


def test_bits_are_bits_and_cost_is_the_plans(tmp_path: Path) -> None:
    """Without it, "2 bits" may be more, and the cost columns belong to another network."""
    cost = go(Store(tmp_path / "runs"), "lsq", bits="w2a3")["cost"]
    layers = {s.name: s for s in find_sites(ResNet8(1, 2), (1, 8, 8)) if s.kind == "layer"}
    assert set(cost["plan"]) == set(cost["levels_max"]) == set(layers)
    for name, (w, a) in cost["plan"].items():
        assert [w, a] == ([8, 8] if layers[name].edge else [2, 3])
        assert 1 < cost["levels_max"][name][0] <= 2**w
        assert 1 < cost["levels_max"][name][1] <= 2**a
    total = sum(s.weights for s in layers.values())
    assert cost["avg_bits_weight"] == pytest.approx(
        sum(s.weights * cost["plan"][n][0] for n, s in layers.items()) / total
    )
    assert cost["avg_bits_weight_inner"] == 2.0
    assert cost["bops"] == pytest.approx(
        sum(s.macs * cost["plan"][n][0] * cost["plan"][n][1] for n, s in layers.items())
    )
    parameters = sum(p.numel() for p in ResNet8(1, 2).parameters()) + 2 * len(
        layers
    )  # two steps a layer are stored, too
    quantized = sum(s.weights * cost["plan"][n][0] for n, s in layers.items())
    assert cost["size_bytes"] == pytest.approx((quantized + 32 * (parameters - total)) / 8)


def test_done_record_is_never_written_again(tmp_path: Path) -> None:
    """Without it, a finished result can be lost by running it again."""
    store = Store(tmp_path / "runs")
    record = go(store, "ptq")
    path = store.path(record["run_id"]) / "result.json"
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert go(store, "ptq") == record
    with pytest.raises(UserError, match="never overwritten"):
        store.write(record | {"status": "failed"})
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_unknown_device_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Without it, a typing error leaves half a run behind."""
    store = Store(tmp_path / "runs")
    resolved = resolve(RunSpec(method="ptq", **TINY), data_root=None, cache=store.cache)
    with pytest.raises(UserError, match="use auto or cpu"):
        run(resolved, store, device="cuda:99", wandb=False)
    assert not store.path(resolved.run_id).exists()


def test_an_error_that_is_its_own_cause_has_an_end() -> None:
    """A plugin that raises an error from itself would keep the run busy for ever."""
    error, other = ValueError("no luck"), KeyError("x")
    error.__cause__, other.__cause__ = other, error
    assert trouble(error) is None
    other.__cause__ = OSError(errno.ENOSPC, "full")
    assert trouble(error) == "no space left on the disk"
