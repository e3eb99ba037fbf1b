"""Three training steps of every method, against numbers that were written down.

If a test here fails although nothing about the method should have changed, something has moved its numbers: find out what.
If the change is meant, raise the method's ``version`` (or ``HARNESS`` in ``bench/resolve.py`` if all methods move), then write
the new numbers and commit them with the change::

    QATBENCH_GOLDEN=write make test ARGS=tests/methods/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from qatbench.bench.chain import members
from qatbench.bench.method import Wrapper
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.resolve import HARNESS
from qatbench.bench.testing import Loop, ready
from qatbench.methods.lsq import LearnedStep

FILE = Path(__file__).with_name("golden.json")
WRITE = os.environ.get("QATBENCH_GOLDEN") == "write"
RTOL = 1e-3
# In these a value lies so near to a rounding boundary that another number of threads, or another CPU, moves a loss by a hundredth.
FLIPS = {"dorefa": 2e-2, "n2uq": 2e-2}
STEPS = 3


def chains() -> list[str]:
    """Every built-in method, a wrapper over ``lsq``."""
    found = [p for p in plugins("methods") if p.cls is not None and p.origin.startswith(str(ROOT))]
    return [f"{p.name}+lsq" if issubclass(p.cls, Wrapper) else p.name for p in found]


def versions(chain: str) -> dict[str, int]:
    """What the numbers belong to."""
    return {"harness": HARNESS, **{cls.name: cls.version for cls in members(chain)}}


def measure(chain: str) -> list[float]:
    """The loss of each step; without training, of each batch.

    Four bits and a small learning rate: with fewer bits or larger steps one value that is rounded the other way on another
    machine (initial weights moved by one part in 10^6) changed the third loss by up to a hundredth.
    """
    method, data = ready(chain, bits="w4a4")
    batches = list(data.train_dataloader())[:STEPS]
    if method.trains:
        return Loop(method, data).epoch(batches)
    method.eval()
    with torch.no_grad():
        return [float(method.compute_losses(batch, track=False)["task"]) for batch in batches]


def compare(chain: str, entry: dict | None) -> str | None:
    """What is wrong, in one line, or None."""
    how = "write it with QATBENCH_GOLDEN=write make test ARGS=tests/methods/test_golden.py"
    if entry is None:
        return f"{chain} has no golden run; {how}"
    if entry["versions"] != versions(chain):
        return f"the golden run of {chain} is of {entry['versions']}, the code of {versions(chain)}; {how}"
    losses = measure(chain)
    if losses != pytest.approx(entry["losses"], rel=FLIPS.get(chain, RTOL)):
        return f"the numbers of {chain} moved from {entry['losses']} to {losses}, its version did not; raise it, then {how}"
    return None


@pytest.mark.parametrize("chain", chains())
def test_numbers_stay_while_the_version_stays(chain: str) -> None:
    """Old and new numbers of a method would stand in one table under one id."""
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    if WRITE:
        golden[chain] = {"versions": versions(chain), "losses": [round(v, 6) for v in measure(chain)]}
        FILE.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
    assert compare(chain, golden.get(chain)) is None


@pytest.mark.skipif(WRITE, reason="the golden runs are being written")
def test_no_golden_run_is_left_over() -> None:
    """A method that was renamed would leave numbers that nothing checks."""
    assert set(json.loads(FILE.read_text())) == set(chains())


@pytest.mark.skipif(WRITE, reason="the golden runs are being written")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_scale", property(lambda self: 0.0, lambda self, v: None)),
        ("project", lambda self: self.step.mul_(1.05)),
    ],
)
def test_a_moved_number_is_found(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would let a real change of a method through: steps that do not learn, or learn something else."""
    monkeypatch.setattr(LearnedStep, name, value, raising=False)
    message = compare("lsq", json.loads(FILE.read_text())["lsq"])
    assert message is not None
    assert "moved" in message


@pytest.mark.skipif(WRITE, reason="the golden runs are being written")
def test_a_new_version_asks_for_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version could go up, and the numbers of the old one would go on being asked of it."""
    monkeypatch.setattr(members("lsq")[0], "version", 99)
    assert "the golden run of lsq is of" in str(compare("lsq", json.loads(FILE.read_text())["lsq"]))
    assert "the golden run of kd+lsq is of" in str(compare("kd+lsq", json.loads(FILE.read_text())["kd+lsq"]))
    assert "has no golden run" in str(compare("pact", None))
