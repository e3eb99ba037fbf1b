"""CR: the network shall say the same of two augmentations of an image (Pang et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..bench.method import Method, Out, Wrapper
from ..bench.spec import Frozen
from .kd import distillation_loss

if TYPE_CHECKING:
    from ..bench.data import Batch


class CR(Wrapper):
    """Consistency regularization (Pang et al. 2024, arXiv 2402.13497) around any method that trains.

    ``L = L_inner(A1 x) + weight * KL(p_T(A2 x) || p_S(A1 x))``: p_S are the network's probabilities for one augmented view of the
    images, p_T are the target's for another one, without gradients. The target is the exponential moving average of the network,
    which starts as the calibrated network, or the network itself. A network with several heads is compared head by head.

    Inferred, since only the abstract was read: both views are drawn from the run's own augmentation; the weight rises linearly over
    the first ``ramp`` epochs, whatever the run's length, so a shorter run ends below it; the temperature, with its square as a
    factor as in `KD`; the average's decay of 0.999, which is the harness's. Unlabelled images are not used.
    """

    name = "cr"
    paper = (
        "Pang et al., In-distribution consistency regularization improves the generalization of quantization-aware training, "
        "2024, arXiv 2402.13497"
    )
    fidelity = "reconstruction"
    default_inner = "lsq"
    views = 2

    class Params(Frozen):
        """Settings of CR."""

        weight: float = Field(1.0, ge=0, le=1000, description="of the consistency loss, once it has risen")
        ramp: float = Field(
            5.0, ge=0, le=1000, description="epochs in which the weight rises from 0; 0: it is there at once"
        )
        temperature: float = Field(1.0, gt=0, le=100)
        target: Literal["ema", "student"] = Field(
            "ema", description="ema: the moving average of the network; student: the network as it is"
        )

    test_params = {"ramp": 0.5}  # noqa: RUF012

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        self.teacher = self.params.target

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's and ``cr``."""
        student = self.task.heads(out.logits)
        target = self.task.heads(out.teacher[self.params.target].logits)
        each = [distillation_loss(student[head], target[head], self.params.temperature) for head in student]
        return self.inner.losses(out, batch) | {"cr": self.weight() * torch.stack(each).sum()}

    def weight(self) -> float:
        """The weight at this step."""
        rising = self.params.ramp * self.scope.steps / max(self.scope.epochs, 1)  # how many steps
        return self.params.weight * min(1.0, self.scope.step / rising if rising else 1.0)
