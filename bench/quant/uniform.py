"""A uniform grid whose step is fitted once to a range, and the rounding that the methods share."""

from __future__ import annotations

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


class UniformQuantizer(Quantizer):
    """``x_q = step * round(clip(x / step, qmin, qmax))`` with a fixed step, fitted so that the range fills the grid.

    The gradient is 1 inside the range and 0 outside. Post-training quantization is made of it, and methods whose paper leaves
    the first and last layers in float use it there at 8 bits.

    Args:
        bits, site, scope, signed: See `Quantizer`.
        rule: ``minmax``: the range is that of the probe. ``percentile``: its tails are cut off.
        percentile: Share of ``|x|`` inside the range, in percent.
    """

    step: Tensor

    def __init__(
        self,
        bits: int,
        site: Site,
        scope: Scope,
        signed: bool,
        rule: Literal["minmax", "percentile"] = "minmax",
        percentile: float = 99.9,
    ) -> None:
        super().__init__(bits, site, scope, signed)
        self.rule, self.percentile = rule, percentile
        self.register_buffer("step", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the step from the largest ``|x|``, or from the percentile of ``|x|`` (of ``x`` where it is unsigned)."""
        size = x.detach().float().abs().flatten()
        if self.rule == "percentile":
            rank = max(1, round(size.numel() * self.percentile / 100))
            edge = size.kthvalue(rank).values
            edge = edge if edge > 0 else size.max()  # more than the percentile may be zeros, after a ReLU
        else:
            edge = size.max()
        self.step.copy_(edge / max(self.qmax, 1) if edge > 0 else torch.ones_like(edge))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""
        return round_to_grid(x, self.step, self, ste=True)

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """One fused pass."""
        return redo_grid(x, self.step, self)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``; the value of a code is its multiple of the step."""
        return grid_codes(x, self.step, self)
