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

    The range of a weight is the one with the least squared error, since with few bits the largest weight is a poor measure: on a
    ResNet-8 at 4 bits that is 69 instead of 61 % (digits, one seed), at 8 bits no difference. ``minmax`` is the largest weight on
    the largest code, so that 2 bits have three levels; ``full`` uses the fourth, as PyTorch's observers do.
    """

    name = "ptq"
    version = 2  # 2: ranges of weights by squared error
    paper = "Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018, arXiv 1806.08342"
    trains = False

    class Params(Frozen):
        """Settings of post-training quantization."""

        range: Literal["minmax", "percentile", "mse"] = Field(
            "percentile", description="how the range of an activation is found"
        )
        weight_range: Literal["minmax", "percentile", "full", "mse"] = Field(
            "mse", description="how the range of a weight is found"
        )
        percentile: float = Field(99.9, gt=50, le=100, description="share of |x| inside the range, in percent")

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Signed, per tensor."""
        return UniformQuantizer(bits, site, scope, True, self.params.weight_range, self.params.percentile)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Unsigned after a ReLU, per tensor."""
        return UniformQuantizer(bits, site, scope, site.signed_input, self.params.range, self.params.percentile)
