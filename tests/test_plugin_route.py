"""The way of a new method: `new`, edit, `check`, `run`, and its row in the leaderboard."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


def python(*line: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, line)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=cwd)


def test_new_writes_two_files_and_says_what_next(cli, tmp_path) -> None:
    """Without it, an author does not know how to go on, or gets a file that Python cannot read."""
    answer = cli("new", "method", "my_method", "--dir", tmp_path / "a folder")
    assert answer.status == 0, answer.err
    method, test = tmp_path / "a folder" / "my_method.py", tmp_path / "a folder" / "test_my_method.py"
    for path in (method, test):
        ast.parse(path.read_text())
        assert str(path) in answer.out
    assert "class MyMethod(Method)" in method.read_text()
    assert len(method.read_text().splitlines()) < 70
    assert f"qatbench check '{method}'" in answer.out
    assert f"qatbench run --plugin '{method}' --method my_method" in answer.out


@pytest.mark.parametrize("name", ["my-method", "2bit", "My", "class", "", "a b", "../x", "lsq+kd", "é"])
def test_names_that_cannot_be_are_refused(cli, tmp_path, name) -> None:
    """Without it, a file is written that cannot be imported, or outside of the folder."""
    answer = cli("new", "method", name, "--dir", tmp_path / "new")
    assert (answer.status, len(answer.err.splitlines())) == (2, 1)
    assert repr(name) in answer.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("taken", ["mine.py", "test_mine.py"])
def test_existing_files_are_kept(cli, tmp_path, taken) -> None:
    """Without it, an author's work is written over."""
    (tmp_path / taken).write_text("work of a week")
    answer = cli("new", "method", "mine", "--dir", tmp_path)
    assert (answer.status, len(answer.err.splitlines())) == (2, 1)
    assert f"{taken} exists already" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "work of a week"


def test_taken_name_is_refused(cli, tmp_path) -> None:
    """Without it, the new file cannot be loaded next to the method of that name."""
    assert "'lsq' exists already" in cli("new", "method", "lsq", "--dir", tmp_path).err
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_named(cli, tmp_path) -> None:
    """Without it, a wrong --dir ends in a traceback."""
    (tmp_path / "file").touch()
    answer = cli("new", "method", "mine", "--dir", tmp_path / "file" / "folder")
    assert (answer.status, len(answer.err.splitlines())) == (2, 1)
    assert str(tmp_path / "file") in answer.err
    assert "store" not in answer.err


def test_new_method_runs_and_is_in_the_leaderboard(cli, tiny, tmp_path) -> None:
    """Without it, a new method cannot be compared with the others."""
    assert cli("new", "method", "mine", "--dir", tmp_path).status == 0
    plugin = tmp_path / "mine.py"
    assert tiny("fp32").status == 0
    for chain in ("mine", "kd+mine"):
        ran = tiny(chain, "--plugin", plugin, "--set", "mine.width=2.5")
        assert ran.status == 0, ran.out + ran.err
    report = cli("report", "--store", tmp_path / "runs")  # without the plugin: the store alone is enough
    assert report.status == 0
    for name in ("fp32", "mine", r"kd\+mine"):
        assert re.search(rf"^ *{name}( †)? +w", report.out, re.MULTILINE), report.out
    assert "unknown key" in tiny("mine", "--plugin", plugin, "--set", "mine.widht=2").err


def test_edited_plugin_is_another_run(cli, tiny, tmp_path) -> None:
    """Without it, an author changes the code and is shown the old number."""
    from qatbench.bench import registry

    assert cli("new", "method", "mine", "--dir", tmp_path).status == 0
    plugin = tmp_path / "mine.py"
    assert tiny("mine", "--plugin", plugin).status == 0
    registry._files.pop(plugin)  # as in a new process
    plugin.write_text(plugin.read_text().replace("3.0, gt=0", "2.0, gt=0"))
    answer = tiny("mine", "--plugin", plugin)
    assert "done already" not in answer.out
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2


@pytest.mark.slow
def test_check_passes_and_so_does_the_generated_test(tmp_path) -> None:
    """Without it, the file that an author starts from is broken before it is touched."""
    new = python("-m", "qatbench", "new", "method", "mine", cwd=tmp_path)
    assert new.returncode == 0, new.stderr
    checked = python("-m", "qatbench", "check", "mine.py", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout[-3000:]
    assert re.search(r"\d{2} passed", checked.stdout)
    tested = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not two_ranks", "test_mine.py", cwd=tmp_path)
    assert tested.returncode == 0, tested.stdout[-3000:]
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"mine.py", "test_mine.py"}


@pytest.mark.slow
def test_check_fails_for_a_broken_method(tmp_path) -> None:
    """Without it, `check` passes whatever it is given."""
    assert python("-m", "qatbench", "new", "method", "mine", cwd=tmp_path).returncode == 0
    plugin = tmp_path / "mine.py"
    kept = plugin.read_text()
    plugin.write_text(
        kept.replace("        return round_ste((x / self.step)", "        return x + 0 * round_ste((x / self.step)")
    )
    assert plugin.read_text() != kept
    checked = python("-m", "qatbench", "check", "mine.py", cwd=tmp_path)
    assert checked.returncode == 1, checked.stdout[-2000:]
    assert re.search(r"FAILED .*test_codes", checked.stdout)
    assert "Traceback" not in checked.stderr
