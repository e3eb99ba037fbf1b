"""Distillation: the quantized network learns from the logits of the float network it started from (Hinton et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..bench.method import Out, Wrapper
from ..bench.spec import Frozen

if TYPE_CHECKING:
    from ..bench.data import Batch


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, a mean over images. Both: float [B, classes].

    The factor T^2 keeps the size of the gradient when T changes (sec. 2).
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class KD(Wrapper):
    """Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) around any method that trains.

    The inner method's losses are multiplied by ``1 - weight``, the distillation loss by ``weight``: at 0 this is the inner method.
    A network with several heads is distilled head by head, and the losses are added.
    """

    name = "kd"
    paper = "Hinton et al., Distilling the knowledge in a neural network, 2015, arXiv 1503.02531"
    fidelity = "paper"
    teacher = "float"

    class Params(Frozen):
        """Settings of distillation."""

        weight: float = Field(0.5, ge=0, le=1, description="share of the distillation loss")
        temperature: float = Field(4.0, gt=0, le=100)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's and ``kd``."""
        weight, temperature = self.params.weight, self.params.temperature
        inner = {name: (1 - weight) * loss for name, loss in self.inner.losses(out, batch).items()}
        student, teacher = self.task.heads(out.logits), self.task.heads(out.teacher["float"].logits)
        distilled = sum(distillation_loss(student[head], teacher[head], temperature) for head in student)
        return inner | {"kd": weight * distilled}
