"""Balanced softmax: a softmax that knows how often each class was seen in training (Ren et al. 2020)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..bench.method import Out, Wrapper
from .logit_adjust import log_counts, on_classes

if TYPE_CHECKING:
    from ..bench.data import Batch


class BalancedSoftmax(Wrapper):
    """Balanced softmax (Ren et al. 2020, arXiv 2007.10740) around any method that trains: ``CE(f + log n, y)`` (Eq. 3 and 4).

    n are the training images of a class, at least 1; where domains differ in size, `Task.class_sizes`. Prediction is by f. Since
    ``log n`` is ``log pi`` and a constant, loss and gradient are those of `logit-adjust` with ``tau=1``. A head of superclasses is
    left alone. All of the inner method's losses see the adjusted logits: distillation belongs outside (``kd+balanced-softmax``).
    Left out: the meta sampler (BALMS).
    """

    name = "balanced-softmax"
    paper = "Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020, arXiv 2007.10740"
    version = 2  # 2: domains of unequal size count alike, as in the batches
    fidelity = "paper"
    default_inner = "lsq"
    alters = frozenset({"logits"})

    adjustment: Tensor

    def prepare(self, net: nn.Module) -> None:
        """``log n``."""
        adjustment = on_classes(log_counts(self.task.class_sizes), self.task)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's, on adjusted logits."""
        return self.inner.losses(replace(out, logits=out.logits + self.adjustment), batch)
