"""What a row and a table are called: only what sets them apart."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .frame import one_line

if TYPE_CHECKING:
    from .leaderboard import Cell, Table

Record = dict[str, Any]
# What must agree, with the data's hash, for numbers to share a table.
TABLE = ("data", "data_params", "protocol", "network")
_AXES = (*TABLE, "method", "bits", "seed")
_VERSION = "version of "


def canonical(value: Any) -> str:
    """The value as text that is equal for equal values: a key to group by."""
    return json.dumps(value, sort_keys=True, default=str)


def code(record: Record) -> dict[str, Any]:
    """The versions of the code that made the number: of the harness, the method, the data set."""
    versions = record["provenance"].get("code")
    return versions if isinstance(versions, dict) else {"code": versions} if versions else {}


def settings(record: Record) -> dict[str, Any]:
    """Everything that determines the number, but for the axes of the leaderboard, as flat ``name -> value``."""
    flat, spec = {}, record["spec"]
    for name, value in spec.items():
        if name == "params" and isinstance(value, dict):
            for method, params in value.items():
                for key, setting in params.items() if isinstance(params, dict) else [("params", params)]:
                    flat[key if len(value) == 1 and key not in spec else f"{method}.{key}"] = setting
        elif name not in _AXES:
            flat[name] = value
    return flat | {f"{_VERSION}{name}": version for name, version in code(record).items()}


def labelled(cells: list[Cell]) -> list[Cell]:
    """Name in each label the settings in which the cells of the same method differ."""
    differ = {m: _differ([c.settings for c in cells if c.method == m]) for m in {c.method for c in cells}}
    named = []
    for cell in cells:
        names = [n for n in differ[cell.method] if n in cell.settings or not n.startswith(_VERSION)]
        what = ", ".join(f"{one_line(n)}={short(cell.settings.get(n, 'unset'))}" for n in names)
        named.append(replace(cell, label=f"{cell.method} ({what})") if what else cell)
    return named


def _differ(same: list[dict[str, Any]]) -> list[str]:
    """The settings that are not the same everywhere; a run that failed before it knew a version does not count."""
    names = dict.fromkeys(n for settings in same for n in settings)
    values = {n: {canonical(s.get(n, "unset")) for s in same if n in s or not n.startswith(_VERSION)} for n in names}
    return [n for n in names if len(values[n]) > 1]


def short(value: Any) -> str:
    """A setting as people write it."""
    if value is None:
        return "none"
    return one_line(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))


def recipe(cells: list[Cell]) -> str:
    """The settings all cells share, and by name those who have others: equal treatment should be visible."""
    names = [n for n in dict.fromkeys(n for c in cells for n in c.settings) if all(n in c.settings for c in cells)]
    shared, others = [], []
    for name in names:
        values = [short(c.settings[name]) for c in cells]
        usual = max(sorted(set(values)), key=values.count)
        shared.append(f"{one_line(name)} {usual}")
        if name.startswith(_VERSION):
            continue  # in the label where it matters
        by_value: dict[str, list[str]] = defaultdict(list)
        for cell, value in zip(cells, values, strict=True):
            if value != usual:
                by_value[value].append(cell.label)
        others += [f"{one_line(name)} {v}: {', '.join(dict.fromkeys(by_value[v]))}" for v in sorted(by_value)]
    return ", ".join(shared) + (f". Not so: {'; '.join(others)}" if others else "")


def titled(boards: list[Table]) -> list[Table]:
    """The imbalance is named; tables that would have the same title name the settings in which they differ, and then the hash."""
    plain = [f"{t.data} · {t.protocol} · {t.network}" for t in boards]
    longer = []
    for table, title in zip(boards, plain, strict=True):
        alike = [t.data_params for t, other in zip(boards, plain, strict=True) if other == title]
        named = {k: v for k, v in sorted(table.data_params.items()) if any(short(p.get(k)) != short(v) for p in alike)}
        if table.data_params.get("imbalance") is not None:
            named = {"imbalance": table.data_params["imbalance"]} | named
        settings = ", ".join(f"{one_line(k)}={short(v)}" for k, v in named.items())
        longer.append(f"{title} ({settings})" if settings else title)
    hashed = [
        f"{title} [data {str(table.data_hash)[:8]}]" if longer.count(title) > 1 else title
        for table, title in zip(boards, longer, strict=True)
    ]
    return [replace(table, title=title) for table, title in zip(boards, hashed, strict=True)]
