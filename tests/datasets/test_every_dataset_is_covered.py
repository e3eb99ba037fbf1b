from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
from qatbench.bench.dataset import DataSet
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.digits import Digits
from qatbench.datasets.optdigits import OptDigits

HERE = Path(__file__).parent


def built_in() -> dict[str, type[DataSet]]:
    """Every data set of this repository by name."""
    return {p.name: p.cls for p in plugins("datasets") if p.cls is not None and p.origin.startswith(str(ROOT))}


def suites(path: Path) -> list[type[DatasetContract]]:
    """The contract suites that pytest would find in a file."""
    spec = importlib.util.spec_from_file_location(f"suites_in_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [c for n, c in vars(module).items() if n.startswith("Test") and isinstance(c, type)]
    return [c for c in found if issubclass(c, DatasetContract) and c is not DatasetContract]


def uncovered(datasets: Mapping[str, type[DataSet]], folder: Path) -> list[str]:
    """What is missing: each data set of ``datasets/FILE.py`` needs a whole suite in ``test_FILE.py``."""
    missing = []
    for name, cls in datasets.items():
        path = folder / f"test_{cls.__module__.rpartition('.')[2]}.py"
        if not path.exists():
            missing.append(f"{path.name} is missing: {name} has no contract test")
            continue
        mine = [suite for suite in suites(path) if suite.dataset.partition(":")[0] == name]
        if not mine:
            missing.append(f"{path.name} has no DatasetContract of {name}")
        inherited = {test for test in vars(DatasetContract) if test.startswith("test_")}
        for suite in mine:
            missing += [f"{path.name} replaces the contract's {test}" for test in sorted(inherited & set(vars(suite)))]
            missing += [f"{path.name}: {suite.__name__} lacks {part}" for part in lacking(suite, cls)]
    return missing


def lacking(suite: type[DatasetContract], cls: type[DataSet]) -> list[str]:
    """What a suite must have of its own; a data set that overrides no `sources` reads no files."""
    reads = cls.sources is not DataSet.sources
    files = [part for part in ("write", "spoil") if reads and getattr(suite, part) is getattr(DatasetContract, part)]
    return files if suite.classes_of else [*files, "classes_of"]


def test_every_registered_data_set_is_under_the_contract() -> None:
    """A data set would be in the tables whose images, splits or errors nobody has looked at."""
    datasets = built_in()
    assert {"optdigits", "digits"} <= set(datasets)
    assert uncovered(datasets, HERE) == []


IMPORT = "from qatbench.bench.testing import DatasetContract\n"
SUITE = IMPORT + "class TestIt(DatasetContract):\n    dataset = '{}'\n    classes_of = {{'a': [1]}}\n"
FILES = "    def write(self, root): ...\n    def spoil(self, root): ...\n"


@pytest.mark.parametrize(
    ("file", "text", "answer"),
    [
        ("test_optdigits.py", SUITE.format("optdigits"), []),
        ("test_other.py", SUITE.format("optdigits"), ["test_optdigits.py is missing: optdigits has no contract test"]),
        ("test_optdigits.py", SUITE.format("digits"), ["test_optdigits.py has no DatasetContract of optdigits"]),
        ("test_optdigits.py", IMPORT, ["test_optdigits.py has no DatasetContract of optdigits"]),
        (
            "test_optdigits.py",
            SUITE.format("optdigits").replace("TestIt", "It"),
            ["test_optdigits.py has no DatasetContract of optdigits"],
        ),
        (
            "test_optdigits.py",
            SUITE.format("optdigits") + "    def test_labels(self): ...\n",
            ["test_optdigits.py replaces the contract's test_labels"],
        ),
        (
            "test_optdigits.py",
            SUITE.format("optdigits").replace("{'a': [1]}", "{}"),
            ["test_optdigits.py: TestIt lacks classes_of"],
        ),
        ("test_digits.py", SUITE.format("digits") + FILES, []),
        ("test_digits.py", SUITE.format("digits:x") + FILES, []),
        (
            "test_digits.py",
            SUITE.format("digits"),
            ["test_digits.py: TestIt lacks write", "test_digits.py: TestIt lacks spoil"],
        ),
    ],
)
def test_what_is_not_covered_is_found(file: str, text: str, answer: list[str], tmp_path: Path) -> None:
    """The test above would pass whatever is missing."""
    (tmp_path / file).write_text(text)
    cls = Digits if file == "test_digits.py" else OptDigits
    assert uncovered({cls.name: cls}, tmp_path) == answer
