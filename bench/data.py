"""Batches: every training domain in each one, whole-batch augmentation, exact reproduction from (data, seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from .augment import AUGMENTS, Normalise, find_augment
from .dataset import DataSet, Domain, Loaded, open_data
from .errors import UserError
from .splits import Protocol, Split, generator, hash_splits, make_splits, parse_protocol
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
    "hash_splits",
    "make_splits",
    "open_data",
    "parse_protocol",
]

EVAL_BATCH = 128


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
    nothing else. Test images are reached through `open_test()` only.
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
        self.val_domains = self.protocol.train
        self.test_domains = self.protocol.test + self.protocol.also
        train = self.protocol.train
        self.share = max(1, batch // len(train) // world)  # of one domain, in this rank's batch
        self.steps = math.ceil(sum(len(self.splits[d].train) for d in train) / batch)
        self._images = {d: loaded[d].images.permute(0, 2, 3, 1).to(self.device) for d in train}
        self._labels = {d: loaded[d].labels.to(self.device) for d in train}
        self._domain = torch.arange(len(train), device=self.device).repeat(self.share)
        self.mean, self.std = self._moments()
        height, width = loaded[train[0]].images.shape[2:]
        self._normalise = Normalise(self.mean, self.std, height * width)
        self.task = Task("classification", loaded.classes, self._class_counts(), train)

    def train_dataloader(self) -> _Loader:
        """Augmented training batches of the current `epoch`."""
        return _Loader(self._train_batches, self.steps)

    def val_dataloader(self) -> list[_Loader]:
        """One loader for each of `val_domains`."""
        return [self._evaluation(d, self.splits[d].val) for d in self.val_domains]

    def open_test(self) -> list[_Loader]:
        """One loader for each of `test_domains`; to be called once, at the end, by the runner."""
        return [self._evaluation(d, self.splits[d].test) for d in self.test_domains]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches are made on the device."""
        return batch

    def probe(self, n: int) -> Batch:
        """`n` training images without augmentation, the same share of each domain, drawn from (data, seed)."""
        share = max(1, n // len(self.protocol.train))
        rng = generator("probe", self.loaded.name, self.seed)
        rows = torch.stack([_cycle(self.splits[d].train, share, rng) for d in self.protocol.train], 1)
        x, y = self._gather(rows.to(self.device))
        domain = torch.arange(len(self.protocol.train), device=self.device).repeat(share)
        return Batch(self._normalise(x), y, domain)

    def train_batches(self, batch: int) -> Iterator[Batch]:
        """Every training image exactly once, without augmentation, domain after domain."""
        for name in self.protocol.train:
            yield from self._evaluation(name, self.splits[name].train, batch)

    def _train_batches(self) -> Iterator[Batch]:
        # The whole world's batches are drawn and each rank takes its rows, so two ranks together see what one process would.
        key = (self.loaded.name, self.seed, self.epoch)
        rows = slice(self.rank * self.share, (self.rank + 1) * self.share)
        order = self._order(generator("order", *key))[:, rows].to(self.device)
        # A generator each, so that the first view is the same whatever the number of views.
        rngs = [generator("view", *key, v) for v in range(self.views)]
        shape = (self.share * self.world, len(self.protocol.train), 3)
        for step in range(self.steps):
            x, y = self._gather(order[step])
            seen = []
            for rng in rngs:
                drawn = self.augment.draw(shape[0] * shape[1], rng).view(shape)[rows].reshape(-1, 3).to(self.device)
                seen.append(self._normalise(self.augment.apply(x, drawn)))
            yield Batch(seen[0], y, self._domain, tuple(seen[1:]))

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

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [share * D, H, W, C] and labels of image indices [share, D], domains interleaved."""
        columns = list(zip(self.protocol.train, rows.unbind(1), strict=True))
        x = torch.stack([self._images[d].index_select(0, i) for d, i in columns], 1)
        y = torch.stack([self._labels[d].index_select(0, i) for d, i in columns], 1)
        return x.flatten(0, 1), y.flatten()

    def _evaluation(self, name: str, indices: Tensor, batch: int = EVAL_BATCH) -> _Loader:
        known = self.protocol.train.index(name) if name in self.protocol.train else -1
        domain = self.loaded[name]

        def batches() -> Iterator[Batch]:
            for part in indices.split(batch):
                x = domain.images.permute(0, 2, 3, 1).index_select(0, part).to(self.device)
                y = domain.labels[part].to(self.device)
                yield Batch(self._normalise(x), y, torch.full_like(y, known))

        return _Loader(batches, math.ceil(len(indices) / batch))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel over the training images, each domain weighing the same, as it does in the batches."""
        mean, square = 0.0, 0.0
        for name in self.protocol.train:
            pixels, total, total2 = self.loaded[name].images.permute(0, 2, 3, 1), 0, 0
            train = self.splits[name].train
            for part in train.split(1024):  # integer sums are exact: the result does not depend on the cutting
                x = pixels.index_select(0, part).flatten(0, 2)
                total = total + x.sum(0, dtype=torch.int64)
                total2 = total2 + x.int().square_().sum(0, dtype=torch.int64)
            count = len(train) * pixels.shape[1] * pixels.shape[2]
            mean = mean + total / count / len(self.protocol.train)
            square = square + total2 / count / len(self.protocol.train)
        mean, square = torch.as_tensor(mean).double(), torch.as_tensor(square).double()
        std = (square - mean**2).clamp(min=1.0).sqrt()  # at least one grey level: a channel may be constant
        return (mean / 255).float().to(self.device), (std / 255).float().to(self.device)

    def _class_counts(self) -> tuple[int, ...]:
        labels = torch.cat([self.loaded[d].labels[self.splits[d].train] for d in self.protocol.train])
        return tuple(torch.bincount(labels, minlength=len(self.loaded.classes)).tolist())


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
