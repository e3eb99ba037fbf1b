"""Malformed requests by the hundred: whatever is asked for, the answer is short, in time, and leaves everything else alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import malformed
import pytest


def answers(folder: Path, step: int) -> list[dict[str, Any]]:
    """What every `step`-th request did."""
    command = [sys.executable, malformed.__file__, str(folder), str(step), "0"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def faults(told: dict[str, Any]) -> list[str]:
    """What is wrong with an answer."""
    lines = told["err"].splitlines()
    aside = [line for line in lines if " is set aside: " in line]
    found = {
        f"status {told['status']}": told["status"] not in (0, 1, 2),
        "a traceback": "Traceback" in told["out"] + told["err"],
        "not one line": len(lines) != 1 or not lines[0].startswith("qatbench: ")
        if told["status"] == 2
        else lines != aside,
        f"{told['cpu']} s": told["cpu"] >= 10,
        f"wrote {told['changed']}": told["changed"],
    }
    return [what for what, there in found.items() if there]


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])])
def test_malformed_requests_are_answered_in_one_line(tmp_path: Path, step: int) -> None:
    """Without it, a wrong file, name or number somewhere is a traceback, a wait without end, or a file where none belongs."""
    told = answers(tmp_path, step)
    assert len(told) == len(range(0, 500, step))
    bad = [(t["number"], t["family"], faults(t), " ".join(t["line"])[:200], t["err"][-600:]) for t in told if faults(t)]
    assert not bad, "\n".join(map(str, bad))
