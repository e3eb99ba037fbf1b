"""The set-up: the traps of a repository root that is the package, the wheel, the versions, and make."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import qatbench
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def package_files() -> set[str]:
    """The source files of the package: what git knows, or would take, in the root and in the package's folders."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rooms = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    inside = {path for path in listed if path.split("/")[0] in rooms or re.fullmatch(r"\w+\.py", path)}
    return {path for path in inside if (ROOT / path).is_file()}


# The root is the package


def test_import_datasets_is_hugging_face() -> None:
    """Without it, `import datasets` in the repository root could be our own folder, and hub data sets break."""
    found = python("import datasets; print(datasets.__file__); datasets.Dataset", cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).parent.name == "datasets"
    assert ROOT / "datasets" not in Path(found.stdout.strip()).parents
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_root_under_another_name_is_refused() -> None:
    """Without it, the package is imported twice under two names, and there are two registries."""
    load = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('main', {str(ROOT / '__init__.py')!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )
    refused = python(load)
    assert refused.returncode == 1
    assert "ImportError: this folder is the package 'qatbench', not 'main'" in refused.stderr


def test_import_qatbench_imports_no_torch() -> None:
    """Without it, every command waits seconds for torch, `--help` too."""
    found = python("import sys, qatbench; qatbench.__all__; print('torch' in sys.modules, 'lightning' in sys.modules)")
    assert found.stdout.split() == ["False", "False"], found.stderr


def test_public_names_exist() -> None:
    """Without it, a name that the package promises fails when it is first used."""
    assert set(qatbench.__all__) < set(dir(qatbench))
    for name in qatbench.__all__:
        assert getattr(qatbench, name) is not None


def test_pytest_does_not_import_the_root() -> None:
    """Without these keys pytest imports the root under the checkout's name."""
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert {"--import-mode=importlib", "--confcutdir=tests"} <= set(options["addopts"])
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert ROOT.name == "qatbench" or ROOT.name not in sys.modules


def test_test_files_have_names_of_their_own() -> None:
    """Without it, two test files of one name hide each other in reports."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


# The wheel


def test_every_folder_with_code_is_a_listed_package() -> None:
    """Without it, a new folder works in the checkout and is missing from the wheel."""
    folders = {str(Path(path).parent) for path in package_files() if path.endswith(".py")}
    packages = {"qatbench" if folder == "." else f"qatbench.{folder.replace('/', '.')}" for folder in folders}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert packages <= listed
    assert all((ROOT / name.partition(".")[2].replace(".", "/")).is_dir() for name in listed)


def test_wheel_has_the_tracked_files(tmp_path: Path) -> None:
    """Without it, a suite, a template or a module works in the checkout and is missing from the wheel."""
    expected = package_files()
    source = tmp_path / "source"  # a copy, so that no build/ is left in the checkout
    for path in {*expected, "pyproject.toml", "README.md", "LICENSE"}:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.removeprefix("qatbench/") for name in names if name.startswith("qatbench/")}
    assert packed == expected
    outside = {name.split("/")[0] for name in names if not name.startswith("qatbench/")}
    assert outside == {f"qatbench-{PROJECT['project']['version']}.dist-info"}


# Versions


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in pinned)
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in pinned)}


def test_every_requirement_has_a_tested_version() -> None:
    """Without it, a fresh clone installs a version that no test has seen."""
    required = names(PROJECT["project"]["dependencies"]) | names(PROJECT["project"]["optional-dependencies"]["dev"])
    assert required - set(constraints()) == {"torch"}


def test_torch_is_not_pinned() -> None:
    """Without it, some machines get a torch build with which no torchvision imports."""
    assert not [name for name in constraints() if re.fullmatch(r"torch|triton|nvidia-.*|cuda-.*", name)]
    requirement = next(text for text in PROJECT["project"]["dependencies"] if text.startswith("torch>"))
    assert "==" not in requirement


def test_tested_versions_meet_the_bounds() -> None:
    """Without it, constraints.txt and pyproject.toml contradict each other and nothing can be installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tested = {canonicalize_name(name): version for name, version in constraints().items()}
    for text in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert tested[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_torch_here_is_supported() -> None:
    """Without it, the tests pass on a torch older than the one that users are promised."""
    from packaging.requirements import Requirement

    requirement = next(Requirement(text) for text in PROJECT["project"]["dependencies"] if text.startswith("torch>"))
    assert requirement.specifier.contains(metadata.version("torch"), prereleases=True)


def test_one_version_number() -> None:
    """Without it, a result or a citation names a version that was not the one used."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["project"]["version"] == qatbench.__version__ == str(citation["version"])


def test_citation() -> None:
    """Without it, tools that read CITATION.cff show nothing."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == PROJECT["project"]["authors"]
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    assert citation["title"]
    assert citation["message"]


def test_licence_is_the_unmodified_text() -> None:
    """Without it, the licence is not the one that its name says."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


# make

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that make takes for a fresh clone."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # What the `make test` around this test was called with is not meant for the make inside it.
    outer = {"ARGS", "PYTHON", "MFLAGS"}
    environment = {key: text for key, text in os.environ.items() if not key.startswith("MAKE") and key not in outer}
    command = ["make", "-C", str(folder), "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def pretend_installed(folder: Path) -> Path:
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (binaries / ".installed").touch()
    return binaries


@needs_make
def test_help_names_every_target(checkout: Path) -> None:
    """Without it, a target exists that nobody finds; or bare `make` starts to do things."""
    text = (checkout / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert targets
    shown = make(checkout).stdout
    assert shown == make(checkout, "help").stdout
    assert {line.split()[1] for line in shown.splitlines()} == set(targets[1].split())
    assert {"venv", "quickstart", "test", "test-fast", "lint", "perf", "wheel", "clean"} <= set(targets[1].split())
    assert not (checkout / ".venv").exists()


@needs_make
@pytest.mark.parametrize(("printed", "said"), [("3.9", "python-old is 3.9"), ("", "python-old is not there")])
def test_old_python_is_one_clear_line(checkout: Path, printed: str, said: str) -> None:
    """Without it, a user with an old Python, or none, reads a page of pip's errors."""
    old = checkout / "python-old"
    old.write_text(f"#!/bin/sh\necho {printed}\n")
    old.chmod(0o755)
    refused = make(checkout, "quickstart", f"PYTHON={old}")
    assert refused.returncode == 2
    (line,) = (refused.stdout + refused.stderr).splitlines()
    assert f"qatbench needs Python 3.11, 3.12 or 3.13, but {checkout}/{said}" in line
    assert "make quickstart PYTHON=python3.12" in line
    assert not (checkout / ".venv").exists()


@needs_make
def test_second_call_installs_nothing(checkout: Path) -> None:
    """Without it, every `make test` waits for pip; or changed requirements are never installed."""
    installed = pretend_installed(checkout) / ".installed"
    assert make(checkout, "-q", "venv").returncode == 0
    later = time.time() + 60
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(checkout / name, (later, later))
        assert "-c constraints.txt -e '.[dev]'" in make(checkout, "-n", "venv").stdout, name
        os.utime(installed, (later + 1, later + 1))
        assert make(checkout, "-q", "venv").returncode == 0
        later += 60


@needs_make
def test_what_targets_run(checkout: Path) -> None:
    """Without it, `make test` leaves tests out, or a stale build/ puts deleted files into the wheel."""
    pretend_installed(checkout)
    said = make(checkout, "-n", "test", "ARGS=-k lsq").stdout
    assert said.startswith(".venv/bin/python -m pytest -n auto")
    assert said.endswith(" -k lsq\n")
    assert make(checkout, "-n", "quickstart").stdout == ".venv/bin/qatbench quickstart \n"
    wheel = make(checkout, "-n", "wheel").stdout.splitlines()
    assert wheel.index("rm -rf build") < wheel.index(".venv/bin/python -m build --wheel")
    lint = make(checkout, "-n", "lint").stdout
    assert [part in lint for part in ("ruff check", "ruff format --check", "pyright")] == [True] * 3


@needs_make
def test_clean_keeps_results_and_environment(checkout: Path) -> None:
    """Without it, `make clean` deletes days of results."""
    binaries = pretend_installed(checkout)
    for name in ("runs/abc", "build/lib", "methods/__pycache__", ".venv/lib/__pycache__"):
        (checkout / name).mkdir(parents=True)
    assert make(checkout, "clean").returncode == 0
    left = [name for name in ("runs/abc", "build", "methods/__pycache__", ".venv/lib/__pycache__")
            if (checkout / name).exists()]  # fmt: skip
    assert left == ["runs/abc", ".venv/lib/__pycache__"]
    assert binaries.exists()


@needs_make
def test_constraints_are_what_the_target_writes(checkout: Path) -> None:
    """Without it, the command in the head of constraints.txt is not the one that made it."""
    header = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("#")]
    (command,) = [line for line in header if "pip freeze" in line]
    pretend_installed(checkout)
    written = make(checkout, "-n", "constraints").stdout
    assert command.removeprefix("#").strip() in written


def test_ci_calls_everything() -> None:
    """Without it, a change goes in that only part of the checks has seen."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.splitlines()[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in text
    assert re.findall(r"make (\w+)$", text, re.MULTILINE) == ["venv", "test", "lint", "quickstart"]
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
