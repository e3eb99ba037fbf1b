"""Logit adjustment: what the training set says of how often a class occurs is taken out of the decision (Menon et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.method import Out, Wrapper
from ..bench.spec import Frozen
from ..bench.task import Task

if TYPE_CHECKING:
    from ..bench.data import Batch


def log_counts(counts: Sequence[float]) -> Tensor:
    """``log n``, float [classes]; a class without a training image counts as one with one image."""
    n = torch.tensor(counts, dtype=torch.float64)
    return torch.where(n > 0, n, 1.0).log().float()


def on_classes(adjustment: Tensor, task: Task) -> Tensor:
    """What is added to all logits if [classes] is added to those of the classes: 0 for a second head. float [outputs]."""
    return F.pad(adjustment, (0, len(task.superclasses)))


class LogitAdjust(Wrapper):
    """Logit adjustment (Menon et al. 2021, arXiv 2007.07314) around any method that trains.

    pi is a class's share of the images that training draws, see `Task.class_sizes`.
    ``form="loss"`` trains with ``CE(f + tau log pi, y)`` (Eq. 10) and predicts by f; ``form="posthoc"`` trains as the inner method
    does and predicts by ``f - tau log pi`` (Eq. 9). With both, a class would be adjusted for twice. A head of superclasses is left
    alone. In the form ``loss`` all of the inner method's losses see the adjusted logits: distillation belongs outside
    (``kd+logit-adjust``). Departure from public code: pi is of all classes, and one without an image has the share of one image.
    """

    name = "logit-adjust"
    paper = "Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv 2007.07314"
    version = 2  # 2: domains of unequal size count alike, as in the batches
    fidelity = "paper"
    default_inner = "lsq"
    alters = frozenset({"logits"})

    adjustment: Tensor

    class Params(Frozen):
        """Settings of logit adjustment."""

        form: Literal["loss", "posthoc"] = Field(
            "loss", description="where logits are adjusted: in training, or in use"
        )
        tau: float = Field(1.0, ge=0, le=10, description="how far; 0: not at all")

    def prepare(self, net: nn.Module) -> None:
        """``tau log pi``."""
        log_prior = F.log_softmax(log_counts(self.task.class_sizes), dim=0)
        self.register_buffer("adjustment", on_classes(self.params.tau * log_prior, self.task), persistent=False)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's, on adjusted logits in the form ``loss``."""
        if self.params.form == "loss":
            out = replace(out, logits=out.logits + self.adjustment)
        return self.inner.losses(out, batch)

    def predict(self, net: nn.Module, batch: Batch) -> Tensor:
        """The inner method's, adjusted in the form ``posthoc``."""
        logits = self.inner.predict(net, batch)
        return logits - self.adjustment if self.params.form == "posthoc" else logits
