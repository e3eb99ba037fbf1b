from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from qatbench.bench import registry
from qatbench.bench.errors import UserError

METHODS = {"fp32", "ptq", "lsq", "dorefa", "pact", "kd"}
NETWORKS = {"resnet8", "resnet20", "resnet56", "resnet18"}
DATASETS = {
    "optdigits", "digits", "svhn", "syndigits-lt", "fashion_mnist", "cifar10", "cifar100", "cifar10-lt", "cifar100-lt", "office31",
    "pacs", "vlcs", "office-home", "terra-incognita", "domainnet", "imagenet", "imagefolder", "hf",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), [("methods", METHODS), ("networks", NETWORKS), ("datasets", DATASETS)])
def test_what_is_built_in_is_found_and_available(kind: str, names: set[str]) -> None:
    """A method that ships with the package could not be named in a suite."""
    found = {p.name: p for p in registry.plugins(kind)}
    assert names <= set(found)
    for name in names:
        assert found[name].cls is registry.find(kind, name)
        assert found[name].cls.name == name
        assert found[name].error is None


def test_a_helper_class_is_no_plugin() -> None:
    """Base classes and classes that a plugin imports would show up as methods of their own."""
    names = [p.name for p in registry.plugins("methods")]
    assert "" not in names
    assert len(names) == len(set(names))
    assert all(p.cls.__module__.endswith(Path(p.origin).stem) for p in registry.plugins("methods") if p.name in METHODS)


def test_a_name_ends_at_the_colon_of_a_data_set() -> None:
    """A folder of one's own could not be named, or a method's name could have anything after a colon."""
    assert registry.find("datasets", "imagefolder:pets").name == "imagefolder"
    with pytest.raises(UserError, match="unknown method 'lsq:x'"):
        registry.find("methods", "lsq:x")


@pytest.mark.parametrize(
    ("kind", "typo", "answer"),
    [
        ("methods", "lqs", "unknown method 'lqs'; did you mean 'lsq'?"),
        ("networks", "resnet9", "unknown network 'resnet9'; did you mean 'resnet"),
        ("datasets", "optdigit", "unknown data set 'optdigit'; did you mean 'optdigits'?"),
    ],
)
def test_unknown_name_gives_the_nearest(kind: str, typo: str, answer: str) -> None:
    """A misspelt name would end in a KeyError."""
    with pytest.raises(UserError) as caught:
        registry.find(kind, typo)
    assert answer in str(caught.value)


BAD = {
    "syntax": ("x = 1\n\ndef broken(:\n    pass\n", "(line 3) does not import: SyntaxError"),
    "exception": ("x = 1\nraise RuntimeError('first\\nsecond')\n", "(line 2) does not import: RuntimeError: first second"),
    "deep": ("def f():\n    return 1 / 0\n\nf()\n", "(line 2) does not import: ZeroDivisionError"),
    "missing module": ("import no_such_module_here\n", "(line 1) does not import: ModuleNotFoundError"),
    "exit": ("import sys\nsys.exit(3)\n", "(line 2) does not import: SystemExit"),
    "nothing": ("x = 1\n", "defines no method, data set or network"),
    "no name": ("from qatbench.bench.method import Method\nclass M(Method):\n    pass\n", "defines no method"),
    "known": (
        "from qatbench.bench.method import Method\nclass M(Method):\n    name = 'lsq'\n",
        "a method named 'lsq' exists already",
    ),
    "twice": (
        "from qatbench.bench.method import Method\nclass A(Method):\n    name = 'aa'\nclass B(Method):\n    name = 'aa'\n",
        "two classes are named 'aa'",
    ),
    "final": (
        "from qatbench.bench.method import Method\nclass A(Method):\n    name = 'aa'\n    def training_step(self, b, i): ...\n",
        "(line 2) does not import: TypeError: A overrides training_step",
    ),
    "empty": ("", "defines no method"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_plugin_file_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    """A user's slip in a plugin would be answered by a traceback through the harness; and half a plugin would stay registered."""
    source, answer = BAD[case]
    path = tmp_path / "plug.py"
    path.write_text(source)
    before = {kind: registry.plugins(kind) for kind in registry.KINDS}
    with pytest.raises(UserError) as caught:
        registry.load_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert answer in message
    assert "\n" not in message
    assert {kind: registry.plugins(kind) for kind in registry.KINDS} == before


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a directory"),
        (lambda p: p.write_bytes(b"\x00\xff\xfe" * 9), "does not import"),
    ],
)
def test_what_is_no_python_file_is_told_in_one_line(
    make: Callable[[Path], object], answer: str, tmp_path: Path
) -> None:
    """A wrong path after ``--plugin`` would end in a traceback."""
    path = tmp_path / "plug.py"
    make(path)
    with pytest.raises(UserError, match=answer) as caught:
        registry.load_file(path)
    assert "\n" not in str(caught.value)


def test_file_of_another_kind_is_told_in_one_line(tmp_path: Path) -> None:
    """``--plugin notes.txt`` would end in a traceback."""
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(UserError, match="not a Python file"):
        registry.load_file(path)


def test_plugin_file_is_found_and_loaded_once(plug: Callable[..., Path]) -> None:
    """A plugin named twice on a command line would clash with itself; its entry would not say where it comes from."""
    path = plug("class Mine(LSQ):\n    name = 'mine_own'\n")
    assert registry.load_file(path) == registry.load_file(str(path))
    entry = registry.plugin("methods", "mine_own")
    assert entry.origin == str(path)
    assert entry.source is not None
    assert entry.cls.__name__ == "Mine"


def test_one_file_may_hold_plugins_of_several_kinds(plug: Callable[..., Path]) -> None:
    """A method that needs its own network could not be handed on as one file."""
    plug("class Mine(LSQ):\n    name = 'mine_own'\nclass Net(nn.Module):\n    name = 'mine_net'\n")
    assert registry.find("methods", "mine_own").__name__ == "Mine"
    assert registry.find("networks", "mine_net").__name__ == "Net"


GOOD = """
from torch import nn
from qatbench.bench.data import DataSet
from qatbench.methods.lsq import LSQ

class Outside(LSQ):
    '''From a package.'''
    name = "outside"

class OutsideData(DataSet):
    name = "outside_data"

class OutsideNet(nn.Module):
    name = "outside_net"

class NotMine(LSQ):
    name = "pact"
"""
ENTRIES = """
[qatbench.methods]
outside = good_package:Outside
pact = good_package:NotMine
wrong_kind = good_package:OutsideNet
lost = good_package:NoSuchClass
broken = broken_package
quitter = quitting_package

[qatbench.datasets]
all = good_package

[qatbench.networks]
outside_net = good_package:OutsideNet
"""
LIST = """
import contextlib, io, json, sys
from qatbench.cli import app
out = {}
for kind in ("methods", "datasets", "networks"):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        app(["list", kind, "--json"], standalone_mode=False)
    out[kind] = json.loads(text.getvalue())
text = io.StringIO()
with contextlib.redirect_stdout(text):
    app(["list", "methods"], standalone_mode=False)
out["table"] = text.getvalue()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What ``qatbench list`` prints where a package with entry points is installed, good ones and broken ones."""
    site = tmp_path_factory.mktemp("site")
    (site / "good_package.py").write_text(GOOD)
    (site / "broken_package.py").write_text("raise ImportError('libfoo.so is missing')\n")
    (site / "quitting_package.py").write_text("raise SystemExit(0)\n")
    info = site / "outside_things-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-things\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    env = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, env=env, cwd=site, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    kinds = {kind: {row["name"]: row for row in out[kind]} for kind in registry.KINDS}
    return {**kinds, "table": out["table"]}


@pytest.mark.parametrize(
    ("kind", "name"), [("methods", "outside"), ("datasets", "outside_data"), ("networks", "outside_net")]
)
def test_entry_points_are_found(kind: str, name: str, listed: dict) -> None:
    """An installed package's method, data set or network could not be used."""
    assert listed[kind][name]["error"] is None
    assert listed[kind][name]["origin"] == "outside-things"


def test_a_module_entry_point_gives_only_its_own_kind(listed: dict) -> None:
    """A package that names its module under ``qatbench.datasets`` would put its methods among the data sets."""
    assert set(listed["datasets"]) == DATASETS | {"outside_data"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "ImportError: libfoo.so is missing"),
        ("lost", "AttributeError"),
        ("wrong_kind", "is no method"),
        ("quitter", "SystemExit"),
    ],
)
def test_a_failed_import_is_listed_as_unavailable_with_its_reason(name: str, reason: str, listed: dict) -> None:
    """One broken package would make every verb end in its traceback; or its method would be missing without a word."""
    assert reason in listed["methods"][name]["error"]
    line = next(line for line in listed["table"].splitlines() if line.startswith(name))
    assert "unavailable" in line
    assert {n for n, row in listed["methods"].items() if row["error"] is None} >= METHODS


def test_an_installed_package_cannot_take_a_built_in_name(listed: dict) -> None:
    """Installing a package would silently change what ``pact`` is, and the numbers in the table with it."""
    assert listed["methods"]["pact"]["error"] is None
    assert listed["methods"]["pact"]["origin"].endswith("pact.py")
    clash = listed["methods"]["pact (outside-things)"]
    assert "the name 'pact' is taken" in clash["error"]


# What a plugin's version covers


def test_what_is_executed_is_what_is_hashed(tmp_path: Path, plug: Callable[..., Path]) -> None:
    """A plugin that is saved anew while it is imported would be recorded by the hash of what did not run."""
    path = plug("""
        import os
        with open(__file__, "a") as file:
            file.write("# changed")
        class Mine(LSQ):
            name = "rewrites_itself"
    """)
    content = path.read_bytes()
    executed = content.removesuffix(b"# changed")
    assert executed != content
    assert registry.plugin("methods", "rewrites_itself").source == hashlib.sha256(executed).hexdigest()[:16]


@pytest.mark.parametrize(
    "name",
    ["../z", "a/b", "a\\b", "<b>x</b>", "a\nb", "a\n", "=1+1", "@SUM", "-x", "a+b", "a b", "a:b", ".", "..", "\x1b[31m", "a" * 65,
     "\u202egnp", "a,b", 'a"b', "_a"],
)  # fmt: skip
@pytest.mark.parametrize("base", ["Method", "nn.Module"])
def test_a_name_that_is_no_plain_word_is_refused(name: str, base: str, plug: Callable[..., Path]) -> None:
    """A name goes into paths, terminals, pages, tables and chains, where such characters mean something."""
    with pytest.raises(UserError, match="use up to 64 letters") as caught:
        plug(f"class Odd({base}):\n    name = {name!r}\n")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a", "2bit", "my-dog", "lsq_v1.5", "méthode", "a" * 64])
def test_plain_names_are_taken(name: str, plug: Callable[..., Path]) -> None:
    """A method that has worked so far could not be loaded."""
    plug(f"class Fine(LSQ):\n    name = {name!r}\n")
    assert registry.find("methods", name).name == name
