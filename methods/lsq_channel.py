"""LSQ with a step of its own for each output channel of a weight, as public codes for domain generalisation have it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..bench.quant import Decode, Quantizer, Scope, grid_codes, round_to_grid
from ..bench.site import Site
from .lsq import LSQ

SMALLEST_SHARE = 0.01  # of its start, for a step


class ChannelStep(Quantizer):
    """LSQ's rounding and gradients for a weight, with one learned step for each output channel.

    Each step starts at ``2 <|w|> / sqrt(Q_P)`` of its channel. The factor on its gradient is ``1 / sqrt(N Q_P)`` with N the weights
    of the whole tensor, as in the public codes, and not of the channel. A step stays above a hundredth of its start (ours;
    the codes let it change its sign): of so many small steps one or the other would cross zero, and end the run.
    """

    per = "channel"
    groups = {"steps": (1.0, 0.0)}  # noqa: RUF012
    steps: nn.Parameter
    """Float [O]."""
    smallest: Tensor
    """Float [O], what the steps stay above."""

    def __init__(self, bits: int, site: Site, scope: Scope) -> None:
        super().__init__(bits, site, scope, signed=True)
        self.steps = nn.Parameter(torch.ones(site.channels[0]))
        self.register_buffer("smallest", torch.full((site.channels[0],), SMALLEST_SHARE))
        self.grad_scale = 1.0 / math.sqrt(site.weights * self.qmax)
        self._rank = 4

    @property
    def step(self) -> Tensor:
        """The steps, float [O, 1, ..], broadcastable to the weight that was met last."""
        return self.steps.view(-1, *[1] * (self._rank - 1))

    def _step(self, x: Tensor) -> Tensor:
        """`step`; the largest for a tensor of another number of channels than the layer's, which no network has."""
        self._rank = x.ndim
        return self.step if len(x) == len(self.steps) else self.steps.amax()

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``2 <|w|> / sqrt(Q_P)`` of each channel; 1 where a filter is zero."""
        size = x.detach().float().abs().reshape(len(x), -1)
        mean = size.mean(1) if len(x) == len(self.steps) else size.mean()
        self.steps.copy_(torch.where(mean > 0, 2 * mean / math.sqrt(self.qmax), 1.0))
        self.smallest.copy_(SMALLEST_SHARE * self.steps)

    def quantize(self, x: Tensor) -> Tensor:
        """See `round_to_grid`."""
        return round_to_grid(x, self._step(x), self, scale=self.grad_scale)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``."""
        return grid_codes(x, self._step(x), self)

    def constants(self) -> int:
        """The steps."""
        return len(self.steps)

    def project(self) -> None:
        """Keep the steps positive."""
        self.steps.clamp_(min=self.smallest)


class LSQChannel(LSQ):
    """LSQ with a step for each output channel of a weight; inputs as in `LSQ`, one step a tensor.

    It is the quantizer of the authors' code of QT-DoG (for weights), and of what is known of GAQAT's and FQAT's runs.
    """

    name = "lsq-channel"
    fidelity = "baseline"

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """A step for each output channel."""
        return ChannelStep(bits, site, scope)
