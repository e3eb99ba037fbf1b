"""What is learned: the loss, the metrics, and what a method may know of the data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error, multiclass_stat_scores

from .longtail import shots

if TYPE_CHECKING:
    from .data import Batch

ECE_BINS = 15  # of equal width


@dataclass(frozen=True)
class Task:
    """A classification task, as far as a method may know it: everything is of the training split only.

    Attributes:
        kind: ``classification``.
        classes: Names of the classes.
        class_counts: Training images of each class.
        domains: Names of the training domains; a batch's ``domain`` indexes them.
        superclasses: Names of the superclasses, which a second head predicts; empty: there is one head.
        superclass: The superclass of each class, by number.
        groups: Whether classes with many, medium and few training images are measured apart.
        domain_counts: Training images of each class in each domain; empty: not told, one domain.
    """

    kind: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    domains: tuple[str, ...]
    superclasses: tuple[str, ...] = ()
    superclass: tuple[int, ...] = ()
    groups: bool = False
    domain_counts: tuple[tuple[int, ...], ...] = ()

    @property
    def class_sizes(self) -> tuple[float, ...]:
        """How often each class is met in training, as images of as many as there are: the classes' prior times all images.

        Batches draw equal shares of the domains, so the prior is the mean over domains of ``n_dc / N_d``, and not the share of a
        class among all images; with one domain, or domains of one size, these are `class_counts`, to the bit.
        """
        images = [sum(counts) for counts in self.domain_counts]
        if len(set(images)) < 2:
            return self.class_counts
        whole = sum(images) / len(images)
        return tuple(
            whole * math.fsum(n / size for n, size in zip(column, images, strict=True))
            for column in zip(*self.domain_counts, strict=True)
        )

    @property
    def outputs(self) -> int:
        """Width of the network's output: all heads, side by side."""
        return len(self.classes) + len(self.superclasses)

    def heads(self, logits: Tensor) -> dict[str, Tensor]:
        """The logits of each head: ``""``, float [B, classes], and with superclasses ``coarse``, float [B, superclasses]."""
        if not self.superclasses:
            return {"": logits}
        return {"": logits[:, : len(self.classes)], "coarse": logits[:, len(self.classes) :]}

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The task's own loss: cross-entropy, of each head. ``logits``: float [B, outputs]."""
        heads = self.heads(logits)
        losses = {"task": F.cross_entropy(heads[""], batch.y)}
        if self.superclasses:
            losses["coarse"] = F.cross_entropy(heads["coarse"], _table(self.superclass, batch.y.device)[batch.y])
        return losses

    def meter(self, device: torch.device | str) -> Meter:
        """A fresh meter for one domain, of logits on ``device``."""
        return Meter(self, device)


class Meter:
    """What is measured on one domain, gathered over batches."""

    def __init__(self, task: Task, device: torch.device | str) -> None:
        self._task = task
        self._superclass = _table(task.superclass, torch.device(device))
        self._seen: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch, without waiting for the device. ``logits``: float [B, outputs], labels: int64 [B]."""
        heads = self._task.heads(logits.float())
        log_p = F.log_softmax(heads[""], dim=1)
        seen = [labels, heads[""].argmax(1), log_p.amax(1).exp(), F.nll_loss(log_p, labels, reduction="none")]
        if "coarse" in heads:
            seen.append(heads["coarse"].argmax(1) == self._superclass[labels])
        self._seen.append(tuple(seen))

    def compute(self) -> dict[str, float]:
        """What the batches add up to; all but the loss are from 0 to 1.

        - ``acc``: share of images that are right; ``acc_coarse``: the same of the superclasses.
        - ``loss``: cross-entropy of the classes, nats an image.
        - ``bacc``: mean recall of the classes that are present.
        - ``acc_many``, ``acc_medium``, ``acc_few``: the same of the classes with so many training images, if the task has groups.
        - ``ece``: expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean distance between the highest
          probability and the accuracy, in bins of that probability.
        """
        labels, predicted, confidence, loss, *coarse = self._gather()
        right, recalls = predicted == labels, self.per_class()
        ece = binary_calibration_error(confidence.double(), right, n_bins=ECE_BINS, norm="l1", validate_args=False)
        found = {"acc": _mean(right), "loss": _mean(loss)}
        found["ece"] = float(ece) if bool(confidence.isfinite().all()) else float("nan")
        groups = shots(self._task.class_counts) if self._task.groups else {}
        for name, classes in {"bacc": range(len(recalls)), **{f"acc_{k}": v for k, v in groups.items()}}.items():
            present = [recall for c in classes if (recall := recalls[c]) is not None]
            if present:
                found[name] = sum(present) / len(present)
        if coarse:
            found["acc_coarse"] = _mean(coarse[0])
        return found

    def per_class(self) -> list[float | None]:
        """The recall of each class: the share of its images that are right; None if it has no image here."""
        labels, predicted, *_ = self._gather()
        scores = multiclass_stat_scores(
            predicted, labels, len(self._task.classes), average=None, validate_args=False
        )  # int64 [classes, 5]: true and false positives, true and false negatives, images
        return [right / images if images else None for right, _, _, _, images in scores.tolist()]

    def _gather(self) -> list[Tensor]:
        """Labels, predictions, confidences, losses (and whether the superclass is right) of all images, on the CPU."""
        return [torch.cat(parts).cpu() for parts in zip(*self._seen, strict=True)]


def combine(domains: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    """Metrics of several domains under one prefix: each domain's own, their unweighted mean, and the worst accuracy.

    A metric that only some domains have (a group of classes may be absent) is averaged over those.

    >>> combine({"a": {"acc": 1.0}, "b": {"acc": 0.5}}, "test")
    {'test/acc': 0.75, 'test/acc/a': 1.0, 'test/acc/b': 0.5, 'test/acc_worst': 0.5}
    """
    names = dict.fromkeys(metric for values in domains.values() for metric in values)
    flat: dict[str, float] = {}
    for metric in names:
        known = {domain: values[metric] for domain, values in domains.items() if metric in values}
        flat[f"{prefix}/{metric}"] = sum(known.values()) / len(known)
        flat.update({f"{prefix}/{metric}/{domain}": value for domain, value in known.items()})
        if metric == "acc":
            flat[f"{prefix}/acc_worst"] = min(known.values())
    return flat


@functools.cache
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as a tensor that is on the device already: a copy in each step would wait for it."""
    with torch.inference_mode(False):  # the first to ask may be an evaluation, the next one trains
        return torch.tensor(numbers, dtype=torch.int64, device=device)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
