"""DoReFa-Net: weights through tanh, activations clipped to [0, 1], both on a fixed grid (Zhou et al. 2016)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, UniformQuantizer, round_ste
from ..bench.site import Site
from ..bench.spec import Frozen

SMALLEST_SCALE = 1e-8


class TanhWeight(Quantizer):
    """``w_q = m (2 round(n u) / n - 1)`` with ``u = tanh(w) / (2 max|tanh(w)|) + 1/2`` and ``n = 2^k - 1`` (Eq. 9).

    Codes are 0 to n. The scale m is 1 in the paper; ``scale="max"`` keeps ``max|tanh(w)|``, see `DoReFa`.
    """

    def __init__(self, bits: int, site: Site, scope: Scope, scale: Literal["max", "none"]) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.scale, self.rescales = scale, scale == "none"

    def _unit(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The position of each weight on the grid, 0 to n, and the scale m (scalar, detached)."""
        t = w.tanh()
        largest = t.abs().max().clamp(min=SMALLEST_SCALE)  # a weight may start at zero everywhere
        scale = largest.detach() if self.scale == "max" else torch.ones_like(largest)
        return (t / (2 * largest) + 0.5) * self.qmax, scale

    def constants(self) -> int:
        """The scale m; in the paper's form there is none."""
        return int(self.scale == "max")

    def _value(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (2 * codes / self.qmax - 1) * scale

    def quantize(self, x: Tensor) -> Tensor:
        """Weights in [-m, m]; the gradient goes through tanh and its largest value, and straight through the rounding."""
        u, scale = self._unit(x)
        return self._value(round_ste(u), scale)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n."""
        u, scale = self._unit(x.detach())
        return u.round().int(), lambda codes: self._value(codes.to(scale.dtype), scale)


class UnitActivation(UniformQuantizer):
    """``x_q = round(n clip(x, 0, 1)) / n`` (Eq. 5): nothing is learned and nothing is fitted."""

    def __init__(self, bits: int, site: Site, scope: Scope) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.step.fill_(1 / self.qmax)

    def fit(self, x: Tensor) -> None:
        """The range is [0, 1], whatever the data."""


class DoReFa(Method):
    """DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160) without gradient quantization.

    Departures: the paper trains from scratch and leaves the weights' scale at 1; here training starts from a float network, whose
    layers without a norm of their own (the classifier) would change scale, so m is ``max|tanh(w)|`` as in the most used public code
    (``scale="none"``: the paper). Its gradient is another one: m is a constant in both, but that code takes the divisor
    ``2 max|tanh(w)|`` for one, too, while here the gradient goes through it, as in Eq. 9 and in tensorpack, which adds a part at
    the largest weight. Before a norm nothing is lost by that; in the classifier this part has no counterpart in m.

    The paper leaves the first layer's input in float; where the run's ``first_last`` asks for bits and the input has negative
    values, which [0, 1] would cut off, it is quantized to the range of the probe. Activations of a network that was not trained
    within [0, 1] lose what lies above: ``act_range="fit"`` has the range with the least squared error instead.
    """

    name = "dorefa"
    version = 2  # 2: activations on the grid of round_to_grid
    paper = "Zhou et al., DoReFa-Net, 2016, arXiv 1606.06160"
    fidelity = "paper"
    first_last = "fp"

    class Params(Frozen):
        """Settings of DoReFa."""

        scale: Literal["max", "none"] = Field(
            "max", description="max: weights keep the scale of tanh(w); none: [-1, 1], the paper"
        )
        act_range: Literal["unit", "fit"] = Field(
            "unit", description="range of the activations: [0, 1], the paper, or fit to the probe and fixed"
        )

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through tanh."""
        return TanhWeight(bits, site, scope, self.params.scale)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Clipped to [0, 1], unless the range is fitted."""
        if self.params.act_range == "fit":
            return UniformQuantizer(bits, site, scope, site.signed_input, "mse")
        return UniformQuantizer(bits, site, scope, True) if site.signed_input else UnitActivation(bits, site, scope)
