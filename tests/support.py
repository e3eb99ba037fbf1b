"""What several test files share: a data set that trains in a moment, and a reader of W&B's files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SQUARES = Path(__file__).with_name("squares.py")
TINY = (
    "--plugin",
    str(SQUARES),
    "--data",
    "squares",
    "--set",
    "epochs=1",
    "--set",
    "float_epochs=1",
    "--set",
    "batch=32",
)


def open_to_all(folder: Path) -> None:
    """Let other users into a test's folder: pytest keeps its own folders, and a worker's, to itself."""
    for place in (folder, *folder.parents):
        if place.parent == Path(place.anchor) or place.name == Path(tempfile.gettempdir()).name:
            break
        place.chmod(0o755)


def read_offline(file: Path) -> dict[str, Any]:
    """What wandb's own reader finds in a ``.wandb`` file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit": None}
    for record in map(json.loads, lines):
        if record["type"] == "run":
            found["run"] = record["run"]
            found["config"].update(record["run"]["config"]["update"])
        elif record["type"] == "history":
            found["history"].append(record["history"]["item"])
        elif record["type"] == "summary":
            found["summary"].update(record["summary"].get("update", {}))
        elif record["type"] == "exit":
            found["exit"] = record["exit"]
    return found
