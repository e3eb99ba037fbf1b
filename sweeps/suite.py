"""Suites: YAML files, those that come with qatbench and the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench.errors import UserError, nearest
from ..bench.spec import SuiteSpec, validated
from ..bench.yaml import load

SUITES = Path(__file__).parent / "suites"


def suite_names() -> list[str]:
    """The suites that come with qatbench."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str) -> SuiteSpec:
    """A suite by its name, or by the path of a YAML file (anything with a slash or ending in .yaml or .yml).

    A plan is looked for beside the suite's file.

    Raises:
        UserError: There is no such suite, or the file is not a suite.
    """
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    if not is_path and name not in suite_names():
        raise UserError(f"unknown suite {name!r}{nearest(name, suite_names())} (or give the path of a .yaml file)")
    path = Path(name) if is_path else SUITES / f"{name}.yaml"
    values = _beside(_read(path), path.parent)
    return validated(SuiteSpec, {"name": path.stem, **values}, f"suite {path if is_path else name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = load(path, "suite")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; suites that come with qatbench: {', '.join(suite_names())}") from None
    if values is None:
        raise UserError(f"{path} is empty; a suite names at least its methods, e.g. `method: [fp32, lsq]`")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds a {type(values).__name__}; a suite is keys and values, e.g. `method: [fp32, lsq]`"
        )
    return values


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with each plan's path as seen from the suite's folder."""
    found = dict(values)
    if isinstance(found.get("plan"), str):
        found["plan"] = str(folder / found["plan"])
    if isinstance(found.get("also"), list):
        found["also"] = [_beside(more, folder) if isinstance(more, dict) else more for more in found["also"]]
    return found
