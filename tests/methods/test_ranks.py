from __future__ import annotations

from pathlib import Path

import pytest
from qatbench.bench.testing import check_ranks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "climbq", "emaq", "emaq-lt", "sam", "fqat", "gaqat", "balanced-softmax+lsq"])
def test_two_processes_train_as_one(method: str, tmp_path: Path) -> None:
    """A run on two GPUs would be another experiment than the same run on one: other sensitivities, signs or perturbations."""
    check_ranks(method, tmp_path)
