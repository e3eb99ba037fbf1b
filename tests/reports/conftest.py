"""Records in the documented schema, written by hand, so that the reports are tested without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qatbench.bench.disk import write_json
from qatbench.bench.spec import content_hash
from qatbench.bench.store import SCHEMA, Store

DOMAINS = ("scanned", "blended", "fonts")
FIDELITY = {"fp32": "baseline", "ptq": "baseline", "fqat": "reconstruction"}
RECIPE = {"epochs": 4, "float_epochs": 10, "batch": 64, "lr": 0.01, "selection": "last", "first_last": "8bit"}


def make_record(method: str, bits: str, seed: int, accuracies: tuple[float | None, ...] | None, **changes: Any) -> dict:
    """A record of a run on three domains; without accuracies, of one that failed."""
    spec = {"method": method, "params": {}, "data": "optdigits", "data_params": {}, "protocol": "mdl"}
    spec |= {"network": "resnet8", "bits": bits, "seed": seed, **RECIPE, **changes.pop("spec", {})}
    weights = int(bits[1:].split("a")[0])
    size = 78_000 * (weights + 0.13) / 8
    record = {
        "schema": SCHEMA,
        "run_id": "",
        "status": "done",
        "reason": None,
        "spec": spec,
        "metrics": {},
        "cost": {},
        "time": {"started": f"2026-03-0{seed + 1}T10:00:00+00:00"},
        "provenance": {
            "code": {"harness": 1, **{m: 1 for m in method.split("+")}, "optdigits": 1},
            "fidelity": {m: FIDELITY.get(m, "paper") for m in method.split("+")},
            "data": "da7a" * 16,
            "split": f"5{seed}" * 32,
            "git": "0123456789abcdef",
            "dirty": None,
            "selection": "last",
            "device": "cpu",
            "generated": ["blended", "fonts"],
            "log": "log.txt",
        },
        "wandb": {"id": "x", "mode": "offline"},
    }
    if accuracies is None:
        record |= {"status": "failed", "reason": "diverged: step of layer1.conv1 is not finite"}
    else:
        known = [a for a in accuracies if a is not None]
        record["metrics"] = {"test/acc": sum(known) / len(known) if known else None, "float/test/acc": 0.9}
        record["metrics"] |= {f"test/acc/{d}": a for d, a in zip(DOMAINS, accuracies, strict=True)}
        record["cost"] = {
            "avg_bits_weight": weights + (0.13 if weights < 32 else 0.0),
            "avg_bits_weight_inner": float(weights),
            "avg_bits_act": weights + (0.21 if weights < 32 else 0.0),
            "bops": 12.5e6 * weights**2,
            "size_bytes": size,
            "levels_max": {} if weights == 32 else {"layer1.conv1": [2**weights - 1, 2**weights]},
            "plan": {"layer1.conv1": [weights, weights]},
        }
        record["time"] |= {"train_s": 61.0, "step_ms": 18.2, "images_per_s": 3500, "peak_rss_mb": 900, "wall_s": 70.0}
    for name, value in changes.items():
        record[name] = record[name] | value if isinstance(record[name], dict) else value
    return named(record)


def named(record: dict) -> dict:
    """The record, under the run id that its spec, code and data stand for."""
    parts = {"spec": record["spec"], **{k: record["provenance"].get(k) for k in ("code", "data")}}
    return record | {"run_id": content_hash(parts)}


def put(store: Store, record: dict) -> Path:
    """Write a record as it lies in a store; sealed by its digest, but not by the store's own code."""
    record = named(record)
    folder = store.root / record["run_id"]
    write_json(folder / "result.json", record)
    return folder


def put_suite(store: Store, name: str, records: list[dict], seeds: list[int], absent: tuple[str, ...] = ()) -> None:
    """Write a suite's manifest, with some runs that have no record."""
    manifest = {"schema": SCHEMA, "suite": {"name": name, "seed": seeds}, "run_ids": [r["run_id"] for r in records]}
    write_json(store.root / "suites" / f"{name}.json", manifest | {"run_ids": [*manifest["run_ids"], *absent]})


@pytest.fixture
def record():
    return make_record


@pytest.fixture
def write():
    return put


@pytest.fixture
def write_suite():
    return put_suite


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")
