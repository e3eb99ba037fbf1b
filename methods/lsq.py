"""LSQ: the step size is a parameter, trained by a gradient that knows about rounding (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, closest_step, grid_codes, redo_grid, round_to_grid
from ..bench.site import Site
from ..bench.spec import Frozen

SMALLEST_STEP = 1e-8


class LearnedStep(Quantizer):
    """``x_q = s * round(clip(x / s, qmin, qmax))`` (Eq. 1 and 2) with the gradients of Eq. 3 and 5; one learned step a tensor.

    Without weight decay, and never below 1e-8.
    """

    groups = {"step": (1.0, 0.0)}  # noqa: RUF012
    step: nn.Parameter

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool, features: int) -> None:
        super().__init__(bits, site, scope, signed)
        self.step = nn.Parameter(torch.ones(()))
        self.grad_scale = 1.0 / math.sqrt(features * self.qmax)  # sec. 2.2: g = 1 / sqrt(N * Q_P)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``s = 2 <|x|> / sqrt(Q_P)`` (sec. 2.1)."""
        mean = x.detach().float().abs().mean()
        self.step.copy_(2 * mean / math.sqrt(self.qmax) if mean > 0 else torch.ones_like(mean))

    def quantize(self, x: Tensor) -> Tensor:
        """See `round_to_grid`."""
        return round_to_grid(x, self.step, self, scale=self.grad_scale)

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """One fused pass."""
        return redo_grid(x, self.step, self)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``."""
        return grid_codes(x, self.step, self)

    def project(self) -> None:
        """Keep the step positive."""
        self.step.clamp_(min=SMALLEST_STEP)


class ClosestStep(LearnedStep):
    """The same from another start."""

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The step with the least squared error on ``x``."""
        self.step.copy_(closest_step(x, self.qmin, self.qmax))


class LSQ(Method):
    """Learned step size quantization (Esser et al. 2020, arXiv 1902.08153), as in the paper: per tensor, unsigned activations.

    N in the gradient scale is the number of weights, or of features of one image (sec. 2.2); public codes often count the whole
    batch instead, which makes the steps' gradients smaller by the root of the batch size.

    The paper's start is small for activations behind a ReLU, many of which are zero, and a short run does not get far from it: on
    optdigits (1,000 images, 3 epochs, w2a2, one seed) ``act_start="mse"`` had 67.5 %, the paper's, which is the default, 56.1 %.
    """

    name = "lsq"
    paper = "Esser et al., Learned step size quantization, ICLR 2020, arXiv 1902.08153"
    fidelity = "paper"

    class Params(Frozen):
        """Settings of LSQ."""

        act_start: Literal["paper", "mse"] = Field(
            "paper", description="start of the activations' steps: the paper's, or the least squared error on the probe"
        )

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Signed."""
        return LearnedStep(bits, site, scope, True, site.weights)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Unsigned after a ReLU."""
        kind = LearnedStep if self.params.act_start == "paper" else ClosestStep
        return kind(bits, site, scope, site.signed_input, site.inputs)
