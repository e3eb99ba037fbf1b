"""A run on a cluster's machine is the run that it is anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qatbench.bench import registry
from qatbench.bench.alone import environment, leave_cluster, unseen
from qatbench.bench.resolve import resolve
from qatbench.bench.runner import run
from qatbench.bench.spec import RunSpec
from qatbench.bench.store import Store
from support import SQUARES, TINY

CLUSTERS = {
    "a job of eight tasks": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3"},
    "srun": {
        "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "qat",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]",
    },
    "numbers that are none": {"SLURM_JOB_ID": "x", "SLURM_NTASKS": "2(x3)", "SLURM_JOB_NAME": "a", "SLURM_PROCID": ""},
    "LSF": {"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_SIZE": "4",
            "JSM_NAMESPACE_RANK": "1", "LSB_HOSTS": ""},
    "torchrun": {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1",
        "TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    },
    "kubeflow": {"KUBERNETES_PORT": "tcp://1", "MASTER_ADDR": "m", "MASTER_PORT": "1", "WORLD_SIZE": "4", "RANK": "2"},
    "MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMI_RANK": "2", "PMI_SIZE": "4"},
    "ranks by hand": {"LOCAL_RANK": "x", "NODE_RANK": "", "WORLD_SIZE": "four"},
    "settings of Lightning": {"PL_TRAINER_MAX_EPOCHS": "7", "PL_TRAINER_LIMIT_TRAIN_BATCHES": "1", "PL_TRAINER_FAST_DEV_RUN": "1",
                              "PL_TRAINER_NUM_NODES": "2", "PL_TRAINER_PRECISION": "bf16-mixed"},
}  # fmt: skip


@pytest.fixture
def squares() -> Iterator[None]:
    """The data set of the tests."""
    before = dict(registry._files)
    registry.load_file(SQUARES)
    yield
    registry._files.clear()
    registry._files.update(before)


def metrics(folder: Path) -> dict[str, float]:
    asked = {"method": "lsq", "data": "squares", "epochs": 2, "float_epochs": 1, "batch": 32, "calibration": 32}
    store = Store(folder)
    record = run(resolve(RunSpec(**asked), data_root=None, cache=store.cache), store, wandb=False)
    assert record["status"] == "done", record["reason"]
    return record["metrics"]


def test_every_cluster_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squares: None) -> None:
    """A sweep in a job of several tasks would fail in every run; or a variable would change a number that nothing names."""
    plain = metrics(tmp_path / "plain")
    for number, (cluster, variables) in enumerate(CLUSTERS.items()):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert metrics(tmp_path / str(number)) == plain, cluster
            assert {name: os.environ.get(name) for name in variables} == variables, "somebody else's variables"


def test_command_line_starts_where_ranks_are_no_numbers(tmp_path: Path) -> None:
    """Lightning and torchmetrics would raise as they are imported, and every command with them."""
    variables = {name: value for each in CLUSTERS.values() for name, value in each.items()} | {"RANK": ""}
    command = [
        sys.executable,
        "-m",
        "qatbench",
        "run",
        "--method",
        "fp32",
        *TINY,
        "--no-wandb",
        "--store",
        str(tmp_path),
    ]
    env = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout


def test_what_is_hidden_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports qatbench in an own process of a cluster would lose that process's rank; or a user's variables would go."""
    for name in ("RANK", "PL_TRAINER_DEVICES", "RANKING", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    with unseen():
        assert "RANK" not in os.environ
        assert "PL_TRAINER_DEVICES" not in os.environ
        assert (os.environ["RANKING"], os.environ["SLURM_JOB_ID"]) == ("1", "1")
    assert os.environ["RANK"] == os.environ["PL_TRAINER_DEVICES"] == "1"
    assert "RANK" not in environment()
    leave_cluster()
    assert "RANK" not in os.environ
