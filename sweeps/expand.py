"""A suite -> its runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.chain import members
from ..bench.resolve import Resolved, resolve
from ..bench.spec import RunSpec, SuiteSpec, canonical_json


def expand(suite: SuiteSpec, *, data_root: Path | None, cache: Path) -> list[Resolved]:
    """The suite's runs in its own order. Cells that normalise alike (fp32 under w4a4 and w2a2) are one run."""
    runs: dict[str, Resolved] = {}
    for spec in suite.cells(_members):
        resolved = resolve(spec, data_root=data_root, cache=cache)
        runs.setdefault(resolved.run_id, resolved)
    return list(runs.values())


@functools.cache
def _members(method: str) -> tuple[str, ...]:
    """The names in a chain, those that a wrapper brings along too."""
    return tuple(cls.name for cls in members(method))


def labels(specs: Sequence[RunSpec]) -> list[str]:
    """Short names for people: method, bits and seed, and of the rest only what differs within the suite."""
    axes = [a for a in ("data", "protocol", "network") if len({getattr(s, a) for s in specs}) > 1]
    seen: dict[tuple[str, str], set[str]] = {}  # data set or method, and setting -> its values
    for s in specs:
        for owner, key, value in _settings(s):
            seen.setdefault((owner, key), set()).add(canonical_json(value))
    return [
        " ".join([
            s.method, s.bits, *(str(getattr(s, a)) for a in axes),
            *(f"{key}={value}" for owner, key, value in _settings(s) if len(seen[owner, key]) > 1), f"s{s.seed}",
        ])
        for s in specs
    ]  # fmt: skip


def _settings(spec: RunSpec) -> list[tuple[str, str, Any]]:
    """The settings of a run's data set and of its methods."""
    owned = {spec.data: spec.data_params, **spec.params}
    return [(owner, key, value) for owner, settings in owned.items() for key, value in settings.items()]
