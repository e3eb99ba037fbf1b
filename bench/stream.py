"""Pixels by index, from arrays in memory or from files that worker processes decode ahead of the training loop."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
from .images import Encoded

DECODERS = "QATBENCH_DECODERS"  # worker processes that decode for one run (default: one a core, at most 8)


def channels_last(images: Tensor | Encoded) -> Tensor | Encoded:
    """A domain's images as they are gathered: uint8 [N, H, W, C], a view; files stay files."""
    return images if isinstance(images, Encoded) else images.permute(0, 2, 3, 1)


def gather(images: Tensor | Encoded, rows: Tensor) -> Tensor:
    """The images of these indices: uint8 [n, H, W, C].

    Args:
        images: uint8 [N, H, W, C], or files.
        rows: int64 [n].
    """
    if isinstance(images, Encoded):
        return torch.from_numpy(np.stack([images[i] for i in rows.tolist()]))
    return images.index_select(0, rows.to(images.device))


def gather_each(
    images: Sequence[Tensor | Encoded], order: Sequence[Tensor] | Tensor, workers: int | None = None
) -> Iterator[Tensor]:
    """The images of one index list after another: uint8 [n * D, H, W, C], domains interleaved.

    Args:
        images: Of each of D domains.
        order: Index lists, int64 [n, D] each.
        workers: Processes that decode ahead, if any domain is encoded; none: as many as the environment says.
    """
    rows = _Rows(images, order)
    workers = decoders() if workers is None else workers
    if workers == 0 or not any(isinstance(i, Encoded) for i in images):
        return (rows.batch(step) for step in range(len(order)))
    # A generator of its own: by default the loader would take its seed from the one that the training uses.
    return _raised(DataLoader(rows, batch_size=None, num_workers=min(workers, len(order)), generator=torch.Generator()))


def _raised(batches: Iterable[Tensor | UserError]) -> Iterator[Tensor]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Rows(Dataset):
    """Item `step` is a whole batch."""

    def __init__(self, images: Sequence[Tensor | Encoded], order: Sequence[Tensor] | Tensor) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Tensor | UserError:
        try:
            return self.batch(step)
        except UserError as error:
            return error  # raised here, it would come out of the loader with this process's traceback as its message

    def batch(self, step: int) -> Tensor:
        columns = zip(self.images, self.order[step].unbind(1), strict=True)
        return torch.stack([gather(images, rows) for images, rows in columns], 1).flatten(0, 1)


def decoders() -> int:
    """Worker processes that decode for one run."""
    text = os.environ.get(DECODERS, str(min(8, os.cpu_count() or 1)))
    if not re.fullmatch(r"[0-9]{1,3}", text):
        raise UserError(f"{DECODERS}={text!r} is not a number of processes, 0 to 999, e.g. 4")
    return int(text)
