"""``qatbench new`` and ``qatbench check``: a plugin to start from, and the suite that it must pass."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import tempfile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..disk import create_file
from ..errors import UserError
from ..paths import usable

if TYPE_CHECKING:
    from ..registry import Plugin

_HERE = Path(__file__).parent


def write_method(name: str, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.py`` and ``test_NAME.py`` into a folder; never over a file that is there.

    Raises:
        UserError: The name cannot be a method's, is taken, or a file of that name exists.
    """
    from ..registry import plugins

    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or keyword.iskeyword(name):
        raise UserError(
            f"method name {name[:100]!r}: use up to 64 lower-case letters, digits and _, starting with a letter, e.g. my_method"
        )
    taken = {p.name: p.origin for p in plugins("methods")}
    if name in taken:
        raise UserError(f"a method named {name!r} exists already ({taken[name]}); choose another name")
    folder = usable(folder, "folder")
    method, test = folder / f"{name}.py", folder / f"test_{name}.py"
    for path in (method, test):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; choose another name or move it")
    words = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_")), "file": method.name}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, template in ((method, "method.py.tmpl"), (test, "test_method.py.tmpl")):
            text = (_HERE / template).read_text(encoding="utf-8")
            create_file(path, Template(text).substitute(words).encode())
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder with --dir") from None
    return method, test


def check_file(file: Path) -> int:
    """Run `MethodContract` on every method and `DatasetContract` on every data set of a plugin file; pytest's exit status.

    A data set is checked on its own data: what it makes, or what it finds in ``QATBENCH_DATA``. Its author's own subclass
    of the contract, which writes tiny files, shows more.

    Raises:
        UserError: The file does not import, defines neither, or pytest is not installed.
    """
    from ..registry import load_file

    if importlib.util.find_spec("pytest") is None:
        raise UserError("qatbench check needs pytest; pip install 'qatbench[dev]'")
    found = [p for p in load_file(file) if p.kind in ("methods", "datasets")]
    if not found:
        raise UserError(
            f"plugin {file} defines no method and no data set; one is a class with a `name` that extends qatbench.Method "
            "or qatbench.DataSet"
        )
    import pytest

    lines = ["from qatbench.bench.testing import DatasetContract, MethodContract", ""]
    for plugin in found:
        lines += [*_suite_of(plugin), f"    plugin = {str(file.resolve())!r}", ""]
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder) / f"test_{file.stem}_contract.py"
        test.write_text("\n".join(lines), encoding="utf-8")
        (Path(folder) / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes more than ten seconds\n")
        options = [
            "-q",
            "-rfEs",
            "--disable-warnings",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            folder,
        ]
        return int(pytest.main([*options, str(test)]))


def _suite_of(plugin: Plugin) -> list[str]:
    """The first lines of a plugin's contract test."""
    from ..method import Wrapper

    cls = plugin.cls
    if plugin.kind == "methods":
        wraps = issubclass(cls, Wrapper) and cls.default_inner is None
        chain = f"{plugin.name}+lsq" if wraps else plugin.name
        return [f"class Test{cls.__name__}(MethodContract):", f"    method = {chain!r}"]
    if cls.takes:
        whole = f"{plugin.name}:{cls.takes}"
        raise UserError(f"data set {whole!r} is checked by a DatasetContract that writes files: dataset = {whole!r}")
    return [f"class Test{cls.__name__}(DatasetContract):", f"    dataset = {plugin.name!r}"]
