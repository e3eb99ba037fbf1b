"""A store whose files rot: whatever is flipped or removed, no number changes unnamed, and nothing ends in a traceback."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench import registry
from qatbench.bench.disk import clear_temporaries
from qatbench.bench.errors import UserError
from qatbench.bench.resolve import Resolved, resolve
from qatbench.bench.runner import load_run, run
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from qatbench.bench.tensors import tensors_digest
from qatbench.reports.frame import select
from qatbench.reports.leaderboard import tables
from qatbench.sweeps.status import status
from support import SQUARES

TINY: dict[str, Any] = {"data": "squares", "epochs": 2, "float_epochs": 1, "batch": 60, "calibration": 32}
FINISHED: list[dict[str, Any]] = [
    *({"method": m, "bits": b} for m in ("lsq", "pact", "dorefa") for b in ("w4a4", "w2a2")),
    {"method": "fp32"},
    {"method": "ptq", "bits": "w8a8"},
    {"method": "kd+lsq"},
    {"method": "lsq", "selection": "best"},
]
INTERRUPTED: list[dict[str, Any]] = [{"method": "lsqplus", "selection": "best"}, {"method": "apot"}]


class Stop(BaseException):
    """What stops a run between two epochs."""


@dataclass(frozen=True)
class Whole:
    """A store as it was made, and what is true of it: metrics of each run, and weights of those that can be loaded."""

    root: Path
    specs: dict[str, RunSpec]
    metrics: dict[str, dict[str, float]]
    weights: dict[str, str]
    interrupted: tuple[str, ...]


def resolved(store: Store, spec: RunSpec) -> Resolved:
    return resolve(spec, data_root=None, cache=store.cache)


def stop_after_the_first_epoch(event: dict[str, Any]) -> None:
    if event["phase"] == "train" and event["step"] == event["steps"] // event["epochs"]:
        raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    before = dict(registry._files)
    registry.load_file(SQUARES)
    store, specs, metrics, weights = Store(tmp_path_factory.mktemp("whole") / "runs"), {}, {}, {}
    for settings in FINISHED:
        spec = RunSpec(**{**TINY, **settings})
        record = run(resolved(store, spec), store, wandb=False)
        assert record["status"] == "done", record["reason"]
        specs[record["run_id"]], metrics[record["run_id"]] = spec, record["metrics"]
        weights[record["run_id"]] = tensors_digest(load_run(store, record["run_id"]).method.state_dict())
    rest = []
    for settings in INTERRUPTED:
        spec = RunSpec(**{**TINY, **settings})
        with pytest.raises(Stop):
            run(resolved(store, spec), store, wandb=False, progress=stop_after_the_first_epoch)
        rest.append(resolved(store, spec).run_id)
        specs[rest[-1]] = spec
        assert (store.path(rest[-1]) / "last.ckpt").exists()
    float_ids = [path.name for path in (store.root / "float").iterdir()]
    manifest = {"suite": {"name": "tiny", "seed": [0]}, "run_ids": list(specs), "float_ids": float_ids}
    store.write_suite("tiny", {**manifest, "labels": {i: f"{i} s0" for i in specs}, "command": "qatbench sweep tiny"})
    shutil.rmtree(store.root / "locks")
    copy = Store(store.root.with_name("copy"))
    shutil.copytree(store.root, copy.root)
    metrics |= {i: run(resolved(copy, specs[i]), copy, wandb=False)["metrics"] for i in rest}
    yield Whole(store.root, specs, metrics, weights, tuple(rest))
    registry._files.clear()
    registry._files.update(before)


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def look(whole: Whole, root: Path, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that a user may do with the store; fails if a number is another one, or is gone, and nothing names the file."""
    store, said = Store(root), [*caplog.messages]
    for suite in ("tiny", None):
        try:
            selection = select(store, suite)
            tables(selection)
        except UserError as told:
            said.append(str(told))
            continue
        for record in selection.records:
            assert record["metrics"] == whole.metrics[record["run_id"]]
        said += [f"{root / name} {why}" for name, why in selection.aside.items()]
        said += [f"{run_id} {why}" for run_id, why in selection.missing.items()]
        gone = whole.specs.keys() - {r["run_id"] for r in selection.records} - set(whole.interrupted)
        assert gone <= {damaged.parent.name}
        assert not gone or damaged.name == "result.json"
        assert not gone or suite is None or any(damaged.parent.name in line for line in said)
    try:
        states = {entry.run_id: entry.state for entry in status("tiny", store).entries}
        assert {i for i in states if states[i] != "done"} - set(whole.interrupted) <= {damaged.parent.name}
    except UserError as told:
        said.append(str(told))
    if damaged.parts[0] == "suites":
        assert any(str(root / damaged) in line or "never launched" in line or "no suite" in line for line in said)

    for run_id in touched(whole, damaged):
        refusal = None
        try:
            weights = tensors_digest(load_run(store, run_id).method.state_dict())
            assert weights == whole.weights.get(run_id, weights)
        except UserError as told:
            refusal = str(told)
        if refusal is not None:
            assert "\n" not in refusal
            assert any(place in refusal for place in (str(root / damaged), damaged.parent.name, run_id)), refusal
        record = run(resolved(store, whole.specs[run_id]), store, wandb=False)
        assert (record["status"], record["metrics"]) == ("done", whole.metrics[run_id]), record["reason"]
        clear_temporaries(store.path(run_id))


def touched(whole: Whole, damaged: Path) -> list[str]:
    """The runs that may rest on a file: the one whose folder it is in, or one that goes on and one that is only loaded."""
    if damaged.parts[0] in whole.specs:
        return [damaged.parts[0]]
    ptq = next(i for i, spec in whole.specs.items() if spec.method == "ptq")
    return [ptq, whole.interrupted[1]] if damaged.parts[0] in ("float", "data") else []


def try_flip(whole: Whole, root: Path, rng: random.Random, caplog: pytest.LogCaptureFixture) -> str:
    shutil.copytree(whole.root, root)
    damaged = rng.choice([path for path in files(root) if (root / path).stat().st_size])
    content = bytearray((root / damaged).read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    (root / damaged).write_bytes(content)
    caplog.clear()
    try:
        look(whole, root, damaged, caplog)
    except BaseException as error:
        error.add_note(f"{damaged}: bit {bit} of byte {place}")
        raise
    shutil.rmtree(root)
    return damaged.name


@pytest.mark.parametrize("flips", [40, pytest.param(300, marks=pytest.mark.nightly)])
def test_no_flipped_bit_changes_a_number_unseen(whole, tmp_path, caplog, flips):
    """A disk that rots would change a number on the leaderboard, or what it rests on, without a word; or end in a traceback."""
    rng = random.Random(flips)
    seen = {try_flip(whole, tmp_path / f"{n}", rng, caplog) for n in range(flips)}
    assert {"last.ckpt", "result.json"} <= seen


def kinds(root: Path) -> list[Path]:
    """One file of each kind and place."""
    return list({(path.name, path.parts[0] in ("float", "data", "suites")): path for path in files(root)}.values())


@pytest.mark.parametrize("which", [kinds, pytest.param(files, marks=pytest.mark.nightly)])
def test_no_removed_file_changes_a_number_unseen(whole, tmp_path, caplog, which):
    """A file that is gone would be replaced by another number without a word, or end in a traceback."""
    for n, damaged in enumerate(which(whole.root)):
        root = tmp_path / f"{n}"
        shutil.copytree(whole.root, root)
        (root / damaged).unlink()
        caplog.clear()
        look(whole, root, damaged, caplog)
        shutil.rmtree(root)
