"""What is learned: the loss, the metrics, and what a method may know of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

if TYPE_CHECKING:
    from .data import Batch


@dataclass(frozen=True)
class Task:
    """A classification task, as far as a method may know it: everything is of the training split only.

    Attributes:
        kind: ``classification``.
        classes: Names of the classes.
        class_counts: Training images of each class.
        domains: Names of the training domains; a batch's ``domain`` indexes them.
    """

    kind: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    domains: tuple[str, ...]

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The task's own loss: cross-entropy. ``logits``: float [B, classes]."""
        return {"task": F.cross_entropy(logits, batch.y)}

    def meter(self, device: torch.device | str) -> Meter:
        """A fresh meter for one domain."""
        return Meter(len(self.classes), device)


class Meter:
    """Accuracy and loss of one domain, gathered over batches."""

    def __init__(self, classes: int, device: torch.device | str) -> None:
        accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self._metrics = MetricCollection({"acc": accuracy}).to(device)
        self._loss = MeanMetric().to(device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch. ``logits``: float [B, classes], labels: int64 [B]."""
        logits = logits.float()
        self._metrics.update(logits, labels)
        self._loss.update(F.cross_entropy(logits, labels), weight=labels.numel())

    def compute(self) -> dict[str, float]:
        """``acc`` (share of images, 0 to 1) and ``loss`` (nats an image)."""
        return {**{k: float(v) for k, v in self._metrics.compute().items()}, "loss": float(self._loss.compute())}


def combine(domains: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    """Metrics of several domains under one prefix: each domain's own, and their unweighted mean.

    >>> combine({"a": {"acc": 1.0}, "b": {"acc": 0.5}}, "test")
    {'test/acc': 0.75, 'test/acc/a': 1.0, 'test/acc/b': 0.5}
    """
    names = dict.fromkeys(metric for values in domains.values() for metric in values)
    flat: dict[str, float] = {}
    for metric in names:
        flat[f"{prefix}/{metric}"] = sum(values[metric] for values in domains.values()) / len(domains)
        flat.update({f"{prefix}/{metric}/{domain}": values[metric] for domain, values in domains.items()})
    return flat
