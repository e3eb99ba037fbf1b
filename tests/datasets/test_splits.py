"""Splits are data: the same images in the same parts on every machine, in every process and version of Python.

``splits.json`` holds the hash of every split here, by data set, settings and seed. A split that moved is another benchmark: if that
is meant, raise the data set's `version`, and write the file anew: ``QATBENCH_SPLITS=write make test
ARGS=tests/datasets/test_splits.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from qatbench.bench.data import DataSet, Domain, Loaded, hash_splits, make_splits, open_data

STORED = Path(__file__).with_name("splits.json")
DATA = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
SEEDS = (0, 1, 2)
MADE: dict[str, dict[str, Any]] = {
    "plain": {},
    "no validation": {"val": 0.0},
    "limit": {"limit": 100},
    "ldam 10": {"imbalance": 10.0},
    "climbq 10": {"imbalance": 10.0, "lt_list": "climbq"},
}
REAL: list[tuple[str, dict[str, Any]]] = [
    ("digits", {}),
    ("digits", {"limit": 5000}),
    ("digits", {"domains": ["chars74k_street"]}),
    ("office31", {"size": 32}),
    ("office31", {"size": 32, "split": "alignq"}),
    ("cifar10", {}),
    ("cifar10-lt", {"imbalance": 50.0}),
    ("cifar10-lt", {"imbalance": 200.0}),
    ("cifar10-lt", {"imbalance": 50.0, "lt_list": "climbq"}),
]


def made(**params: Any) -> Loaded:
    """Labels and groups by arithmetic: an official test part, groups over two domains, and a class of one image."""
    domains = []
    for d, n in enumerate((500, 400, 301)):
        i = torch.arange(n)
        labels = (i * i + d) % 7 % 5 if d < 2 else torch.where(i == 300, 4, i % 4)
        test = i[i % 5 == 3] if d == 0 else None
        group = 1000 + i // (1 + d) if d else None
        domains.append(Domain(f"d{d}", torch.zeros(n, 1, 1, 1, dtype=torch.uint8), labels, test, group))
    return Loaded("made", domains, "", tuple("abcde"), params=DataSet.Params.model_validate(params))


def check(key: str, loaded: Loaded) -> None:
    found = {str(seed): hash_splits(make_splits(loaded, seed)) for seed in SEEDS}
    stored = json.loads(STORED.read_text())
    if os.environ.get("QATBENCH_SPLITS") == "write":
        STORED.write_text(json.dumps(dict(sorted((stored | {key: found}).items())), indent=1) + "\n")
    else:
        assert found == stored[key]


@pytest.mark.parametrize("name", MADE)
def test_splits_of_made_labels(name):
    """Broken if a split depends on the machine, the version of Python, or a change of the code that nobody noticed."""
    check(f"made {name}", made(**MADE[name]))


@pytest.mark.parametrize("params", [{}, {"imbalance": 5.0}])
def test_splits_of_optdigits(params, tmp_path):
    """Broken if the quickstart's numbers are of other images than yesterday's."""
    check(f"optdigits {json.dumps(params)}", open_data("optdigits", params, None, tmp_path))


@pytest.mark.parametrize(
    ("name", "params"), REAL, ids=lambda value: value if isinstance(value, str) else json.dumps(value)
)
def test_splits_of_real_images(name, params, tmp_path_factory):
    """Broken if two stores, or two years, compare numbers on different test images of one data set."""
    if not DATA.is_dir():
        pytest.skip(f"no images in {DATA}: set QATBENCH_DATA")
    cache = tmp_path_factory.getbasetemp() / "splits"
    check(f"{name} {json.dumps(params)}", open_data(name, params, DATA, cache))
