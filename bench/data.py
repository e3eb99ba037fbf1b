"""Batches: every training domain in each one, whole-batch augmentation, exact reproduction from (data, seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from .augment import AUGMENTS, Normalise, centre, find_augment
from .dataset import DataSet, Domain, Loaded, find_data, open_data
from .errors import RunFailed, UserError
from .images import Encoded
from .splits import Protocol, Split, generator, hash_splits, make_splits, parse_protocol
from .stream import channels_last, gather, gather_each
from .task import Task

__all__ = [
    "AUGMENTS",
    "Batch",
    "DataModule",
    "DataSet",
    "Domain",
    "Loaded",
    "Protocol",
    "Split",
    "find_data",
    "hash_splits",
    "make_splits",
    "open_data",
    "parse_protocol",
]

EVAL_BATCH = 128
MOMENT_IMAGES = 2048  # a domain, from which mean and deviation are taken if its images are streamed


@dataclass
class Batch:
    """Images with their labels and domains. In a training batch of D domains, sample j is of domain j % D."""

    x: Tensor  # float [B, C, H, W], normalised, channels_last
    y: Tensor  # int64 [B]
    domain: Tensor  # int64 [B]: index in task.domains; -1: unseen in training
    views: tuple[Tensor, ...] = ()  # the same images, augmented again

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Batch:
        """This batch on `device`."""
        views = tuple(v.to(device) for v in self.views)
        return Batch(self.x.to(device), self.y.to(device), self.domain.to(device), views)

    def select(self, which: Tensor) -> Batch:
        """The samples of a mask or an index."""
        return Batch(self.x[which], self.y[which], self.domain[which], tuple(v[which] for v in self.views))

    def by_domain(self) -> Iterator[tuple[int, Batch]]:
        """The part of each domain that is present."""
        for d in self.domain.unique().tolist():
            yield d, self.select(self.domain == d)

    def chunk(self, n: int) -> list[Batch]:
        """`n` micro-batches, each with the same share of each domain (give or take one image, if it does not divide)."""
        if n == 1:
            return [self]
        present, index = self.domain.unique(return_inverse=True)
        seen = torch.nn.functional.one_hot(index, len(present)).cumsum(0)
        least = int(seen[-1].min())
        if least < n:
            raise UserError(
                f"cannot accumulate over {n} parts: a batch has only {least} images of a domain; raise batch"
            )
        place = seen.gather(1, index[:, None]).flatten() - 1  # of each sample among those of its domain
        part = place * n // seen[-1][index]
        return [self.select(part == k) for k in range(n)]


@dataclass(frozen=True)
class _Loader:
    """An iterable with a length, which is all that Lightning asks for; each pass calls `batches` anew."""

    batches: Callable[[], Iterator[Batch]]
    length: int

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def __len__(self) -> int:
        return self.length


class DataModule(L.LightningDataModule):
    """The images of one run: a data set under a protocol, split by a seed.

    Set `epoch` before each pass over `train_dataloader()`: order and augmentation are drawn from (data, seed, epoch) and
    nothing else. Test images are reached through `open_test()` only, which the runner calls once, when training has ended.
    """

    sampler: Literal["instance", "class_balanced"] = "instance"

    def __init__(
        self,
        loaded: Loaded,
        protocol: str | None,
        seed: int,
        batch: int,
        augment: str = "default",
        views: int = 1,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__()
        self.loaded, self.seed, self.batch, self.views, self.rank, self.world = loaded, seed, batch, views, rank, world
        self.device = torch.device(device)
        self.protocol = parse_protocol(protocol, loaded.names)
        self.augment = find_augment(augment, loaded.augment)
        self.splits = make_splits(loaded, seed)
        self.split_hash = hash_splits(self.splits)
        self.epoch = 0
        self.training_ended = self._test_opened = False
        self.val_domains = tuple(d for d in self.protocol.train if len(self.splits[d].val))
        self.test_domains = self.protocol.test + self.protocol.also
        train = self.protocol.train
        self.share = max(1, batch // len(train) // world)  # of one domain, in this rank's batch
        self.steps = math.ceil(sum(len(self.splits[d].train) for d in train) / batch)
        self._images = {d: self._on_device(loaded[d].images) for d in train}
        self._labels = {d: loaded[d].labels.to(self.device) for d in train}
        self._domain = torch.arange(len(train), device=self.device).repeat(self.share)
        self.mean, self.std = self._moments()
        height, width = loaded.size
        self._normalise = Normalise(self.mean, self.std, height * width)
        self.task = make_task(loaded, self.protocol, self.splits)

    def train_dataloader(self) -> _Loader:
        """Augmented training batches of the current `epoch`."""
        return _Loader(self._train_batches, self.steps)

    def val_dataloader(self) -> list[_Loader]:
        """One loader for each of `val_domains`."""
        return [self._evaluation(d, self.splits[d].val) for d in self.val_domains]

    def open_test(self) -> list[_Loader]:
        """One loader for each of `test_domains`; to be called once, at the end, by the runner.

        Raises:
            RunFailed: Training has not ended, or the test split has been opened before.
        """
        if not self.training_ended or self._test_opened:
            raise RunFailed("the test split was asked for: the runner alone opens it, once, when training has ended")
        self._test_opened = True
        return [self._evaluation(d, self.splits[d].test) for d in self.test_domains]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches are made on the device."""
        return batch

    def probe(self, n: int) -> Batch:
        """`n` training images without augmentation, the same share of each domain, drawn from (data, seed)."""
        share = max(1, n // len(self.protocol.train))
        rng = generator("probe", self.loaded.name, self.seed)
        rows = torch.stack([_cycle(self.splits[d].train, share, rng) for d in self.protocol.train], 1)
        x = next(self._pixels(rows[None], workers=0))
        domain = torch.arange(len(self.protocol.train), device=self.device).repeat(share)
        return Batch(self._seen(x), self._labels_of(rows), domain)

    def train_batches(self, batch: int) -> Iterator[Batch]:
        """Every training image exactly once, without augmentation, domain after domain."""
        for name in self.protocol.train:
            yield from self._evaluation(name, self.splits[name].train, batch)

    def _train_batches(self) -> Iterator[Batch]:
        # The whole world's batches are drawn and each rank takes its rows, so two ranks together see what one process would.
        key = (self.loaded.name, self.seed, self.epoch)
        rows = slice(self.rank * self.share, (self.rank + 1) * self.share)
        order = self._order(generator("order", *key))[:, rows]
        # A generator each, so that the first view is the same whatever the number of views.
        rngs = [generator("view", *key, v) for v in range(self.views)]
        draws = (self.share * self.world, len(self.protocol.train), self.augment.columns)
        stored, crop = self._stored(), self.loaded.size
        for step, x in enumerate(self._pixels(order)):
            seen = []
            for rng in rngs:
                drawn = self.augment.draw(draws[0] * draws[1], rng, stored, crop).view(draws)[rows].flatten(0, 1)
                seen.append(self._normalise(self.augment.apply(x, drawn.to(self.device), crop)))
            yield Batch(seen[0], self._labels_of(order[step]), self._domain, tuple(seen[1:]))

    def _stored(self) -> tuple[int, int]:
        height, width = self.loaded.domains[0].images.shape[2:]
        return height, width

    def _seen(self, x: Tensor) -> Tensor:
        """Pixels as a network sees them without augmentation."""
        return self._normalise(centre(x, self.loaded.size))

    def _order(self, rng: torch.Generator) -> Tensor:
        """Image indices [steps, share of all ranks, domains] of one epoch."""
        rows = self.share * self.world
        draw = _balanced if self.sampler == "class_balanced" else _cycle
        columns = []
        for name in self.protocol.train:
            train = self.splits[name].train
            labels = self.loaded[name].labels[train]
            columns.append(draw(train, self.steps * rows, rng, labels))
        return torch.stack(columns, 1).view(self.steps, rows, -1)

    def _pixels(self, order: Tensor, workers: int | None = None) -> Iterator[Tensor]:
        """Pixels [share * D, H, W, C] for each of the index lists [steps, share, D], domains interleaved."""
        images = [self._images[d] for d in self.protocol.train]
        return (x.to(self.device, non_blocking=True) for x in gather_each(images, order, workers))

    def _labels_of(self, rows: Tensor) -> Tensor:
        """Labels [share * D] of image indices [share, D]."""
        columns = zip(self.protocol.train, rows.to(self.device).unbind(1), strict=True)
        return torch.stack([self._labels[d].index_select(0, i) for d, i in columns], 1).flatten()

    def _on_device(self, images: Tensor | Encoded) -> Tensor | Encoded:
        """Pixels [N, H, W, C] where the network is; what is still encoded stays where it is."""
        images = channels_last(images)
        return images if isinstance(images, Encoded) else images.to(self.device)

    def _evaluation(self, name: str, indices: Tensor, batch: int = EVAL_BATCH) -> _Loader:
        known = self.protocol.train.index(name) if name in self.protocol.train else -1
        domain = self.loaded[name]
        parts = indices.split(batch)

        def batches() -> Iterator[Batch]:
            images = channels_last(domain.images)
            for part, x in zip(parts, gather_each([images], [p[:, None] for p in parts]), strict=True):
                y = domain.labels[part].to(self.device)
                yield Batch(self._seen(x.to(self.device)), y, torch.full_like(y, known))

        return _Loader(batches, math.ceil(len(indices) / batch))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel over the training images, each domain weighing the same, as it does in the batches."""
        mean, square = 0.0, 0.0
        for name in self.protocol.train:
            images, total, total2 = channels_last(self.loaded[name].images), 0, 0
            train = self.splits[name].train
            if isinstance(images, Encoded):
                train = _cycle(train, min(MOMENT_IMAGES, len(train)), generator("moments", self.loaded.name, self.seed))
            for part in train.split(1024):  # integer sums are exact: the result does not depend on the cutting
                x = gather(images, part).flatten(0, 2)
                total = total + x.sum(0, dtype=torch.int64)
                total2 = total2 + x.int().square_().sum(0, dtype=torch.int64)
            count = len(train) * math.prod(self._stored())
            mean = mean + total / count / len(self.protocol.train)
            square = square + total2 / count / len(self.protocol.train)
        mean, square = torch.as_tensor(mean).double(), torch.as_tensor(square).double()
        std = (square - mean**2).clamp(min=1.0).sqrt()  # at least one grey level: a channel may be constant
        return (mean / 255).float().to(self.device), (std / 255).float().to(self.device)


def make_task(loaded: Loaded, protocol: Protocol, splits: dict[str, Split]) -> Task:
    """What a method may know of the task: nothing of validation or test images."""
    labels = [loaded[d].labels[splits[d].train] for d in protocol.train]
    by_domain = tuple(tuple(torch.bincount(y, minlength=len(loaded.classes)).tolist()) for y in labels)
    return Task(
        "classification",
        loaded.classes,
        tuple(map(sum, zip(*by_domain, strict=True))),
        protocol.train,
        superclasses=loaded.superclasses,
        superclass=loaded.superclass,
        groups=protocol.groups,
        domain_counts=by_domain,
    )


def _cycle(indices: Tensor, n: int, rng: torch.Generator, labels: Tensor | None = None) -> Tensor:
    """`n` of `indices` in random order, each used as often as any other, give or take one."""
    rounds = [torch.randperm(len(indices), generator=rng) for _ in range(math.ceil(n / len(indices)))]
    return indices[torch.cat(rounds)[:n]]


def _balanced(indices: Tensor, n: int, rng: torch.Generator, labels: Tensor) -> Tensor:
    """`n` of `indices`: first a class, each as likely as any other that is present, then one of its images."""
    counts = torch.bincount(labels)
    present = counts.nonzero().flatten()
    chosen = present[torch.randint(len(present), (n,), generator=rng)]
    within = (torch.rand(n, generator=rng, dtype=torch.float64) * counts[chosen]).long()
    return indices[labels.argsort(stable=True)[(counts.cumsum(0) - counts)[chosen] + within]]
