"""Which images train, validate and test: index lists with a hash, and the protocols over domains."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dataset import DataSet, Loaded
from .errors import UserError, nearest
from .longtail import tail_counts
from .seeds import seed_for

TEST_FRACTION = 0.2  # of a domain that has no official test part


def generator(purpose: str, *parts: str | int) -> torch.Generator:
    """A CPU generator for one purpose, seeded by what the draw may depend on."""
    return torch.Generator().manual_seed(seed_for(purpose, *parts))


@dataclass(frozen=True)
class Split:
    """Sorted index lists into the images of one domain; together they name no image twice."""

    train: Tensor
    val: Tensor
    test: Tensor


def make_splits(loaded: Loaded, seed: int) -> dict[str, Split]:
    """Split every domain, stratified by class, as (data set, seed) say.

    The official test part is used where there is one; elsewhere a fifth of the groups is drawn. Val (`loaded.params.val`)
    is cut from what is left. Whole groups move: images that come from one source are in the same part in every domain. A
    class keeps at least one training image. With `imbalance`, train and val together are the long-tailed list, and test is
    cut to equal classes; with `balance`, train and val are. `limit` bounds train and val together and leaves test whole.

    Raises:
        UserError: A domain has too few images, or the imbalance would empty a class that its rule keeps.
    """
    params = loaded.params
    rng = generator("split", loaded.name, seed)
    member, part = _draw_parts(loaded, params.val, rng)
    splits = {}
    for domain in loaded.domains:
        mine = part[member[domain.name]]
        train, val, test = ((mine == p).nonzero().flatten() for p in (_TRAIN, _VAL, _TEST))
        if params.imbalance is not None:
            train, val = _long_tail(train, val, domain.labels, len(loaded.classes), params, rng)
            test = _balanced(test, domain.labels, rng)
        if params.balance:
            train, val = (_balanced(part, domain.labels, rng) for part in (train, val))
        if params.limit is not None:
            most_val = max(1, round(params.limit * params.val)) if params.val else 0
            train = _limit(train, domain.labels, max(1, params.limit - most_val), rng)
            val = _limit(val, domain.labels, most_val, rng)
        if not (len(train) and len(test) and (len(val) or not params.val)):
            raise UserError(f"domain {domain.name!r} of {loaded.name!r} has too few images ({len(mine)}) to split")
        splits[domain.name] = Split(train, val, test)
    return splits


def hash_splits(splits: dict[str, Split]) -> str:
    """One sha256 over all index lists."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for kind in ("train", "val", "test"):
            indices = getattr(splits[name], kind)
            digest.update(f"{name}.{kind}:{len(indices)}:".encode() + indices.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


_TRAIN, _VAL, _TEST = 0, 1, 2


def _draw_parts(loaded: Loaded, val_fraction: float, rng: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the part of each group; returns (domain -> the group of each image, the part of each group)."""
    member, count = _number_groups(loaded)
    low = torch.full((count,), len(loaded.classes))  # the least label of each group
    high = torch.full((count,), -1)  # and the greatest: equal if the group has one class only
    where = torch.zeros(count, dtype=torch.int64)  # bit d: the group has images in domain d
    official_test = torch.zeros(count, dtype=torch.bool)
    official_train = torch.zeros(count, dtype=torch.bool)
    for d, domain in enumerate(loaded.domains):
        groups = member[domain.name]
        low.scatter_reduce_(0, groups, domain.labels, "amin")
        high.scatter_reduce_(0, groups, domain.labels, "amax")
        where[groups.unique()] |= 1 << d
        if domain.test is not None:
            is_test = torch.zeros(len(groups), dtype=torch.bool).index_fill_(0, domain.test, True)
            official_test[groups[is_test]] = True
            official_train[groups[~is_test]] = True
    if bool((official_test & official_train).any()):
        raise UserError(f"data set {loaded.name!r}: a group is in both an official test part and a training part")
    stratum = where * (len(loaded.classes) + 1) + torch.where(low == high, low, len(loaded.classes))
    part = torch.where(official_test, _TEST, _TRAIN)
    for pool, test_fraction in ((official_train, 0.0), (~official_test & ~official_train, TEST_FRACTION)):
        free = pool.nonzero().flatten()
        test = free[_draw(stratum[free], round(test_fraction * len(free)), rng)]
        part[test] = _TEST
        rest = free[part[free] == _TRAIN]
        part[rest[_draw(stratum[rest], round(val_fraction * len(free)), rng)]] = _VAL
    for domain in loaded.domains:
        groups, labels = member[domain.name], domain.labels
        for c in _untrained(part[groups], labels, len(loaded.classes)):  # a class of one image may have gone to test
            part[groups[(labels == c) & ~official_test[groups]][:1]] = _TRAIN
    return member, part


def _untrained(part: Tensor, labels: Tensor, classes: int) -> list[int]:
    """The classes that have images, but none to train on."""
    there = torch.bincount(labels, minlength=classes) > 0
    trains = torch.bincount(labels[part == _TRAIN], minlength=classes) > 0
    return (there & ~trains).nonzero().flatten().tolist()


def _number_groups(loaded: Loaded) -> tuple[dict[str, Tensor], int]:
    """The group of each image, numbered from 0 over all domains; an image without a group is one by itself."""
    start = 1 + max((int(d.group.max()) for d in loaded.domains if d.group is not None), default=-1)
    raw = []
    for domain in loaded.domains:
        if domain.group is None:
            raw.append(torch.arange(start, start + len(domain.labels)))
            start += len(domain.labels)
        else:
            raw.append(domain.group)
    unique, dense = torch.cat(raw).unique(return_inverse=True)
    sizes = [len(d.labels) for d in loaded.domains]
    return dict(zip(loaded.names, dense.split(sizes), strict=True)), len(unique)


def _draw(stratum: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """A random mask of `k` items in which each stratum has its proportional share, give or take one."""
    n = len(stratum)
    mask = torch.zeros(n, dtype=torch.bool)
    if n == 0:
        return mask
    shuffled = torch.randperm(n, generator=rng)
    order = shuffled[stratum[shuffled].argsort(stable=True)]
    i = torch.arange(n)
    mask[order[(i + 1) * k // n > i * k // n]] = True  # k items at equal distances along the strata
    return mask


def _limit(indices: Tensor, labels: Tensor, most: int, rng: torch.Generator) -> Tensor:
    return indices if len(indices) <= most else indices[_draw(labels[indices], most, rng)]


def _long_tail(
    train: Tensor, val: Tensor, labels: Tensor, classes: int, params: DataSet.Params, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the long-tailed list keeps of train and val; together they have exactly the list's counts."""
    assert params.imbalance is not None
    available = torch.bincount(labels[torch.cat([train, val])], minlength=classes).tolist()
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c, n in enumerate(tail_counts(available, params.imbalance, params.lt_list)):
        mine, held = train[labels[train] == c], val[labels[val] == c]
        n_val = max(min(round(params.val * n), len(held)), n - len(mine))
        for indices, k, out in ((mine, n - n_val, kept[0]), (held, n_val, kept[1])):
            out.append(indices[torch.randperm(len(indices), generator=rng)[:k]])
    return torch.cat(kept[0]).sort().values, torch.cat(kept[1]).sort().values


def _balanced(indices: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """As many images of each class as the smallest one has."""
    mine = labels[indices]
    least = int(torch.bincount(mine)[mine.unique()].min()) if len(mine) else 0
    parts = [indices[mine == c] for c in mine.unique()]
    kept = [part[torch.randperm(len(part), generator=rng)[:least]] for part in parts]
    return torch.cat([indices[:0], *kept]).sort().values


@dataclass(frozen=True)
class Protocol:
    """Which domains train (and validate), which are tested, by what the best epoch is chosen, and what is measured."""

    name: str  # canonical: two spellings of one protocol have one name
    train: tuple[str, ...]
    test: tuple[str, ...]
    also: tuple[str, ...] = ()  # tested and reported by domain, but no part of the protocol's mean
    metric: str = "acc"  # of validation, of which the best epoch has most
    groups: bool = False  # classes with many, a medium number of, and few training images are told apart


_KINDS = {"single": "single[:DOMAIN]", "mdl": "mdl", "lodo": "lodo:DOMAIN", "longtail": "longtail"}


def parse_protocol(text: str | None, domains: Sequence[str]) -> Protocol:
    """Read `single[:DOMAIN]`, `mdl`, `lodo:DOMAIN` or `longtail`; None is `mdl` if there are several domains, else `single`.

    `longtail` trains and tests on all domains and tells class groups apart; the best epoch is the one of the best balanced
    accuracy, since its validation images are as long-tailed as those that train, and its test images are not.

    Under `lodo` the held-out domain is tested on its test part, not on all its images: the same images as under `mdl`, and
    none of them comes from the source of a training image.
    """
    domains, first = tuple(domains), domains[0]
    if text is None:
        text = "mdl" if len(domains) > 1 else "single"
    kind, _, domain = text.partition(":")
    if kind not in _KINDS:
        raise UserError(f"no protocol {text!r}{nearest(kind, _KINDS)} ({', '.join(_KINDS.values())})")
    if ":" in text and domain not in domains:
        raise UserError(f"protocol {text!r}: no domain {domain!r}{nearest(domain, domains)}")
    if kind == "single":
        domain = domain or first
        return Protocol(f"single:{domain}", (domain,), (domain,))
    if kind == "longtail":
        if domain:
            raise UserError(f"protocol {text!r}: longtail trains on all domains; choose them with `domains`")
        return Protocol("longtail", domains, domains, metric="bacc", groups=True)
    if len(domains) < 2:
        raise UserError(f"protocol {text!r} needs at least two domains, there is only {first!r}; use 'single'")
    if kind == "mdl":
        if domain:
            raise UserError(f"protocol {text!r}: mdl trains on all domains; use 'mdl' or 'single:{domain}'")
        return Protocol("mdl", domains, domains)
    if not domain:
        raise UserError(f"protocol 'lodo' needs the domain to leave out: {' or '.join(f'lodo:{d}' for d in domains)}")
    seen = tuple(d for d in domains if d != domain)
    return Protocol(f"lodo:{domain}", seen, (domain,), seen)
