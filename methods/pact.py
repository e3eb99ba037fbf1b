"""PACT: the clipping level of the activations is a parameter (Choi et al. 2018); weights as in DoReFa."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Quantizer, Scope
from ..bench.site import Site
from ..bench.spec import Frozen
from .dorefa import TanhWeight

SMALLEST_CLIP = 1e-6


class LearnedClip(Quantizer):
    """``y = clip(x, 0, alpha)``, ``y_q = round(y n / alpha) alpha / n`` (Eq. 1 and 2), with alpha a parameter.

    The gradient of alpha is 1 where ``x >= alpha`` and 0 elsewhere (Eq. 3): the rounding counts as the identity for both.
    An input with negative values is clipped to [-alpha, alpha] and n is ``2^(k-1) - 1``; the paper has only unsigned ones.
    """

    groups = {"alpha": (1.0, None)}  # noqa: RUF012  the paper decays alpha as it decays the weights (sec. 3.2)

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool, init: float) -> None:
        super().__init__(bits, site, scope, signed)
        self.init = init
        self.alpha = nn.Parameter(torch.tensor(init))

    @property
    def step(self) -> Tensor:
        """Alpha / n."""
        return self.alpha / self.qmax

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The paper's large starting value, whatever the data."""
        self.alpha.fill_(self.init)

    def _clip(self, x: Tensor) -> Tensor:
        # By `where`, not `clamp`: at x = alpha the gradient is alpha's, as in the paper.
        alpha = self.alpha.to(x.dtype)
        low = -alpha if self.signed else torch.zeros_like(alpha)
        return torch.where(x >= alpha, alpha, torch.where(x < low, low, x))

    def quantize(self, x: Tensor) -> Tensor:
        """On the grid of alpha / n."""
        clipped = self._clip(x)
        codes = (clipped.detach() / self.step.detach()).round()
        # The value is codes * step; the gradient is that of the clipped input (Eq. 3).
        return codes * self.step.detach() + (clipped - clipped.detach())

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Codes 0 to n, or -n to n."""
        step = self.step.detach().clone()
        return (self._clip(x.detach()) / step).round().int(), lambda codes: codes.to(step.dtype) * step

    def project(self) -> None:
        """Keep alpha positive."""
        self.alpha.clamp_(min=SMALLEST_CLIP)


class PACT(Method):
    """PACT (Choi et al. 2018, arXiv 1805.06085): a learned clipping level a layer, weight-decayed; weights by DoReFa.

    Departure: the weights keep the scale of tanh(w), as `DoReFa` explains.
    """

    name = "pact"
    paper = "Choi et al., PACT: parameterized clipping activation, 2018, arXiv 1805.06085"
    fidelity = "paper"

    class Params(Frozen):
        """Settings of PACT."""

        alpha: float = Field(
            8.0, gt=0, le=1000, description="starting value of the clipping level; the paper's figure has 10"
        )

    # On small images no activation may reach the usual starting value within a few steps; alpha would get a zero gradient.
    test_params = {"alpha": 1.0}  # noqa: RUF012

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """DoReFa's."""
        return TanhWeight(bits, site, scope, "max")

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Clipped at alpha."""
        return LearnedClip(bits, site, scope, site.signed_input, self.params.alpha)
