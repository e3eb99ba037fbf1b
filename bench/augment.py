"""Augmentation and normalisation of whole batches; what is drawn at random is drawn first, and on the CPU."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError, nearest

LARGE = 2**14  # bytes of an image; from here on a call per image costs less than one more copy of the batch
TRIES = 10  # windows drawn for an image until one fits
ASPECT = (3 / 4, 4 / 3)  # of a window, relative to a square
CACHED = 2**19  # floats to work on at a time on a CPU: they stay in its cache


class Augment(ABC):
    """What happens to a training batch: `draw` what, then `apply` it; the pixels depend on nothing but the two's arguments.

    Each row of what was drawn is for one image, so that a batch may be drawn as a whole and applied in parts.
    """

    @property
    @abstractmethod
    def columns(self) -> int:
        """How many numbers are drawn for an image."""

    @abstractmethod
    def draw(self, n: int, rng: torch.Generator, stored: tuple[int, int], crop: tuple[int, int]) -> Tensor:
        """Rows [n, columns] for `n` images; always drawn on the CPU, so that every device sees the same.

        Args:
            n: Number of images.
            rng: On the CPU.
            stored: Height and width of the images.
            crop: Height and width that the network sees.
        """

    @abstractmethod
    def apply(self, x: Tensor, drawn: Tensor, crop: tuple[int, int]) -> Tensor:
        """The images uint8 [B, H, W, C], changed as `drawn` [B, columns] says: uint8 [B, h, w, C], in memory of its own."""


@dataclass(frozen=True)
class Crop(Augment):
    """Flip perhaps, and crop at a random place: of the padded image or, with `window`, of one that is larger than the crop."""

    pad: int = 0
    edge: bool = False  # pad with the pixels at the edge; else with black
    flip: bool = False
    window: bool = False  # crop a larger image anywhere, without padding; else its centre is taken first

    @property
    def columns(self) -> int:
        """Down, right, flip."""
        return 3

    def draw(self, n: int, rng: torch.Generator, stored: tuple[int, int], crop: tuple[int, int]) -> Tensor:
        """Rows (down, right, flip), int64."""
        places = [m + 1 for m in self._margins(stored, crop)]
        down, right = (torch.randint(p, (n,), generator=rng) for p in places)
        flip = torch.randint(2 if self.flip else 1, (n,), generator=rng)
        return torch.stack([down, right, flip], 1)

    def apply(self, x: Tensor, drawn: Tensor, crop: tuple[int, int]) -> Tensor:
        """The batch `x`, flipped and then cropped as `drawn` says."""
        down, right, flip = drawn.unbind(1)
        margin = self._margins((x.shape[1], x.shape[2]), crop)[1]
        if not (self.window and x.shape[1:3] != crop):
            x = self._padded(centre(x, crop))
        if not self.flip:
            return _windows(x, down, right, crop)
        # The same pixels as flipping first, but there are fewer of them to flip.
        right = torch.where(flip.bool(), margin - right, right)
        return _mirror(_windows(x, down, right, crop), flip)

    def _margins(self, stored: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
        """By how many pixels the padded image is higher and wider than the crop."""
        height, width = _surplus(stored, crop)
        return (height, width) if self.window and stored != crop else (2 * self.pad, 2 * self.pad)

    def _padded(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        p = self.pad
        if not p:
            return x
        if self.edge:
            x = torch.cat([*[x[:, :, :1]] * p, x, *[x[:, :, -1:]] * p], 2)
            return torch.cat([*[x[:, :1]] * p, x, *[x[:, -1:]] * p], 1)
        out = x.new_zeros(b, h + 2 * p, w + 2 * p, c)
        out[:, p : p + h, p : p + w] = x
        return out


@dataclass(frozen=True)
class ResizedCrop(Augment):
    """A window of random size, aspect and place, brought to the size of the crop; flip perhaps; change the colours perhaps.

    Windows are drawn as by torchvision's RandomResizedCrop: up to ten tries for one that fits, then the largest in the
    centre. They are resized bilinearly, with antialiasing.

    Colours are changed as by torchvision's ColorJitter and RandomGrayscale, with these departures: always in the order
    brightness, contrast, saturation, hue, greyscale (ColorJitter shuffles the first four), and rounded to whole grey levels
    once, at the end. Images that do not have three channels have their brightness and contrast changed only.
    """

    scale: tuple[float, float]  # area of the window over that of the image
    jitter: float = 0.0  # brightness, contrast and saturation by up to this share, hue by up to this part of the circle
    grey: float = 0.0  # how probable a grey image is; drawn only if there is jitter

    @property
    def columns(self) -> int:
        """Top, left, height, width, flip; with jitter also brightness, contrast, saturation, hue, grey."""
        return 10 if self.jitter else 5

    def draw(self, n: int, rng: torch.Generator, stored: tuple[int, int], crop: tuple[int, int]) -> Tensor:
        """Rows as `columns` names them, float32: positions and sizes are whole pixels of the stored image."""
        height, width, fits = self._sizes(n, rng, stored)
        drawn = []
        for full, size in zip(stored, (height, width), strict=True):
            spare = full - size
            place = (torch.rand(n, generator=rng, dtype=torch.float64) * (spare + 1)).floor()
            drawn.append(torch.where(fits, place, (spare / 2).floor()))
        drawn += [height, width, torch.randint(2, (n,), generator=rng)]
        if self.jitter:
            change = (2 * torch.rand(4, n, generator=rng) - 1) * self.jitter
            grey = torch.rand(n, generator=rng) < self.grey
            drawn += [*(1 + change[:3]).clamp_(min=0), change[3], grey]
        return torch.stack([d.float() for d in drawn], 1)

    def apply(self, x: Tensor, drawn: Tensor, crop: tuple[int, int]) -> Tensor:
        """The windows of the batch `x` that `drawn` names, resized, flipped and coloured."""
        out = x.new_empty(len(x), *crop, x.shape[3])
        for image, to, (top, left, height, width) in zip(x, out, drawn[:, :4].int().tolist(), strict=True):
            to.copy_(_resized(image[top : top + height, left : left + width], crop))
        out = _mirror(out, drawn[:, 4])
        if not self.jitter:
            return out
        part = max(1, CACHED // out.shape[1:].numel()) if x.device.type == "cpu" else len(x)
        for to, how in zip(out.split(part), drawn[:, 5:].split(part), strict=True):
            to.copy_(_coloured(to, how))
        return out

    def _sizes(self, n: int, rng: torch.Generator, stored: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Heights and widths of windows, and which of them were drawn (bool); none of the tries for the others did fit."""
        share, aspect = torch.rand(2, TRIES, n, generator=rng, dtype=torch.float64)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * share) * math.prod(stored)
        low, high = (math.log(a) for a in ASPECT)
        aspect = (low + (high - low) * aspect).exp()
        widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fit = (widths <= stored[1]) & (heights <= stored[0]) & (widths > 0) & (heights > 0)
        first = fit.int().argmax(0, keepdim=True)  # the first of those that fit
        fits = fit.any(0)
        height, width = stored[0], stored[1]  # of the largest window with an aspect that is allowed
        if width / height < ASPECT[0]:
            height = round(width / ASPECT[0])
        elif width / height > ASPECT[1]:
            width = round(height * ASPECT[1])
        heights = torch.where(fits, heights.gather(0, first)[0], height)
        return heights, torch.where(fits, widths.gather(0, first)[0], width), fits


def centre(x: Tensor, crop: tuple[int, int]) -> Tensor:
    """The central pixels of uint8 [B, H, W, C], as an evaluation sees them: a view [B, h, w, C]."""
    height, width = _surplus((x.shape[1], x.shape[2]), crop)
    top, left = round(height / 2), round(width / 2)  # as torchvision rounds
    return x[:, top : top + crop[0], left : left + crop[1]]


def _surplus(stored: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    height, width = stored[0] - crop[0], stored[1] - crop[1]
    if min(height, width) < 0:
        have, want = (f"{h} x {w}" for h, w in (stored, crop))
        raise UserError(f"cannot crop {want} pixels from images of {have}; crop less, or use augment=resized-crop-flip")
    return height, width


def _windows(x: Tensor, down: Tensor, right: Tensor, crop: tuple[int, int]) -> Tensor:
    """A window of each image: uint8 [B, h, w, C]."""
    (h, w), c = crop, x.shape[3]
    x = x.contiguous()
    image, row, pixel = x.stride()[:3]
    # One view of all windows, at every byte where one could start; selecting from it copies whole windows, row by row.
    starts = x.numel() - (h - 1) * row - w * c + 1
    windows = x.as_strided((starts, h, w * c), (1, row, 1))
    first = torch.arange(len(x), device=x.device) * image
    return windows.index_select(0, first + down * row + right * pixel).view(-1, h, w, c)


def _mirror(x: Tensor, flip: Tensor) -> Tensor:
    """Images uint8 [B, H, W, C], which may be changed in place, with those mirrored that `flip` [B] marks."""
    chosen = flip.nonzero().flatten()
    if x.device.type == "cpu" and x.shape[1:].numel() >= LARGE:
        for i in chosen.tolist():
            x[i] = x[i].flip(1)
        return x
    # Mirror images are put behind the others, since copying them back into place costs more.
    source = torch.arange(len(x), device=x.device)
    source[chosen] = torch.arange(len(x), len(x) + len(chosen), device=x.device)
    return torch.cat([x, x.index_select(0, chosen).flip(2)]).index_select(0, source)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """One image uint8 [H, W, C], bilinear and antialiased: uint8 [h, w, C]."""
    x = (
        image[None].contiguous().permute(0, 3, 1, 2)
    )  # contiguous and in this order: else torch turns it into planes first
    if x.device.type == "cpu":
        y = F.interpolate(x, size, mode="bilinear", antialias=True)
    else:  # torch resizes bytes on the CPU only
        y = F.interpolate(x.float(), size, mode="bilinear", antialias=True).round_().to(torch.uint8)
    return y[0].permute(1, 2, 0)


def _coloured(x: Tensor, how: Tensor) -> Tensor:
    """Images uint8 [B, H, W, C] with brightness, contrast, saturation, hue and grey changed by `how` [B, 5].

    No operation here may fuse a product with a sum: rounded apart, the result is the same on every device and in any batch.
    """
    bright, contrast, saturation, hue, _ = how[:, :, None, None, None].unbind(1)
    y = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # channel by channel
    y.mul_(bright).clamp_(0, 255)
    # Of whole grey levels, as Pillow has it: sums of integers do not depend on their order.
    mean = _luma(y).round_().sum(-1, dtype=torch.float64).sum(-1) / (x.shape[1] * x.shape[2])
    mean = mean.round_().float()[:, None, None, None]
    y.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 255)
    if x.shape[3] == 3:
        grey = _luma(y)[:, None]
        y.mul_(saturation).add_(grey.mul_(1 - saturation)).clamp_(0, 255)
        y = _turned(y, 6 * hue[:, 0])
        chosen = how[:, 4].nonzero().flatten()
        y[chosen] = _luma(y[chosen])[:, None]
    # By way of int16, which is many times faster than at once; stack interleaves the channels faster than a permuted copy.
    return torch.stack(y.round_().to(torch.int16).to(torch.uint8).unbind(1), -1)


def _luma(y: Tensor) -> Tensor:
    """Brightness as the eye sees it, of [B, 3, H, W] (ITU-R BT.601) or of its only channel: [B, H, W], new memory."""
    if y.shape[1] != 3:
        return y.mean(1)
    red, green, blue = y.unbind(1)
    return (red * 0.299).add_(green * 0.587).add_(blue * 0.114)


def _turned(y: Tensor, by: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] with their hue (of the HSV model) turned by `by` [B, 1, 1] sixths of the circle, at most 3."""
    red, green, blue = y.unbind(1)
    high = torch.maximum(red, green).clamp_(min=blue)
    low = torch.minimum(red, green).clamp_(max=blue)
    chroma = high - low
    # In sixths, 0 at red, 2 at green: going up to 3 there, and down to -3 by way of blue.
    hue = (chroma - low).sub_(red).add_(green).add_(blue).div_(chroma.clamp(min=1e-6))
    hue = hue.copysign_(green - blue).add_(by)
    hue = hue.sub_((hue / 6).round_().mul_(6))[:, None]
    # A channel is at its highest up to one sixth from its own hue, at its lowest from two sixths on, and linear between.
    share = (hue - hue.new_tensor([0, 2, -2])[:, None, None]).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return share.mul_(chroma[:, None]).add_(low[:, None])


AUGMENTS: dict[str, Augment] = {
    "none": Crop(),
    "shift": Crop(pad=2, edge=True),  # for digits: a mirrored digit is no digit, and backgrounds are not black
    "crop-flip": Crop(pad=4, flip=True, window=True),  # CIFAR's: He et al. 2016, section 4.2
    "resized-crop-flip": ResizedCrop((0.08, 1.0)),  # ImageNet's: Szegedy et al. 2015, section 6
    "domainbed": ResizedCrop((0.7, 1.0), jitter=0.3, grey=0.1),  # Gulrajani & Lopez-Paz 2021, as in their code
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
        self._memory = _Memory()

    def __call__(self, x: Tensor) -> Tensor:
        """The batch `x`, normalised."""
        x, (b, *image) = x.flatten(1), x.shape
        cpu = x.device.type == "cpu"
        y = self._memory.floats(x.shape) if cpu else torch.empty_like(x, dtype=torch.float32)
        part = max(1, CACHED // x.shape[1]) if cpu else max(1, b)
        for to, pixels in zip(y.split(part), x.split(part), strict=True):
            to.copy_(pixels).mul_(self._scale).sub_(self._shift)
        return y.view(b, *image).permute(0, 3, 1, 2)


class _Memory:
    """Memory for batches, given out again once no tensor holds it.

    A batch of photographs is larger than what malloc keeps, and fresh pages cost the kernel five times as much as filling them.
    """

    def __init__(self, most: int = 3) -> None:
        self._arrays: deque[np.ndarray] = deque(maxlen=most)

    def floats(self, shape: torch.Size) -> Tensor:
        """Float32 memory, not set to anything, that no other tensor shares."""
        size = math.prod(shape)
        for _ in range(len(self._arrays)):
            array = self._arrays.popleft()  # nobody else can look at it meanwhile
            free = sys.getrefcount(array) == 2  # this variable and the call itself: any tensor would be one more
            if free and len(array) >= size:
                break
            self._arrays.append(array)
        else:
            array = torch.empty(size).numpy()  # by torch, which aligns it
        tensor = torch.from_numpy(array[:size])
        self._arrays.append(array)
        return tensor.view(shape)
