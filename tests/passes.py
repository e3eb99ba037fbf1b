"""Single training steps of methods with two passes, for the tests of the flatness family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qatbench.bench.method import Method, Run
from qatbench.bench.testing import Loop, ready
from torch import Tensor


def begin(name: str, **settings: Any) -> tuple[Any, Run]:
    """A method on the contract's network, ready for its first step, and the run with the first batch."""
    method, data = ready(name, **settings)
    loop = Loop(method, data)
    loop.epoch([])
    loop.run.batch = next(iter(data.train_dataloader()))
    return method, loop.run


def in_second_pass(method: Method, look: Callable[[], None]) -> None:
    """Have ``look`` called before each second pass of the method."""
    compute = method.compute_losses

    def spy(batch: Any, track: bool) -> dict[str, Tensor]:
        if not track:
            look()
        return compute(batch, track)

    method.compute_losses = spy  # type: ignore[method-assign]
