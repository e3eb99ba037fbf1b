"""The command line, called in this process: importing torch anew for every command would take minutes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from qatbench.bench import registry
from support import TINY


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """``cli("run", "--method", "lsq")`` as if typed; afterwards its plugins are forgotten."""
    from qatbench.__main__ import main

    for name in [name for name in os.environ if name.startswith(("QATBENCH_", "WANDB_"))]:
        monkeypatch.delenv(name)
    before = dict(registry._files)

    def call(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qatbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, said.out, said.err)

    yield call
    registry._files.clear()
    registry._files.update(before)


@pytest.fixture
def tiny(cli: Callable[..., Answer], tmp_path: Path) -> Callable[..., Answer]:
    """``tiny("lsq")``: a run that takes a second, without W&B, in ``tmp_path/runs``."""

    def run(method: str, *arguments: str | Path) -> Answer:
        return cli("run", "--method", method, *TINY, "--no-wandb", "--store", tmp_path / "runs", *arguments)

    return run
