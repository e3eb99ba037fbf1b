"""What code a plugin is: every module that it imports and that nobody installed is part of its version."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from qatbench.bench.imports import execute
from qatbench.bench.registry import load_file, plugin

Version = Callable[[Path], str]


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Version]:
    """The version of a file, as a fresh process has it where the file's folder is on PYTHONPATH."""
    before = dict(sys.modules)

    def forget() -> None:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]
        importlib.invalidate_caches()

    def find(file: Path) -> str:
        forget()
        with monkeypatch.context() as patch:
            patch.syspath_prepend(file.parent)
            module = ModuleType("plug")
            module.__file__ = str(file)
            return execute(file.read_bytes(), module, file)

    yield find
    forget()


HELPERS = {
    "beside the plugin": "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\nimport helper_a",
    "by a name in a string": "from importlib import import_module\nhelp = import_module('helper_' + 'a')",
    "later, in a hook": "def hook():\n    from helper_a import FACTOR",
    "later, by a string": "import importlib\ndef hook():\n    return importlib.import_module('helper_a')",
    "out of a package": "from helper_p import part",
    "out of a package, later": "def hook():\n    import helper_p.part as p",
}


@pytest.mark.parametrize("how", HELPERS)
def test_helpers_are_part_of_a_version(how: str, tmp_path: Path, version: Version) -> None:
    """A run would be "done already" with the old number after a helper, or a helper's helper, was changed."""
    plugin, package = tmp_path / "plug.py", tmp_path / "helper_p"
    plugin.write_text(f"import numpy, qatbench\n{HELPERS[how]}\n")
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("from . import deep\nimport helper_a\n")
    (package / "deep.py").write_text("FACTOR = 1")
    (tmp_path / "helper_a.py").write_text("import json, helper_b\nFACTOR = 1\n")
    (tmp_path / "helper_b.py").write_text("FACTOR = 1")
    (tmp_path / "unused.py").write_text("")
    changing = [tmp_path / "helper_a.py", tmp_path / "helper_b.py"]
    changing += [package / "deep.py"] if "package" in how else []
    seen = [version(plugin)]
    for path in changing:
        before = path.stat()
        path.write_text(path.read_text().replace("1", "0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a stale .pyc would have it
        seen.append(version(plugin))
    assert len(set(seen)) == len(seen)
    (tmp_path / "unused.py").write_text("changed")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in [p for p in tmp_path.iterdir() if p != moved]:
        path.rename(moved / path.name)
    assert version(moved / "plug.py") == seen[-1], "where it lies is no part of it"


def test_a_helper_that_is_imported_already_counts(tmp_path: Path, version: Version) -> None:
    """The second of two plugins that share a helper would have another version than alone."""
    (tmp_path / "helper_c.py").write_text("FACTOR = 1")
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("import helper_c")
    alone = version(tmp_path / "two.py")
    version(tmp_path / "one.py")
    assert "helper_c" in sys.modules
    assert execute((tmp_path / "two.py").read_bytes(), ModuleType("two"), tmp_path / "two.py") == alone


def test_a_file_alone_is_its_own_hash(tmp_path: Path, version: Version) -> None:
    """Every run made with a plugin of one file would be made again."""
    file = tmp_path / "plug.py"
    lines = (
        "import torch, json, numpy.linalg",
        "from qatbench.bench import registry",
        "def f():",
        "    import nowhere",
    )
    file.write_text("\n".join(lines))
    assert version(file) == hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def test_the_helper_that_runs_is_the_one_that_is_hashed(
    tmp_path: Path, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would take a compiled file of the same time and length, and the record would name what did not run."""
    helper, file = tmp_path / "helper_d.py", tmp_path / "plug.py"
    helper.write_text("FACTOR = 1")
    file.write_text("import helper_d\nwith open('said', 'a') as said:\n    said.write(str(helper_d.FACTOR))\n")
    before = helper.stat()
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    sys.path.insert(0, str(tmp_path))
    try:
        import helper_d  # type: ignore[import-not-found]  # writes the compiled file

        assert helper_d.FACTOR == 1
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["helper_d"]
    helper.write_text("FACTOR = 0")
    os.utime(helper, ns=(before.st_atime_ns, before.st_mtime_ns))
    version(file)
    assert (tmp_path / "said").read_text() == "0"


def test_the_registry_has_it(tmp_path: Path, plug: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's name would hold the hash of the plugin's file alone."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_e.py").write_text("FACTOR = 1")
    path = plug("import helper_e\nclass Mine(LSQ):\n    name = 'mine_with_helper'\n")
    found = plugin("methods", "mine_with_helper").source
    assert found is not None
    assert found != hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert load_file(path)[0].source == found
