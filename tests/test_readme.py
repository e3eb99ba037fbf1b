"""What the README says works: every command, every file, the suite and the plugin that it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return text


def commands(program: str) -> list[list[str]]:
    """Every command line of a program: in indented blocks, after `$`, and in backticks."""
    lines = re.findall(rf"^(?:    |\$ )({program} .*)$", README, re.MULTILINE)
    lines += re.findall(rf"`({program} [^`]+)`", README)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def verb(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, as typer knows it, and its arguments."""
    import typer.main
    from qatbench.cli import app

    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands"):
        assert words[0] in found.commands, words
        found, words = found.commands[words[0]], words[1:]
    return found, words


def test_every_command_exists() -> None:
    """Without it, a reader copies a command that was renamed."""
    lines = commands("qatbench")
    assert len(lines) > 20
    for words in lines:
        command, rest = verb(words)
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert [word for word in rest if word.startswith("-") and word not in known] == [], words
        if not any(word.strip("[]").isupper() for word in rest) and rest[:1] != ["KIND"]:
            command.make_context(" ".join(words), list(rest))


def test_every_verb_is_told_of() -> None:
    """Without it, a command that exists stays unknown."""
    import typer.main
    from qatbench.cli import app

    program: Any = typer.main.get_command(app)
    assert set(program.commands) == {words[0] for words in commands("qatbench")}


def test_make_targets_exist() -> None:
    """Without it, the first command that a reader types fails."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[0] for words in commands("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert "quickstart" in targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_files_and_names_exist() -> None:
    """Without it, a link or a name in a table leads nowhere."""
    from qatbench.bench.registry import plugins
    from qatbench.bench.spec import RunSpec
    from qatbench.sweeps.suite import suite_names

    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert (ROOT / "constraints.txt").exists()
    for kind in ("methods", "datasets", "networks"):
        assert [p.name for p in plugins(kind) if p.error is None and f"`{p.name}" not in README] == []
    for data in plugins("datasets"):
        domains = getattr(data.cls, "domains", ())  # a folder of one's own has its own
        assert [d for d in domains if d != data.name.removesuffix("-lt") and f"`{d}`" not in README] == []
    marks = dict(re.findall(r"^\| `([\w-]+)(?:\+METHOD)?` \| (\w+) \|", README, re.MULTILINE))
    assert marks == {p.name: p.cls.fidelity for p in plugins("methods") if p.error is None}
    assert {"quickstart", "digits"} <= set(suite_names())
    assert {"epochs", "seed", "bits"} <= set(RunSpec.model_fields)


def test_suite_is_a_suite(tmp_path: Path) -> None:
    """Without it, a reader's first suite is refused."""
    from qatbench.bench.resolve import resolve
    from qatbench.sweeps.suite import load_suite

    file = tmp_path / "mine.yaml"
    file.write_text(block("yaml"))
    suite = load_suite(str(file))
    assert len(suite.cells()) == 36 + 6
    assert set(yaml.safe_load(block("yaml"))) <= set(type(suite).model_fields)
    found = {resolve(cell, data_root=None, cache=tmp_path).run_id for cell in suite.cells()}
    assert len(found) == 30 + 6  # fp32 is one run whatever the bits


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    code = block("python")
    name = re.match(r"# (\w+\.py)\n", code)[1]  # type: ignore[index]
    assert f"qatbench check {name}" in README
    (tmp_path / name).write_text(code)
    return tmp_path / name


def test_plugin_runs_alone_and_in_a_chain(tiny, plugin: Path) -> None:
    """Without it, the code that every new author copies does not run."""
    for method in (plugin.stem, f"kd+{plugin.stem}"):
        answer = tiny(method, "--plugin", plugin)
        assert answer.status == 0, answer.out + answer.err


@pytest.mark.slow
def test_plugin_passes_the_contract(plugin: Path) -> None:
    """Without it, the code that every new author copies breaks the contract that he is told of."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "qatbench", "check", plugin.name]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=plugin.parent)
    assert checked.returncode == 0, checked.stdout[-3000:]


def test_leaderboard_is_of_this_form() -> None:
    """Without it, the README shows a table that the program no longer prints."""
    from qatbench.sweeps.suite import load_suite

    table = README.split("<!-- leaderboard: qatbench report quickstart -->")[1].split("<!-- end of leaderboard -->")[0]
    rows = re.findall(r"^ (\w+) +(w\d+a\d+) +1/1 +\d+\.\d \(n=1\)", table, re.MULTILINE)
    suite = load_suite("quickstart")
    expected = {(m, b) for m in suite.method for b in suite.bits if m != "fp32"} | {("fp32", "w32a32")}
    assert sorted(rows) == sorted(expected)
