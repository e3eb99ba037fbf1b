"""A uniform grid whose step is fitted once to a range, and the rounding that the methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..site import Site
from .grid import grid_codes, redo_grid, round_to_grid
from .quantizer import Decode, Quantizer, Scope, snap


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through (Bengio et al. 2013, arXiv 1308.3432)."""
    return snap(x, x.round())


CANDIDATES = 50  # ranges that are tried
MOST_LOOKED_AT = 2**18  # elements


@torch.no_grad()
def closest_step(x: Tensor, qmin: int, qmax: int) -> Tensor:
    """The step whose grid ``step * [qmin, qmax]`` has the least mean squared error on ``x``; 1 where all is 0.

    The ranges that are tried are equal parts of ``max |x|``, from the whole down to one of them; of more than 2^18 elements every
    n-th is looked at.

    Args:
        x: Float, any shape.
        qmin: Smallest code, 0 or less.
        qmax: Largest code, 0 or more.

    Returns:
        Float32 scalar, positive.
    """
    flat = x.detach().float().flatten()
    flat = flat[:: max(1, math.ceil(flat.numel() / MOST_LOOKED_AT))]
    largest = flat.abs().max()
    if not largest > 0:
        return torch.ones_like(largest)
    middle = (qmax - qmin) / 2 if qmin < 0 else qmax  # a range that uses all codes
    steps = [share / CANDIDATES * largest / middle for share in range(1, CANDIDATES + 1)]
    errors = [(flat.div(step).round_().clamp_(qmin, qmax).mul_(step) - flat).square().mean() for step in steps]
    return steps[int(torch.stack(errors).argmin())]


class UniformQuantizer(Quantizer):
    """``x_q = step * round(clip(x / step, qmin, qmax))`` with a fixed step, fitted so that the range fills the grid.

    The gradient is 1 inside the range and 0 outside. Post-training quantization is made of it, and methods whose paper leaves
    the first and last layers in float use it there at 8 bits.

    Args:
        bits, site, scope, signed: See `Quantizer`.
        rule: ``minmax``: the range is that of the probe, symmetric, so that a signed one leaves the lowest code unused.
            ``percentile``: its tails are cut off. ``full``: a signed range is that of all codes, wider by half a step; the largest
            positive values are cut off. ``mse``: see `closest_step`.
        percentile: Share of ``|x|`` inside the range, in percent.
    """

    step: Tensor

    def __init__(
        self,
        bits: int,
        site: Site,
        scope: Scope,
        signed: bool,
        rule: Literal["minmax", "percentile", "full", "mse"] = "minmax",
        percentile: float = 99.9,
    ) -> None:
        super().__init__(bits, site, scope, signed)
        self.rule, self.percentile = rule, percentile
        self.register_buffer("step", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the step by the rule."""
        if self.rule == "mse":
            self.step.copy_(closest_step(x, self.qmin, self.qmax))
            return
        size = x.detach().float().abs().flatten()
        if self.rule == "percentile":
            rank = max(1, round(size.numel() * self.percentile / 100))
            edge = size.kthvalue(rank).values
            edge = edge if edge > 0 else size.max()  # more than the percentile may be zeros, after a ReLU
        else:
            edge = size.max()
        codes = (self.qmax - self.qmin) / 2 if self.rule == "full" and self.signed else max(self.qmax, 1)
        self.step.copy_(edge / codes if edge > 0 else torch.ones_like(edge))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""
        return round_to_grid(x, self.step, self, ste=True)

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """One fused pass."""
        return redo_grid(x, self.step, self)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``; the value of a code is its multiple of the step."""
        return grid_codes(x, self.step, self)
