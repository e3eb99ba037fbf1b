"""ClimbQ: quantization under class imbalance, with wider CDFs and larger weights for rare classes (Chen et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ..bench.method import Method
from .emaq_lt import EmaQLT


class ClimbQ(EmaQLT):
    """ClimbQ (Chen et al., NeurIPS 2022), the predecessor of `EmaQLT`: our reconstruction after its public code.

    Of EmaQ-LT it has the conditional CDF and the weights by Levene's test. As in the code, autograd goes through the CDF and its
    statistics, weights are in [-1, 1], s is about 2 in training (``s_train``: the code divides a class's share of the batch by the
    sum of the shares over the batch) and 2 in use, and the loss is the binary cross-entropy of the softmax, a mean over classes.
    There is no logit adjustment; all domains are one, with one set of statistics and one pass.

    Departures: the code tests each batch's features, with the class sizes of the whole set, so that its class means are far too
    small, and leaves features that are exactly 0 out of its distances; here the test is EmaQ-LT's, and they count. It quantizes
    behind the norm by N(0, s), so that convolutions read residual sums of more than 2^m levels; here each layer's input is
    quantized, unless ``act_at="post_bn"``. A layer without a norm behind it keeps its scale. The code's policy
    (``first_last="native"``) is m bits in the first layer and a float classifier. Its lists of images are the data's
    ``lt_list="climbq"``.
    """

    name = "climbq"
    paper = (
        "Chen et al., ClimbQ: class imbalanced quantization enabling robustness on efficient inferences, NeurIPS 2022"
    )
    first_last = ("same", "fp")
    version = 4  # 4: domains of unequal size count alike, as in the batches
    alters = frozenset({"loss"})
    step = Method.step

    class Params(EmaQLT.Params):
        """Settings of ClimbQ: those of EmaQ-LT that it leaves open."""

        alpha: float = Field(1.0, gt=0, le=100, description="half the width of the weights' range")
        s_train: Literal["class", "batch"] = Field("batch", description="s in training; class: as the paper has it")

        aqgd_norm: ClassVar = "ste"
        act_surrogate: ClassVar = False
        aggregation: ClassVar = "awa"
        scope: ClassVar = "network"
        sensitivity_decay: ClassVar = 0.0
        norm: ClassVar = "shared"
        loss: ClassVar = "bce"
        cla: ClassVar = "none"
        cla_gradient: ClassVar = False
        kappa: ClassVar = None

    test_params: ClassVar[Mapping[str, object]] = {"refresh": 2}

    @property
    def domains(self) -> int:
        """All are one."""
        return 1
