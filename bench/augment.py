"""Augmentation and normalisation of whole batches: a few tensor operations a batch, none an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError, nearest


@dataclass(frozen=True)
class Augment:
    """Crop at a random place after padding, then perhaps flip; works on uint8 [B, H, W, C]."""

    pad: int = 0
    edge: bool = False  # pad with the pixels at the edge; else with black
    flip: bool = False

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """Rows (down, right, flip) for `n` images; always drawn on the CPU, so that every device sees the same."""
        size = 2 * self.pad + 1
        down, right = torch.randint(size, (2, n), generator=rng)
        flip = torch.randint(2 if self.flip else 1, (n,), generator=rng)
        return torch.stack([down, right, flip], 1)

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        """The batch `x`, flipped and then moved as `drawn` says."""
        source = torch.arange(len(x), device=x.device)
        if self.flip:  # mirror images are put behind the others, since copying them back into place costs more
            chosen = drawn[:, 2].nonzero().flatten()
            source[chosen] = torch.arange(len(x), len(x) + len(chosen), device=x.device)
            x = torch.cat([x, x.index_select(0, chosen).flip(2)])
        return self._crop(x, source, drawn[:, 0], drawn[:, 1]) if self.pad else x.index_select(0, source)

    def _crop(self, x: Tensor, source: Tensor, down: Tensor, right: Tensor) -> Tensor:
        _, h, w, c = x.shape
        padded = self._padded(x)
        image, row, pixel = padded.stride()[:3]
        # One view of all windows, at every byte where one could start; selecting from it copies whole windows, row by row.
        starts = padded.numel() - (h - 1) * row - w * c + 1
        windows = padded.as_strided((starts, h, w * c), (1, row, 1))
        return windows.index_select(0, source * image + down * row + right * pixel).view(-1, h, w, c)

    def _padded(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        p = self.pad
        if self.edge:
            x = torch.cat([*[x[:, :, :1]] * p, x, *[x[:, :, -1:]] * p], 2)
            return torch.cat([*[x[:, :1]] * p, x, *[x[:, -1:]] * p], 1)
        out = x.new_zeros(b, h + 2 * p, w + 2 * p, c)
        out[:, p : p + h, p : p + w] = x
        return out


AUGMENTS: dict[str, Augment] = {
    "none": Augment(),
    "shift": Augment(pad=2, edge=True),  # for digits: a mirrored digit is no digit, and backgrounds are not black
    "crop-flip": Augment(pad=4, flip=True),  # CIFAR's: He et al. 2016, section 4.2
}


def find_augment(name: str, default: str) -> Augment:
    """The augmentation of that name; "default" is the data set's own."""
    name = default if name == "default" else name
    if name not in AUGMENTS:
        raise UserError(f"no augmentation {name!r}{nearest(name, [*AUGMENTS, 'default'])}")
    return AUGMENTS[name]


class Normalise:
    """uint8 [B, H, W, C] to float [B, C, H, W] (in channels_last memory) of zero mean and unit deviation.

    Args:
        mean: Of each channel, of pixels in 0..1.
        std: Likewise.
        area: Pixels of an image, H * W.
    """

    def __init__(self, mean: Tensor, std: Tensor, area: int) -> None:
        # A whole image long: broadcasting over rows of 3 values would be eight times slower.
        self._scale = (1 / (255 * std)).repeat(area)
        self._shift = (mean / std).repeat(area)

    def __call__(self, x: Tensor) -> Tensor:
        """The batch `x`, normalised."""
        return x.flatten(1).float().mul_(self._scale).sub_(self._shift).view(x.shape).permute(0, 3, 1, 2)
