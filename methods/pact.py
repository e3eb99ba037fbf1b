"""PACT: the clipping level of the activations is a parameter (Choi et al. 2018); weights as in DoReFa."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, grid_codes, redo_grid, round_to_grid
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
        self.qmin = -self.qmax if signed else 0  # symmetric
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

    def quantize(self, x: Tensor) -> Tensor:
        """On the grid of alpha / n. The gradient of the step alpha / n, n where x is clipped, is alpha's by the chain rule."""
        return round_to_grid(x, self.step, self, ste=True)

    def redo(self, x: Tensor) -> Callable[[], Tensor] | None:
        """One fused pass."""
        return redo_grid(x, self.step, self)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n, or -n to n."""
        return grid_codes(x, self.step, self)

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
    first_last = "fp"

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
