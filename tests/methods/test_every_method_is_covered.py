from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
from qatbench.bench.chain import normal_name
from qatbench.bench.method import Method, Wrapper
from qatbench.bench.registry import ROOT, plugins
from qatbench.bench.testing import MethodContract
from qatbench.methods.kd import KD
from qatbench.methods.lsq import LSQ
from qatbench.methods.pact import PACT

HERE = Path(__file__).parent


def built_in() -> dict[str, type[Method]]:
    """Every method of this repository by name."""
    return {p.name: p.cls for p in plugins("methods") if p.cls is not None and p.origin.startswith(str(ROOT))}


def suites(path: Path) -> list[type[MethodContract]]:
    """The contract suites that pytest would find in a file."""
    spec = importlib.util.spec_from_file_location(f"suites_in_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        c
        for n, c in vars(module).items()
        if n.startswith("Test") and isinstance(c, type) and issubclass(c, MethodContract)
    ]
    return [cls for cls in found if cls is not MethodContract]


def uncovered(methods: Mapping[str, type[Method]], folder: Path) -> list[str]:
    """What is missing: each method needs a whole suite in ``test_NAME.py``, a wrapper one over ``lsq``."""
    missing = []
    for name, cls in methods.items():
        chain = f"{name}+lsq" if issubclass(cls, Wrapper) else name
        path = folder / f"test_{name.replace('-', '_')}.py"
        if not path.exists():
            missing.append(f"{path.name} is missing")
            continue
        mine = [suite for suite in suites(path) if normal_name(suite.method) == normal_name(chain)]
        if not mine:
            missing.append(f"{path.name} has no MethodContract of {chain}")
        inherited = {test for test in vars(MethodContract) if test.startswith("test_")}
        for suite in mine:
            missing += [f"{path.name} replaces the contract's {test}" for test in inherited & set(vars(suite))]
    return missing


def test_every_registered_method_is_under_the_contract() -> None:
    """A method would be in the tables that was never shown to resume, to count its codes or to keep its budget."""
    methods = built_in()
    assert {"lsq", "kd"} <= set(methods)
    assert uncovered(methods, HERE) == []


SUITE = "from qatbench.bench.testing import MethodContract\nclass TestIt(MethodContract):\n    method = '{}'\n"


@pytest.mark.parametrize(
    ("text", "methods", "answer"),
    [
        (SUITE.format("lsq"), {"lsq": LSQ}, []),
        (SUITE.format("lsq"), {"lsq": LSQ, "pact": PACT}, ["test_pact.py is missing"]),
        (SUITE.format("pact"), {"lsq": LSQ}, ["test_lsq.py has no MethodContract of lsq"]),
        (
            "from qatbench.bench.testing import MethodContract\n",
            {"lsq": LSQ},
            ["test_lsq.py has no MethodContract of lsq"],
        ),
        (SUITE.format("lsq").replace("TestIt", "It"), {"lsq": LSQ}, ["test_lsq.py has no MethodContract of lsq"]),
        (
            SUITE.format("lsq") + "    def test_codes(self): ...\n",
            {"lsq": LSQ},
            ["test_lsq.py replaces the contract's test_codes"],
        ),
        (SUITE.format("kd+lsq"), {"kd": KD}, []),
        (SUITE.format("kd+pact"), {"kd": KD}, ["test_kd.py has no MethodContract of kd+lsq"]),
    ],
)
def test_what_is_not_covered_is_found(
    text: str, methods: dict[str, type[Method]], answer: list[str], tmp_path: Path
) -> None:
    """The test above would pass whatever is missing."""
    (tmp_path / f"test_{next(iter(methods))}.py").write_text(text)
    assert uncovered(methods, tmp_path) == answer
