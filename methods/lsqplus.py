"""LSQ+: a learned step and a learned offset for activations that are negative, too (Bhalgat et al., CVPR workshops 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, grid_codes, redo_grid, round_to_grid
from ..bench.site import Site
from ..bench.spec import Frozen
from .lsq import SMALLEST_STEP, LearnedStep


class LearnedStepOffset(Quantizer):
    """``x_q = s * round(clip((x - beta) / s, qmin, qmax)) + beta`` (Eq. 7) with s and beta learned, codes 0 to 2^b - 1.

    The gradient of beta is 0 inside the range and 1 outside, that of s is LSQ's; both are multiplied by
    1 / sqrt(N * Q_P) (Eq. 8, 9).
    """

    # A step that minimises the error is smaller than LSQ's start, for which the gradient scale was made (at 8 bits 10 times):
    # at the weights' learning rate it crosses zero within a few updates.
    groups = {"step": (0.1, 0.0), "offset": (0.1, 0.0)}  # noqa: RUF012

    def __init__(self, bits: int, site: Site, scope: Scope, features: int, candidates: int) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.step = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.grad_scale = 1.0 / math.sqrt(features * self.qmax)
        self.candidates = candidates

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The step and offset with the least mean squared error on ``x`` (Eq. 10) among ranges that shrink from min and max.

        The ranges are ``candidates`` equal parts of [min, max], scaled about 0 from the whole down to one part.
        """
        x = x.detach().float()
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        if not high > low:
            return  # all zeros: any step does
        best = math.inf
        for k in range(1, self.candidates + 1):
            share = k / self.candidates
            step, offset = share * (high - low) / self.qmax, share * low
            error = float((round_to_grid(x, step, self, offset=offset) - x).square_().mean())
            if error < best:
                best = error
                self.step.copy_(step.clamp(min=SMALLEST_STEP))
                self.offset.copy_(offset)

    def quantize(self, x: Tensor) -> Tensor:
        """See `round_to_grid`."""
        return round_to_grid(x, self.step, self, offset=self.offset, scale=self.grad_scale)

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """One fused pass."""
        return redo_grid(x, self.step, self, offset=self.offset)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from 0 to ``qmax``."""
        return grid_codes(x, self.step, self, offset=self.offset)

    def project(self) -> None:
        """Keep the step positive."""
        self.step.clamp_(min=SMALLEST_STEP)


class SpreadStep(LearnedStep):
    """LSQ's weight quantizer with LSQ+'s start."""

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`` (Eq. 11)."""
        x = x.detach().float()
        mean, spread = x.mean(), 3 * x.std(correction=0)
        edge = torch.maximum((mean - spread).abs(), (mean + spread).abs())
        self.step.copy_(edge / 2 ** (self.bits - 1) if edge > 0 else torch.ones_like(edge))


class LSQPlus(Method):
    """LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): weights symmetric as in LSQ, activations with a learned offset.

    Made for networks with swish and its like; after a ReLU the offset has little to do. The activations' starting step and offset
    come from a search over ranges (``candidates``) on the probe batch, where the paper minimises the same error by other means;
    they learn at a tenth of the weights' learning rate.
    """

    name = "lsqplus"
    paper = (
        "Bhalgat et al., LSQ+: improving low-bit quantization through learnable offsets, CVPRW 2020, arXiv 2004.09576"
    )
    fidelity = "paper"

    class Params(Frozen):
        """Settings of LSQ+."""

        candidates: int = Field(50, ge=1, le=1000, description="ranges that are tried for the starting step and offset")

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Signed, without an offset."""
        return SpreadStep(bits, site, scope, True, site.weights)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """With an offset."""
        return LearnedStepOffset(bits, site, scope, site.inputs, self.params.candidates)
