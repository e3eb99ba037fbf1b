from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from qatbench.bench import registry

PLUGIN_IMPORTS = """
import torch
from torch import nn
from qatbench.bench.method import Method, Stage, Wrapper
from qatbench.bench.quant import Bits
from qatbench.bench.spec import Frozen
from qatbench.methods.lsq import LSQ
"""


@pytest.fixture
def plug(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a plugin file and registers it, for the length of one test: ``plug("class Mine(LSQ): ...")``."""
    before = dict(registry._files)

    def load(source: str, stem: str = "mine") -> Path:
        path = tmp_path / f"{stem}.py"
        path.write_text(PLUGIN_IMPORTS + dedent(source))
        registry._files.pop(path, None)
        registry.load_file(path)
        return path

    yield load
    registry._files.clear()
    registry._files.update(before)
