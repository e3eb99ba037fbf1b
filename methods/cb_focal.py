"""Class-balanced focal loss: rare classes and images that are not yet learned weigh more (Cui et al. 2019, Lin et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.method import Out, Wrapper
from ..bench.spec import Frozen

if TYPE_CHECKING:
    from ..bench.data import Batch


def class_balanced(counts: Sequence[float], beta: float) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n)`` (Cui et al., Eq. 2), float [classes], with a mean of 1 over the classes that occur.

    A class without a training image has the weight 0; without one, the weights sum up to the number of classes.
    """
    n = torch.tensor(counts, dtype=torch.float64)
    weight = torch.where(n > 0, (1 - beta) / (1 - beta ** torch.where(n > 0, n, 1.0)), 0.0)
    return (weight * (n > 0).sum() / weight.sum()).float()


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """``(1 - p)^gamma * CE`` of each image, float [B]; p is the probability of its class (Lin et al., Eq. 4).

    Args:
        logits: float [B, classes].
        labels: int64 [B].
        gamma: How much less an image counts whose class is likely already.
    """
    loss = F.cross_entropy(logits, labels, reduction="none")
    wrong = (-torch.expm1(-loss)).clamp(min=1e-12)  # 1 - p; at 0 the gradient of a root would be infinite
    return wrong**gamma * loss


class CBFocal(Wrapper):
    """Class-balanced focal loss (Cui et al. 2019, arXiv 1901.05555; Lin et al. 2017, arXiv 1708.02002) around a method that trains.

    The task's loss becomes the mean over the batch of ``w_y (1 - p_y)^gamma CE``; ``gamma=0`` leaves class-balanced cross-entropy,
    ``beta=0`` the focal loss. n is `Task.class_sizes`. The inner method's other losses and a head of superclasses are left alone.

    Departures: gamma is 1 as in the repository of LDAM, not 0.5 to 2 by data set; p is the probability itself, where that
    repository takes ``exp(-w CE)`` for it; the softmax has the focal factor, where Cui et al. use a sigmoid for each class.
    """

    name = "cb-focal"
    paper = "Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019, arXiv 1901.05555"
    version = 2  # 2: domains of unequal size count alike, as in the batches
    fidelity = "paper"
    default_inner = "lsq"
    alters = frozenset({"loss"})

    weight: Tensor

    class Params(Frozen):
        """Settings of the class-balanced focal loss."""

        beta: float = Field(
            0.9999, ge=0, lt=1, description="how fast more images of a class stop to count; 0: weights of 1"
        )
        gamma: float = Field(1.0, ge=0, le=10, description="how much less what is learned counts; 0: no less")

    def prepare(self, net: nn.Module) -> None:
        """The classes' weights."""
        self.register_buffer("weight", class_balanced(self.task.class_sizes, self.params.beta), persistent=False)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's, with another ``task``."""
        each = focal(self.task.heads(out.logits)[""], batch.y, self.params.gamma)
        return self.inner.losses(out, batch) | {"task": (self.weight[batch.y] * each).mean()}
