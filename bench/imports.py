"""What code a plugin is: its own file, and the modules that it imports and that no package manager installed.

A plugin's helpers compute its numbers as much as its file does. Modules of Python, of installed packages and of qatbench do not
count: they have versions. What a plugin reads otherwise (data, code that it executes by itself) is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


def execute(content: bytes, module: ModuleType, file: Path) -> str:
    """Execute a plugin's source in its module.

    Returns:
        The hash of the bytes that were executed, its own and its helpers': 16 hexadecimal digits.
    """
    before, noting = set(sys.modules), _Noting()
    sys.meta_path.insert(0, noting)
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    finally:
        sys.meta_path.remove(noting)
    own = hashlib.sha256(content).hexdigest()
    helpers = _helpers(content, sorted(set(sys.modules) - before - {module.__name__}))
    digests = {name: noting.digests.get(name) or _digest(origin) for name, origin in sorted(helpers.items())}
    if not digests:
        return own[:16]
    return hashlib.sha256(json.dumps([own, digests]).encode()).hexdigest()[:16]


class _Noting(MetaPathFinder):
    """Finds modules that are nobody's package, and notes the bytes that are executed: a stale ``.pyc`` would be others."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, if it counts."""
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader or not _counts(fullname, spec.origin):
            return None
        spec.loader = _Loader(fullname, spec.loader.path, self.digests)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, digests: dict[str, str]) -> None:
        super().__init__(name, path)
        self._digests = digests

    def get_code(self, fullname: str) -> Any:
        content = self.get_data(self.path)
        self._digests[fullname] = hashlib.sha256(content).hexdigest()
        return self.source_to_code(content, self.path)


def _helpers(content: bytes, new: list[str]) -> dict[str, str]:
    """Modules that count -> their files: those that the source names, wherever it does, those that these name, and `new` ones."""
    found: dict[str, str] = {}
    todo = [*_named(content, ""), *new]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = _spec(name)
        if spec is None or not _counts(name, spec.origin):
            continue
        assert spec.origin is not None
        found[name] = spec.origin
        if spec.origin.endswith(".py"):
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            try:
                todo += _named(Path(spec.origin).read_bytes(), package)
            except OSError:
                continue
    return found


def _named(content: bytes, package: str) -> Iterator[str]:
    """The modules that a source may import: every name of its import statements, in functions, too."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names] if base or node.level == 0 else []
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is, without importing it."""
    loaded = sys.modules.get(name)
    if loaded is not None and (spec := getattr(loaded, "__spec__", None)) is not None:
        return spec
    path: Any = None
    spec = None
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:n]), path)
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


def _counts(name: str, origin: str | None) -> bool:
    top = name.partition(".")[0]
    if origin is None or top in ("qatbench", "__main__", "__mp_main__") or top in sys.stdlib_module_names:
        return False
    path = os.path.realpath(origin)
    if not os.path.isabs(origin) or not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts):
        return False
    return not any(path.startswith(place + os.sep) for place in _installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.realpath(paths[kind]) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})


def _digest(origin: str) -> str:
    """The hash of a module's file, or of the archive that it is in."""
    path = Path(origin)
    while not path.is_file() and path != path.parent:
        path = path.parent
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
