"""Several processes that train one network: what must be the mean or the sum over all of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """``x`` summed over all ranks, with a gradient; the same on every rank, to the bit."""
    if count() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x)


def sum_(x: Tensor) -> Tensor:
    """``x`` summed over all ranks, in place; without a gradient. The same on every rank, to the bit."""
    if count() > 1:
        dist.all_reduce(x)
    return x


def mean_(x: Tensor) -> Tensor:
    """``x`` averaged over all ranks, in place; without a gradient. The same on every rank, to the bit."""
    return sum_(x).div_(ranks) if (ranks := count()) > 1 else x


__all__ = ["count", "mean_", "sum_", "total"]
