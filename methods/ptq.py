"""Post-training quantization: the float network rounded to a grid that is fitted to the probe batch; nothing is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..bench.method import Method
from ..bench.quant import Quantizer, Scope, UniformQuantizer
from ..bench.site import Site
from ..bench.spec import Frozen


class PTQ(Method):
    """Round-to-nearest post-training quantization (Krishnamoorthi 2018, arXiv 1806.08342, sec. 3), per tensor and symmetric.

    Weights use the range rule without a percentile unless asked: their tails carry accuracy at 8 bits, and at 2 bits nothing helps.
    """

    name = "ptq"
    paper = "Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018, arXiv 1806.08342"
    trains = False

    class Params(Frozen):
        """Settings of post-training quantization."""

        range: Literal["minmax", "percentile"] = Field(
            "percentile", description="how the range of an activation is found"
        )
        weight_range: Literal["minmax", "percentile"] = Field(
            "minmax", description="how the range of a weight is found"
        )
        percentile: float = Field(99.9, gt=50, le=100, description="share of |x| inside the range, in percent")

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Signed, per tensor."""
        return UniformQuantizer(bits, site, scope, True, self.params.weight_range, self.params.percentile)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Unsigned after a ReLU, per tensor."""
        return UniformQuantizer(bits, site, scope, site.signed_input, self.params.range, self.params.percentile)
