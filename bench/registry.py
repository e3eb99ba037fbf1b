"""Name -> plugin: the built-in folders, installed packages (entry points) and single files (``--plugin FILE``).

A plugin is a class with its own ``name``: a `Method`, a `DataSet`, or a network (an `nn.Module` built from channels and classes).
An import that fails is an entry, too: it is listed as unavailable, with its reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, nearest
from .imports import execute
from .secrets import scrub

ROOT = Path(__file__).parents[1]
KINDS = {"methods": "methods", "datasets": "datasets", "networks": "bench/models"}
_NAME = re.compile(r"[^\W_][\w.-]{0,63}")  # goes into file names, tables, pages and chains
_WORD = {"methods": "method", "datasets": "data set", "networks": "network"}


@dataclass(frozen=True)
class Plugin:
    """One entry of the registry.

    Attributes:
        name: As suites and the command line name it.
        kind: ``methods``, ``datasets`` or ``networks``.
        origin: File or package it comes from.
        cls: The class, or None if it is unavailable.
        error: Why it is unavailable, in one line.
        trace: The traceback of the failed import.
        source: SHA-256 of the file and its helpers, for a ``--plugin FILE``: what it computes changes whenever they do.
    """

    name: str
    kind: str
    origin: str
    cls: Any = None
    error: str | None = None
    trace: str | None = None
    source: str | None = None


_files: dict[Path, list[Plugin]] = {}


@functools.cache
def _installed(kind: str) -> tuple[Plugin, ...]:
    """Built-in plugins and those of installed packages."""
    found: list[Plugin] = []
    for path in sorted((ROOT / KINDS[kind]).glob("*.py")):
        if path.stem.startswith("_"):
            continue
        module = f"{__name__.split('.')[0]}.{KINDS[kind].replace('/', '.')}.{path.stem}"
        try:
            found += _classes(importlib.import_module(module), str(path), only=kind)
        except (Exception, SystemExit) as error:
            found.append(_broken(path.stem, kind, str(path), error))
    for entry in importlib.metadata.entry_points(group=f"qatbench.{kind}"):
        origin = entry.dist.name if entry.dist else entry.value
        try:
            loaded = entry.load()
            new = (
                _classes(loaded, origin, only=kind)
                if isinstance(loaded, ModuleType)
                else [_plugin(loaded, kind, origin)]
            )
        except (Exception, SystemExit) as error:
            new = [_broken(entry.name, kind, origin, error)]
        found += [_clash(p, found) or p for p in new]
    return tuple(found)


def load_file(path: str | Path) -> list[Plugin]:
    """Import a file and register the plugins that it defines.

    Raises:
        UserError: The file is missing, does not import, defines no plugin, or takes a name that is known already.
    """
    file = Path(path).resolve()
    if file in _files:
        return _files[file]
    if not file.is_file():
        raise UserError(f"plugin {path}: {'is a directory' if file.is_dir() else 'no such file'}; give a .py file")
    spec = importlib.util.spec_from_file_location(f"qatbench_plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin {path} is not a Python file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that classes in it can be found by name, as in any module
    try:
        source = execute(file.read_bytes(), module, file)
        found = _classes(module, str(file), source=source)
    except BaseException as error:
        del sys.modules[spec.name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"plugin {path} {_where(error, file)}does not import: {_reason(error)}") from error
    if not found:
        raise UserError(f"plugin {path} defines no method, data set or network: set the class attribute `name`")
    for plugin in found:
        known = {p.name: p for p in plugins(plugin.kind)}
        if plugin.name in known:
            raise UserError(
                f"plugin {path}: a {_WORD[plugin.kind]} named {plugin.name!r} exists already "
                f"({known[plugin.name].origin}); rename it"
            )
    _files[file] = found
    return found


def plugins(kind: str) -> list[Plugin]:
    """All plugins of a kind, by name."""
    everything = [*_installed(kind), *(p for found in _files.values() for p in found if p.kind == kind)]
    return sorted(everything, key=lambda p: p.name)


def plugin(kind: str, name: str) -> Plugin:
    """The plugin of this name; of a data set, the name ends at a colon (``imagefolder:pets``).

    Raises:
        UserError: There is none (the nearest name is given), or its import failed (the reason is given).
    """
    known = {p.name: p for p in plugins(kind)}
    if kind == "datasets":
        name = name.partition(":")[0]
    if name not in known:
        available = [n for n, p in known.items() if p.cls is not None]
        raise UserError(f"unknown {_WORD[kind]} {name!r}{nearest(name, available)}")
    if known[name].cls is None:
        raise UserError(f"{_WORD[kind]} {name!r} is unavailable: {known[name].error}")
    return known[name]


def find(kind: str, name: str) -> Any:
    """The class of this name; raises as `plugin` does."""
    return plugin(kind, name).cls


def _kind_of(cls: type) -> str | None:
    from torch import nn

    from .data import DataSet
    from .method import Method

    if issubclass(cls, Method):
        return "methods"
    if issubclass(cls, DataSet):
        return "datasets"
    return "networks" if issubclass(cls, nn.Module) else None


def _classes(module: ModuleType, origin: str, only: str | None = None, source: str | None = None) -> list[Plugin]:
    """The plugins that a module itself defines: classes whose own body sets a ``name``."""
    found = []
    for cls in vars(module).values():
        if (
            isinstance(cls, type)
            and cls.__module__ == module.__name__
            and isinstance(vars(cls).get("name"), str)
            and cls.name
        ):  # type: ignore[attr-defined]
            kind = _kind_of(cls)
            if kind is not None and only in (None, kind):
                found.append(_plugin(cls, kind, origin, source))
    names = [p.name for p in found]
    for twice in {n for n in names if names.count(n) > 1}:
        raise ValueError(f"two classes are named {twice!r}")
    return found


def _plugin(cls: Any, kind: str, origin: str, source: str | None = None) -> Plugin:
    from .hooks import check_attributes

    if not isinstance(cls, type) or _kind_of(cls) != kind or not getattr(cls, "name", ""):
        raise TypeError(f"{cls!r} is no {_WORD[kind]}: a class of that kind with a `name` is expected")
    if not _NAME.fullmatch(cls.name):  # type: ignore[attr-defined]
        raise ValueError(
            f"{cls.__name__}.name is {cls.name!r}; use up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"  # type: ignore[attr-defined]
        )
    if kind == "methods":
        check_attributes(cls)
    return Plugin(cls.name, kind, origin, cls, source=source)  # type: ignore[attr-defined]


def _clash(new: Plugin, known: list[Plugin]) -> Plugin | None:
    for other in known:
        if other.name == new.name:
            name = f"{new.name} ({new.origin})"
            return Plugin(name, new.kind, new.origin, error=f"the name {new.name!r} is taken by {other.origin}")
    return None


def _broken(name: str, kind: str, origin: str, error: BaseException) -> Plugin:
    return Plugin(name, kind, origin, error=_reason(error), trace=scrub(traceback.format_exc()))


def _reason(error: BaseException) -> str:
    return scrub(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _where(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"(line {error.lineno}) "
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f"(line {lines[-1]}) " if lines else ""
