"""Suites: YAML files, those that come with qatbench and the user's own."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..bench.errors import UserError, nearest
from ..bench.spec import SuiteSpec, validated

SUITES = Path(__file__).parent / "suites"
_LARGEST = 1_000_000  # bytes; a suite is a few lines


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
    values = _read(path)
    if isinstance(values.get("plan"), str):
        values["plan"] = str(path.parent / values["plan"])
    return validated(SuiteSpec, {"name": path.stem, **values}, f"suite {path if is_path else name}")


def _read(path: Path) -> dict:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{path} is a directory; a suite is a .yaml file")
        if size > _LARGEST:
            raise UserError(f"{path} has {size / 1e6:.0f} MB; a suite is a few lines of YAML (at most 1 MB)")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; suites that come with qatbench: {', '.join(suite_names())}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; a suite is a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if values is None:
        raise UserError(f"{path} is empty; a suite names at least its methods, e.g. `method: [fp32, lsq]`")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds a {type(values).__name__}; a suite is keys and values, e.g. `method: [fp32, lsq]`"
        )
    return values
