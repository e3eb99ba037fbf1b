"""``qatbench new`` and ``qatbench check``: a plugin to start from, and the suite that it must pass."""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from pathlib import Path
from string import Template

from ..errors import UserError

_HERE = Path(__file__).parent


def write_method(name: str, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.py`` and ``test_NAME.py`` into a folder; never over a file that is there.

    Raises:
        UserError: The name cannot be a method's, is taken, or a file of that name exists.
    """
    from ..registry import plugins

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"method name {name!r}: use lower-case letters, digits and _, starting with a letter, e.g. my_method"
        )
    taken = {p.name: p.origin for p in plugins("methods")}
    if name in taken:
        raise UserError(f"a method named {name!r} exists already ({taken[name]}); choose another name")
    method, test = folder / f"{name}.py", folder / f"test_{name}.py"
    for path in (method, test):
        if path.exists():
            raise UserError(f"{path} exists already; choose another name or move it")
    words = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_")), "file": method.name}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, template in ((method, "method.py.tmpl"), (test, "test_method.py.tmpl")):
            path.write_text(Template((_HERE / template).read_text()).substitute(words))
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder with --dir") from None
    return method, test


def check_file(file: Path) -> int:
    """Run `MethodContract` on every method of a plugin file; pytest's exit status, 0 if all is well.

    Raises:
        UserError: The file does not import or defines no method, or pytest is not installed.
    """
    from ..method import Wrapper
    from ..registry import load_file

    if importlib.util.find_spec("pytest") is None:
        raise UserError("qatbench check needs pytest; pip install 'qatbench[dev]'")
    methods = [p for p in load_file(file) if p.kind == "methods"]
    if not methods:
        raise UserError(
            f"plugin {file} defines no method; a method is a class with a `name` that extends qatbench.Method"
        )
    import pytest

    lines = ["from qatbench.bench.testing import MethodContract", ""]
    for plugin in methods:
        wraps = issubclass(plugin.cls, Wrapper) and plugin.cls.default_inner is None
        chain = f"{plugin.name}+lsq" if wraps else plugin.name
        lines += [
            f"class Test{plugin.cls.__name__}(MethodContract):",
            f"    method, plugin = {chain!r}, {str(file.resolve())!r}",
            "",
        ]
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder) / f"test_{file.stem}_contract.py"
        test.write_text("\n".join(lines))
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
