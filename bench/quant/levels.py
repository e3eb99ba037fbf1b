"""What the codes of a quantizer are worth, read off the quantizer itself: a table, and the integers behind it if there are any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantizer import Quantizer

ROUNDING = (
    2.0**-22
)  # how far a float32 value may be from the grid, relative to the largest: two roundings, and the fit's own
CHUNK = 2**11


def switching_points(code: Callable[[Tensor], Tensor], wanted: Tensor, rows: int = 1) -> Tensor:
    """The least float32 that has each of the wanted codes, [rows, n]: exact, by bisection over the floats themselves.

    Args:
        code: Maps float32 [rows, n] to codes, row by row, and rises.
        wanted: [n], ascending.
        rows: How many grids.
    """

    def as_float(
        order: Tensor,
    ) -> Tensor:  # 0, 1, 2, ... are the floats from 0 upwards, -1, -2, ... those from -0 downwards
        bits = torch.where(order >= 0, order, (-(order + 1)) | -(2**31))
        return bits.int().view(torch.float32)

    low = torch.full((rows, len(wanted)), -(2**31) + 2**23, device=wanted.device)  # below: NaN
    high = torch.full_like(low, 2**31 - 2**23)
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = code(as_float(middle)) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return as_float(high)


@dataclass(frozen=True)
class Levels:
    """The values of a quantizer's codes.

    Attributes:
        low: The lowest code, ``qmin``.
        table: float64 [K, *group], the value of codes ``low`` to ``low + K - 1``. The group's shape broadcasts against the tensor:
            ``[1, 1, 1, 1]`` for a grid per tensor, ``[O, 1, 1, 1]`` per channel of a weight, ``[B, 1, 1, 1]`` per sample.
    """

    low: int
    table: Tensor

    @property
    def codes(self) -> Tensor:
        """``low`` to ``low + K - 1``, float64, shaped to broadcast against the table."""
        codes = torch.arange(len(self.table), dtype=torch.float64) + self.low
        return codes.view(-1, *[1] * (self.table.ndim - 1))

    def look_up(self, values: Tensor, codes: Tensor) -> Tensor:
        """``values`` [K, *group] of the codes (int32, the tensor's shape)."""
        index = (codes - self.low).long()
        if values[0].numel() == 1:
            return values.flatten()[index]
        return values.expand(len(values), *codes.shape).gather(0, index[None])[0]

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Scale and offset (float64 [*group]) with ``value = scale * code + offset`` to float rounding; None for a codebook."""
        if len(self.table) == 1:
            return None
        # The step that the quantizer itself multiplies by, where one of its values is that step; else from end to end.
        one, zero = 1 - self.low, -self.low
        candidates = [(self.table[-1] - self.table[0]) / (len(self.table) - 1)]
        if zero >= 0 and one < len(self.table) and not self.table[zero].any():
            candidates.insert(0, self.table[one])
        for scale in candidates:
            offset = self.table[0] - scale * self.low
            offset = torch.where(offset.abs() <= ROUNDING * self._largest(), 0.0, offset)
            if self._near(scale * self.codes + offset):
                return scale, offset
        return None

    def integers(self, low: int, high: int) -> tuple[Tensor, Tensor] | None:
        """Unit (float64 [*group]) and integers (float64 [K, *group]) with ``value = unit * integer`` to float rounding.

        A uniform grid has them if its zero is a code (LSQ) or halfway between two (DoReFa: ``2c - n``), and some codebooks do
        (sums of powers of two).

        Args:
            low: The smallest integer allowed.
            high: The largest.
        """
        fit = self.affine()
        if fit is not None and bool((fit[0] != 0).all()):
            scale, offset = fit
            shifted = self.codes + offset / scale
            found = [((scale / m).abs(), (m * shifted).round() * scale.sign()) for m in (1, 2)]
        else:
            found = self._multiples(max(abs(low), abs(high)))
        for unit, numbers in found:
            if low <= float(numbers.min()) and float(numbers.max()) <= high and self._near(unit * numbers):
                return unit, numbers
        return None

    def _multiples(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """The coarsest unit of which all values of one table are multiples; at most ``most`` units make the largest value."""
        if self.table[0].numel() != 1 or not self.table.any():
            return []
        shares = self.table.flatten() / self._largest().flatten()
        for counts in torch.arange(1, most + 1, dtype=torch.float64).split(CHUNK):
            near = counts[:, None] * shares
            fits = ((near.round() - near).abs() <= ROUNDING * counts[:, None]).all(1)
            if fits.any():
                count = counts[fits][0]
                return [(self._largest() / count, (count * shares).round().view_as(self.table))]
        return []

    def _largest(self) -> Tensor:
        return self.table.abs().amax(0)

    def _near(self, values: Tensor) -> bool:
        return bool(((values - self.table).abs() <= ROUNDING * self._largest()).all())


def read_levels(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Levels]:
    """The codes of ``x`` (int32, its shape), and what they are worth.

    Args:
        quantizer: In eval mode.
        x: The weight, or an input of the layer.

    Raises:
        ValueError: The table does not give back the quantizer's values: its ``per`` is not what it says.
    """
    codes, decode = quantizer.encode(x.detach())
    shape = [1] * x.ndim
    if quantizer.per != "tensor":
        dim = 1 if quantizer.per == "channel" and quantizer.of == "input" else 0
        shape[dim] = x.shape[dim]
    values = [decode(torch.full(shape, k, dtype=torch.int32)) for k in range(quantizer.qmin, quantizer.qmax + 1)]
    wrong = f"{type(quantizer).__name__} has not one value for each code: it says one grid per {quantizer.per}"
    if any(value.numel() not in (1, math.prod(shape)) for value in values):
        raise ValueError(wrong)
    levels = Levels(quantizer.qmin, torch.stack([v.detach().double().expand(shape) for v in values]))
    if not torch.equal(levels.look_up(levels.table, codes).float(), decode(codes).detach().float()):
        raise ValueError(wrong)
    return codes, levels
