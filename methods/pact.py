"""PACT: the clipping level of the activations is a parameter (Choi et al. 2018); weights as in DoReFa."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, closest_step, grid_codes, redo_grid, round_to_grid
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

    def __init__(
        self, bits: int, site: Site, scope: Scope, signed: bool, init: float, rule: Literal["fit", "paper"] = "paper"
    ) -> None:
        super().__init__(bits, site, scope, signed)
        self.qmin = -self.qmax if signed else 0  # symmetric
        self.init, self.rule = init, rule
        self.alpha = nn.Parameter(torch.tensor(init))

    @property
    def step(self) -> Tensor:
        """Alpha / n."""
        return self.alpha / self.qmax

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``rule="fit"``: the range with the least squared error on ``x``; the paper: one large value, whatever the data."""
        if self.rule == "fit" and bool(x.any()):
            self.alpha.copy_(closest_step(x, self.qmin, self.qmax) * self.qmax)
        else:
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

    Departures: the weights keep the scale of tanh(w), as `DoReFa` explains. The paper trains from scratch for hundreds of epochs,
    in which alpha comes down from 8 or 10; here training starts from a float network and is short, activations may be far below
    such a value, and alpha, which has a gradient only where an input is clipped, would then stay where it is. So it starts at the
    range with the least squared error on the probe (``init="paper"``: at ``alpha``).
    """

    name = "pact"
    version = 2  # 2: alpha starts at a fit to the probe
    paper = "Choi et al., PACT: parameterized clipping activation, 2018, arXiv 1805.06085"
    fidelity = "paper"
    first_last = "fp"

    class Params(Frozen):
        """Settings of PACT."""

        init: Literal["fit", "paper"] = Field(
            "fit", description="start of the clipping level: fit to the probe, or alpha; paper where alpha is given"
        )
        alpha: float = Field(
            8.0, gt=0, le=1000, description="starting value of the clipping level; the paper's figure has 10"
        )

        @model_validator(mode="before")
        @classmethod
        def _alpha_is_meant(cls, values: Any) -> Any:
            return start_is_given(values)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """DoReFa's."""
        return TanhWeight(bits, site, scope, "max")

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Clipped at alpha."""
        return LearnedClip(bits, site, scope, site.signed_input, self.params.alpha, self.params.init)


def start_is_given(values: Any) -> Any:
    """Settings in which a start ``alpha`` without a word on ``init`` is the one that is taken."""
    if isinstance(values, Mapping) and "alpha" in values and "init" not in values:
        return {**values, "init": "paper"}
    return values
