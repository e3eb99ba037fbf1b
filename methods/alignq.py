"""AlignQ: tensors through their own CDF onto one grid, with the gradient of the CDF itself (Chen et al. 2022)."""

from __future__ import annotations

from pydantic import Field

from ..bench.method import Method
from ..bench.quant import CdfQuantizer, Quantizer, RunningCdfQuantizer, Scope
from ..bench.site import Site
from ..bench.spec import Frozen


class AlignQ(Method):
    """AlignQ (Chen et al., CVPR 2022), the predecessor of `EmaQ`: our reconstruction after its public code.

    Weights are projected by the CDF of their own mean and deviation onto 2^m levels in [-alpha, alpha], activations onto 2^m
    levels in +- 2 sigma; rounding counts as the identity, and autograd goes through the CDF and its statistics. All domains share
    one set of statistics. The paper's ADMM term, which aligns domains, could not be recovered and is missing.

    Departures: the code quantizes behind the norm, so that convolutions read residual sums of more than 2^m levels; here each
    layer's input is quantized, with running statistics of its own in use. A layer without a norm behind it keeps its scale. The
    code's policy (``first_last="native"``) is m bits in the first layer and a float classifier.
    """

    name = "alignq"
    paper = "Chen et al., AlignQ: alignment quantization with ADMM-based correlation preservation, CVPR 2022"
    fidelity = "reconstruction"
    first_last = ("same", "fp")
    version = 2  # 2: norms start from the statistics of the quantized network

    class Params(Frozen):
        """Settings of AlignQ."""

        alpha: float = Field(1.0, gt=0, le=100, description="half the width of the weights' range")

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the weight's own CDF."""
        keeps_scale = site.norm is None
        return CdfQuantizer(bits, site, scope, 2.0 if keeps_scale else self.params.alpha, True, relative=keeps_scale)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the CDF of the batch while training, of its averages in use."""
        return RunningCdfQuantizer(bits, site, scope, through=True)
