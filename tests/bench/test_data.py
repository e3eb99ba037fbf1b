"""Splits, protocols, batches and the prepared cache, on small data sets made here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench import disk
from qatbench.bench.data import (
    Batch,
    DataModule,
    DataSet,
    Domain,
    Loaded,
    hash_splits,
    make_splits,
    open_data,
    parse_protocol,
)
from qatbench.bench.disk import read_json, write_json
from qatbench.bench.errors import RunFailed, UserError
from qatbench.bench.longtail import RULES, tail_counts

CLASSES = ("a", "b", "c")


def toy(sizes=(60, 90), official=(), shared=False, **params) -> Loaded:
    """Domains of 2x3x4 images; the first pixels spell domain and index, so that a batch tells where its images come from."""
    domains = []
    for d, n in enumerate(sizes):
        images = torch.randint(0, 256, (n, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(d))
        images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 0, 2] = d, torch.arange(n) // 256, torch.arange(n) % 256
        test = torch.arange(n - n // 4, n) if d in official else None
        domains.append(Domain(f"d{d}", images, torch.arange(n) % 3, test, torch.arange(n) if shared else None))
    return Loaded("toy", domains, "0" * 64, CLASSES, params=DataSet.Params.model_validate(params))


def module(loaded: Loaded, protocol=None, seed=0, batch=10, augment="none", **more) -> DataModule:
    return DataModule(loaded, protocol, seed, batch, augment, **more)


def origins(data: DataModule, x: torch.Tensor) -> list[tuple[int, int]]:
    """(domain, index) of each image of a batch without augmentation."""
    pixels = (x * data.std[:, None, None] + data.mean[:, None, None]).mul(255).round().long()[:, 0, 0, :3]
    return [(d, hi * 256 + lo) for d, hi, lo in pixels.tolist()]


# -- splits -------------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(40, 300), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, official=st.sets(st.integers(0, 2)), seed=st.integers(0, 99))
def test_splits_are_disjoint_cover_everything_and_are_stratified(sizes, official, seed):
    """Broken if an image trains and tests, is lost, or a class is missing from a part."""
    loaded = toy(sizes, official)
    splits = make_splits(loaded, seed)
    for d, domain in enumerate(loaded.domains):
        s, n = splits[domain.name], len(domain.labels)
        assert torch.cat([s.train, s.val, s.test]).sort().values.tolist() == list(range(n))
        if d in official:
            assert s.test.tolist() == domain.test.tolist()
        for part, share in ((s.test, 0.25 if d in official else 0.2), (s.val, 0.075 if d in official else 0.1)):
            counts = torch.bincount(domain.labels[part], minlength=3)
            assert (counts - share * n / 3).abs().max() <= 2
    assert hash_splits(splits) == hash_splits(make_splits(loaded, seed))
    assert hash_splits(splits) != hash_splits(make_splits(loaded, seed + 1))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(40, 200), official=st.booleans(), seed=st.integers(0, 99))
def test_images_of_one_source_share_a_part_in_all_domains(n, official, seed):
    """Broken if a network is tested on a digit that it trained on in another dress."""
    loaded = toy((n, n), {0, 1} if official else (), shared=True)
    one, two = make_splits(loaded, seed).values()
    for part in ("train", "val", "test"):
        assert getattr(one, part).tolist() == getattr(two, part).tolist()


def test_group_of_many_classes_moves_as_one():
    """Broken if a font is in both training and test."""
    loaded = toy((120,))
    d = loaded.domains[0]
    group = torch.arange(120) // 6
    split = make_splits(Loaded("toy", [Domain("d0", d.images, d.labels, None, group)], "", CLASSES), 0)["d0"]
    parts = [set(group[p].tolist()) for p in (split.train, split.val, split.test)]
    assert [len(p) for p in parts] == [14, 2, 4]
    assert len(set.union(*parts)) == 20


def test_group_in_official_test_and_training_is_refused():
    """Broken if official parts that leak into each other are used silently."""
    one, two = toy((40, 40), {0}, shared=True).domains
    two = Domain(two.name, two.images, two.labels, torch.arange(10), two.group)
    with pytest.raises(UserError, match="both"):
        make_splits(Loaded("toy", [one, two], "", CLASSES), 0)


@pytest.mark.parametrize("limit", [1, 7, 50, 10_000])
def test_limit_bounds_training_only(limit):
    """Broken if `limit` shrinks the test part, or lets more images train than it says."""
    whole, split = make_splits(toy((300,), {0}), 3)["d0"], make_splits(toy((300,), {0}, limit=limit), 3)["d0"]
    assert split.test.tolist() == whole.test.tolist()
    assert len(split.train) + len(split.val) == max(2, min(limit, 225))  # at least one of each
    assert set(split.train.tolist()) <= set(whole.train.tolist())
    assert set(split.val.tolist()) <= set(whole.val.tolist())
    if limit == 50:
        assert torch.bincount(toy((300,)).domains[0].labels[split.train]).tolist() == [15, 15, 15]


def test_too_few_images_is_one_line():
    """Broken if a domain of two images gives an empty loader in mid-run."""
    with pytest.raises(UserError, match=r"'d0' of 'toy' has too few images \(2\)"):
        make_splits(toy((2,)), 0)


def test_a_class_of_one_image_trains():
    """Broken if the only image of a class is tested, so that nothing can learn the class."""
    for seed in range(30):
        d = toy((60,)).domains[0]
        labels = torch.cat([torch.arange(59) % 2, torch.tensor([2])])
        split = make_splits(Loaded("toy", [Domain("d0", d.images, labels)], "", CLASSES), seed)["d0"]
        assert 59 in split.train.tolist()


def test_without_val_everything_trains():
    """Broken if `val=0` loses images, or leaves some to validation."""
    split = make_splits(toy((300,), {0}, val=0), 3)["d0"]
    assert (len(split.train), len(split.val), len(split.test)) == (225, 0, 75)
    assert module(toy((300,), val=0)).val_dataloader() == []


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(150, 400), min_size=1, max_size=2),
    official=st.sets(st.integers(0, 1)),
    shared=st.booleans(),
    imbalance=st.floats(1, 20),
    rule=st.sampled_from(RULES),
    val=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 99),
)
def test_a_long_tailed_list_has_its_counts_and_a_balanced_test(sizes, official, shared, imbalance, rule, val, seed):
    """Broken if train and val together are not the list, the tested classes are unequal, or an image is in two parts."""
    if shared:
        sizes, official = [sizes[0]] * len(sizes), {0, 1} if official else set()
    plain = make_splits(toy(sizes, official, shared, val=val), seed)
    loaded = toy(sizes, official, shared, val=val, imbalance=imbalance, lt_list=rule)
    for name, split in make_splits(loaded, seed).items():
        labels = loaded[name].labels
        counts = lambda rows: torch.bincount(labels[rows], minlength=3)  # noqa: B023, E731
        pool = torch.cat([plain[name].train, plain[name].val])
        listed = torch.cat([split.train, split.val])
        assert counts(listed).tolist() == tail_counts(counts(pool).tolist(), imbalance, rule)
        assert bool(len(split.val)) == bool(val)
        assert counts(split.test).tolist() == [counts(plain[name].test).min()] * 3
        for part in ("train", "val", "test"):
            assert set(getattr(split, part).tolist()) <= set(getattr(plain[name], part).tolist())


def test_an_imbalance_that_empties_a_class_names_the_largest_that_does_not():
    """Broken if a class vanishes silently under the rule that keeps every class."""
    with pytest.raises(UserError, match="imbalance=75"):
        make_splits(toy((300,), {0}, imbalance=500.0), 0)
    split = make_splits(toy((300,), {0}, imbalance=20_000.0, lt_list="climbq"), 0)["d0"]
    assert torch.bincount(toy((300,)).domains[0].labels[split.train], minlength=3)[2] == 0


# -- protocols ----------------------------------------------------------------------------------------------------------


def test_protocols():
    """Broken if a protocol trains on a held-out domain, or two spellings of one protocol are two cells."""
    abc = ("a", "b", "c")
    assert parse_protocol(None, abc).name == "mdl"
    assert parse_protocol(None, ("a",)).name == parse_protocol("single", abc).name == "single:a"
    single, lodo = parse_protocol("single:b", abc), parse_protocol("lodo:b", abc)
    assert (single.train, single.test, single.also) == (("b",), ("b",), ())
    assert (lodo.train, lodo.test, lodo.also) == (("a", "c"), ("b",), ("a", "c"))
    tail = parse_protocol("longtail", abc)
    assert (tail.train, tail.test, tail.metric, tail.groups) == (abc, abc, "bacc", True)


@pytest.mark.parametrize(
    ("text", "domains", "says"),
    [
        ("mld", "ab", "mean 'mdl'"),
        ("lodo", "ab", "lodo:a or lodo:b"),
        ("lodo:x", "ab", "no domain 'x'"),
        ("single:", "ab", "no domain ''"),
        ("mdl:a", "ab", "single:a"),
        ("longtail:a", "ab", "domains"),
        ("mdl", "a", "at least two"),
        ("lodo:a", "a", "at least two"),
        ("", "ab", "no protocol ''"),
    ],
)
def test_wrong_protocols_say_how_to_mend_them(text, domains, says):
    """Broken if a misspelt protocol trains something else."""
    with pytest.raises(UserError, match=says):
        parse_protocol(text, tuple(domains))


# -- batches ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=sizes, batch=st.integers(1, 70), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_every_batch_has_equal_shares_and_an_epoch_has_its_steps(sizes, batch, seed, epoch):
    """Broken if a domain is missing from a batch, or the number of steps depends on anything but the sizes."""
    data = module(toy(sizes), seed=seed, batch=batch)
    data.epoch = epoch
    batches = list(data.train_dataloader())
    total = sum(len(s.train) for s in data.splits.values())
    assert len(batches) == len(data.train_dataloader()) == data.steps == -(-total // batch)
    used: Counter[tuple[int, int]] = Counter()
    for b in batches:
        assert b.domain.tolist() == list(range(len(sizes))) * max(1, batch // len(sizes))
        where = origins(data, b.x)
        assert [d for d, _ in where] == b.domain.tolist()
        assert [i % 3 for _, i in where] == b.y.tolist()
        used.update(where)
    for d in range(len(sizes)):  # small domains cycle: no image is used twice more often than another
        train = data.splits[f"d{d}"].train.tolist()
        counts = [used[d, i] for i in train]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == sum(n for (e, _), n in used.items() if e == d)


@pytest.mark.parametrize("sampler", ["instance", "class_balanced"])
def test_an_epoch_is_reproduced_exactly_whatever_came_before(sampler):
    """Broken if a resumed run sees other batches than an uninterrupted one."""

    def epoch(data: DataModule, number: int) -> list[Batch]:
        data.sampler, data.epoch = sampler, number
        return list(data.train_dataloader())

    old, fresh = (module(toy(), augment="crop-flip", views=2) for _ in range(2))
    first, _ = epoch(old, 0), epoch(old, 1)
    torch.manual_seed(5)
    again, new = epoch(old, 2), epoch(fresh, 2)
    for a, b in zip(again, new, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.views[0], b.views[0])
        assert torch.equal(a.y, b.y)
    assert not torch.equal(first[0].x, again[0].x)


def test_global_random_state_is_neither_read_nor_moved():
    """Broken if a method that draws random numbers changes the data of its run."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    data = module(toy(), augment="crop-flip")
    list(data.train_dataloader()), data.probe(8), list(data.train_batches(16))
    assert torch.equal(torch.get_rng_state(), state)


def test_views_show_the_same_images_moved_otherwise():
    """Broken if a second view shows other images, or the first depends on how many there are."""
    one, two = (next(iter(module(toy(), augment="shift", views=views).train_dataloader())) for views in (1, 3))
    assert len(two.views) == 2
    assert torch.equal(one.x, two.x)
    assert not torch.equal(two.x, two.views[0])
    still = next(iter(module(toy(), augment="none", views=2).train_dataloader()))
    assert torch.equal(still.x, still.views[0])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_apart_what_one_process_would_see(world):
    """Broken if two ranks train on the same images, or on others than a single process."""
    whole = list(module(toy(), batch=12, augment="shift").train_dataloader())
    ranks = [
        list(module(toy(), batch=12, augment="shift", rank=r, world=world).train_dataloader()) for r in range(world)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([r[step].x for r in ranks]), batch.x)
        assert len({len(r[step]) for r in ranks}) == 1


def test_class_balanced_draws_every_class_alike():
    """Broken if rare classes stay rare, or an image of another class is handed out."""
    loaded = toy((2000,))
    labels = torch.cat([torch.zeros(1700), torch.ones(280), torch.full((20,), 2.0)]).long()
    d = loaded.domains[0]
    data = module(Loaded("toy", [Domain("d0", d.images, labels)], "", CLASSES), batch=100)
    data.sampler = "class_balanced"
    seen, train = Counter(), set(data.splits["d0"].train.tolist())
    for epoch in range(5):
        data.epoch = epoch
        for b in data.train_dataloader():
            where = [i for _, i in origins(data, b.x)]
            assert set(where) <= train
            assert labels[where].tolist() == b.y.tolist()
            seen.update(b.y.tolist())
    assert all(abs(seen[c] / seen.total() - 1 / 3) < 0.03 for c in range(3))


@pytest.mark.parametrize("protocol", ["mdl", "single:d1", "lodo:d0"])
def test_only_open_test_gives_test_images(protocol):
    """Broken if a test image, or any image of a held-out domain, is trained, validated or calibrated on."""
    data = module(toy((60, 90, 80), {1}), protocol)
    allowed = {(int(n[1:]), i) for n in data.protocol.train for i in data.splits[n].train.tolist()}
    batches = [*data.train_dataloader(), data.probe(9), *data.train_batches(7)]
    assert {o for b in batches for o in origins(data, b.x)} <= allowed
    assert Counter(o for b in data.train_batches(7) for o in origins(data, b.x)) == Counter(allowed)
    assert data.val_domains == data.protocol.train
    data.training_ended = True
    for loaders, names, part in (
        (data.val_dataloader(), data.val_domains, "val"),
        (data.open_test(), data.test_domains, "test"),
    ):
        for loader, name in zip(loaders, names, strict=True):
            indices = getattr(data.splits[name], part).tolist()
            seen = [b for b in loader]
            assert [o for b in seen for o in origins(data, b.x)] == [(int(name[1:]), i) for i in indices]
            known = data.task.domains.index(name) if name in data.task.domains else -1
            assert {d for b in seen for d in b.domain.tolist()} == {known}
            assert len(loader) == len(seen)


def test_class_sizes_are_the_shares_of_the_classes_in_the_batches():
    """Broken if a prior is that of all images, while each batch has equal shares of large and small domains."""
    rng = torch.Generator().manual_seed(5)
    made = []
    for d, (images, rare) in enumerate(((300, 0.05), (60, 0.5), (40, 0.8))):
        labels = (torch.rand(images, generator=rng) < rare).long()
        made.append(Domain(f"d{d}", torch.zeros(images, 3, 8, 8, dtype=torch.uint8), labels))
    data = DataModule(Loaded("uneven", made, "uneven", tuple("ab"), "shift"), "mdl", 0, 60)
    seen = torch.zeros(2)
    for epoch in range(30):
        data.epoch = epoch
        for batch in data.train_dataloader():
            seen += torch.bincount(batch.y, minlength=2)
    met, sizes = seen / seen.sum(), torch.tensor(data.task.class_sizes)
    assert sizes.sum() == pytest.approx(sum(data.task.class_counts), rel=1e-6)
    torch.testing.assert_close(met, sizes / sizes.sum(), atol=0.01, rtol=0)
    pooled = torch.tensor(data.task.class_counts) / sum(data.task.class_counts)
    assert (met - pooled).abs().max() > 0.1  # they can be told apart
    alone = DataModule(Loaded("uneven", made, "uneven", tuple("ab"), "shift"), "single:d0", 0, 60)
    assert alone.task.class_sizes == alone.task.class_counts


def test_the_task_and_the_moments_know_the_training_split_only():
    """Broken if class counts or normalisation see validation, test or held-out images."""
    loaded = toy((60, 90, 80))
    data = module(loaded, "lodo:d2")
    kept = {n: data.splits[n].train for n in ("d0", "d1")}
    labels = torch.cat([loaded[n].labels[i] for n, i in kept.items()])
    assert data.task.domains == ("d0", "d1")
    assert data.task.class_counts == tuple(torch.bincount(labels).tolist())
    pixels = [loaded[n].images[i].double() / 255 for n, i in kept.items()]
    mean = sum(p.mean((0, 2, 3)) for p in pixels) / 2
    std = (sum((p**2).mean((0, 2, 3)) for p in pixels) / 2 - mean**2).sqrt()
    torch.testing.assert_close(data.mean, mean.float())
    torch.testing.assert_close(data.std, std.float())


def test_probe_is_shared_by_all_methods_and_balanced():
    """Broken if two quantizers are calibrated on different images."""
    data = module(toy())
    probe = data.probe(20)
    data.epoch = 7
    assert torch.equal(probe.x, data.probe(20).x)
    assert probe.domain.bincount().tolist() == [10, 10]
    assert len(set(origins(data, probe.x))) == 20
    assert not torch.equal(probe.x, module(toy(), seed=1).probe(20).x)


def test_chunks_have_the_same_share_of_each_domain():
    """Broken if accumulation over micro-batches drops an image or unbalances the domains."""
    batch = next(iter(module(toy((60, 90, 80)), batch=24, views=2).train_dataloader()))
    parts = batch.chunk(4)
    assert [p.domain.bincount().tolist() for p in parts] == [[2, 2, 2]] * 4
    rows = lambda x: sorted(map(tuple, x.flatten(1).tolist()))  # noqa: E731
    assert rows(torch.cat([p.x for p in parts])) == rows(batch.x)
    assert all(torch.equal(p.x, p.views[0]) for p in parts)
    with pytest.raises(UserError, match="only 8 images"):
        batch.chunk(9)
    by_domain = dict(batch.by_domain())
    assert list(by_domain) == [0, 1, 2]
    assert torch.equal(by_domain[1].x, batch.x[1::3])


def test_the_test_split_opens_once_and_only_after_training():
    """Broken if a method can look at test images while it trains, or the runner can look twice."""
    data = module(toy())
    with pytest.raises(RunFailed, match="runner alone"):
        data.open_test()
    data.training_ended = True
    assert len(data.open_test()) == 2
    with pytest.raises(RunFailed, match="runner alone"):
        data.open_test()


@pytest.mark.parametrize("protocol", ["mdl", "longtail"])
def test_the_network_sees_a_window_of_larger_images(protocol):
    """Broken if training and evaluation see other sizes, or evaluation sees anything but the centre."""
    loaded = dataclasses.replace(toy(), crop=(2, 2))
    data = module(loaded, protocol, augment="crop-flip")
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()[0]))
    assert train.x.shape[1:] == val.x.shape[1:] == data.probe(4).x.shape[1:] == (2, 2, 2)
    pixels = (val.x * data.std[:, None, None] + data.mean[:, None, None]).mul(255).round().byte()
    assert torch.equal(pixels, loaded["d0"].images[data.splits["d0"].val][:, :, 0:2, 1:3])
    assert data.task.groups == (protocol == "longtail")


# -- the prepared cache -------------------------------------------------------------------------------------------------


class Tiny(DataSet):
    """20 images of each of two domains; counts how often it was loaded."""

    name = "tiny"
    domains = ("one", "two")
    classes = CLASSES
    image = (3, 8, 8)
    loads: ClassVar[list[str]] = []

    def fingerprint(self) -> str:
        return "v1"

    def load(self) -> list[Domain]:
        self.loads.append("load")
        images = torch.arange(30 * 192).view(30, 3, 8, 8).remainder(251).to(torch.uint8)
        return [Domain(n, images, torch.arange(30) % 3, group=torch.arange(30)) for n in self.selected]


@pytest.fixture(autouse=True)
def _fresh():
    Tiny.loads.clear()


def folder_of(cache: Path) -> Path:
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    return folder


def test_opened_again_it_is_not_loaded_again(tmp_path):
    """Broken if every run of a sweep prepares the data anew, or gets other pixels from the cache."""
    first, second = (open_data(Tiny, {"limit": limit}, None, tmp_path) for limit in (None, 5))
    assert Tiny.loads == ["load"]
    assert first.hash == second.hash
    assert second.params.limit == 5
    assert torch.equal(first["two"].images, Tiny(None).load()[1].images)
    assert first["two"].images.is_contiguous(memory_format=torch.channels_last)
    assert not list(tmp_path.glob("*.tmp"))


def test_writing_to_the_mapped_images_leaves_the_file_alone(tmp_path):
    """Broken if one run's in-place operation changes every later run's data."""
    loaded = open_data(Tiny, {}, None, tmp_path)
    loaded["one"].images.zero_()
    assert open_data(Tiny, {}, None, tmp_path)["one"].images.sum() > 0


def test_the_hash_moves_with_a_pixel_a_label_a_domain_and_nothing_else(tmp_path):
    """Broken if a result is filed under data that it was not made with."""

    class Other(Tiny):
        name = "other"
        flaw = ""

        def fingerprint(self) -> str:
            return self.flaw

        def load(self) -> list[Domain]:
            domains = super().load()
            if self.flaw == "pixel":
                domains[0].images[0, 0, 0, 0] += 1
            if self.flaw == "label":
                domains[0].labels[0] = 2
            return domains

    hashes = {}
    for flaw in ("", "pixel", "label"):
        Other.flaw = flaw
        hashes[flaw] = open_data(Other, {}, None, tmp_path).hash
    hashes["one domain"] = open_data(Other, {"domains": ["one"]}, None, tmp_path).hash
    assert len(set(hashes.values())) == 4
    Other.flaw = "touched"
    assert open_data(Other, {}, None, tmp_path).hash == hashes[""]


def reseal(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def set_back(path: Path, content: bytes) -> None:
    """Change a file as `rsync -t` or a disk that rots would: its time of writing stays."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    "truncated": lambda images, meta: images.write_bytes(images.read_bytes()[:-100]),
    "empty": lambda images, meta: images.write_bytes(b""),
    "flipped": lambda images, meta: images.write_bytes(images.read_bytes()[:-5] + b"0" + images.read_bytes()[-4:]),
    "time kept": lambda images, meta: set_back(images, images.read_bytes()[:-5] + b"0" + images.read_bytes()[-4:]),
    "zeros": lambda images, meta: set_back(images, images.read_bytes()[:128] + bytes(images.stat().st_size - 128)),
    "header": lambda images, meta: set_back(images, images.read_bytes().replace(b"(30, 8, 8, 3)", b"(30, 4,16, 3)")),
    "labels": lambda images, meta: set_back(p := images.with_name("one.labels.npy"), p.read_bytes()[:-8] + b"\1" + bytes(7)),
    "removed": lambda images, meta: images.unlink(),
    "pipe": lambda images, meta: (images.unlink(), os.mkfifo(images)),
    "folder": lambda images, meta: (images.unlink(), images.mkdir()),
    "no meta": lambda images, meta: meta.unlink(),
    "cut meta": lambda images, meta: meta.write_text(meta.read_text()[:50]),
    "list": lambda images, meta: meta.write_text("[]"),
    "foreign": lambda images, meta: meta.write_text(json.dumps({"files": {}})),
    "classes": lambda images, meta: meta.write_text(meta.read_text().replace('"a"', '"z"')),
    "classes, sealed": lambda images, meta: reseal(meta, classes=["c", "b", "a"]),
    "hash": lambda images, meta: reseal(meta, hash="0" * 64),
    "no hash": lambda images, meta: reseal(meta, hash=None),
    "no domains": lambda images, meta: reseal(meta, domains=None),
    "no files": lambda images, meta: reseal(meta, files=[1]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_told_and_prepared_again(tmp_path, damage, caplog):
    """Broken if a half-written or changed cache crashes a run, or worse, trains it."""
    good = open_data(Tiny, {}, None, tmp_path)
    images, meta = folder_of(tmp_path) / "one.images.npy", folder_of(tmp_path) / "meta.json"
    before = {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir()}
    DAMAGES[damage](images, meta)
    again = open_data(Tiny, {}, None, tmp_path)
    assert Tiny.loads == ["load", "load"]
    assert (again.hash, again.classes) == (good.hash, good.classes)
    assert {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir()} == before
    (told,) = caplog.messages
    assert told.startswith(str(folder_of(tmp_path)))
    assert told.endswith("; the data is prepared again")


def test_a_copied_cache_is_still_good(tmp_path):
    """Broken if moving a store to another disk (new times, same bytes) prepares everything again."""
    open_data(Tiny, {}, None, tmp_path)
    for path in folder_of(tmp_path).glob("*.npy"):
        os.utime(path, (1, 1))
    open_data(Tiny, {}, None, tmp_path)
    assert Tiny.loads == ["load"]


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path):
    """Broken if what a killed process left is taken for whole, or stops the next one."""
    open_data(Tiny, {}, None, tmp_path / "known")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    unfinished = tmp_path / f"{folder_of(tmp_path / 'known').name}.tmp-{disk._here()}-{dead.pid}-{'0' * 16}"
    unfinished.mkdir()
    (unfinished / "one.images.npy").write_bytes(b"half")
    open_data(Tiny, {}, None, tmp_path)
    assert not unfinished.exists()


def test_of_two_that_prepare_at_once_one_waits(tmp_path):
    """Broken if two workers of a sweep both prepare, or one reads what the other has not finished."""
    inside, results = threading.Barrier(2), []

    def work() -> None:
        inside.wait()
        results.append(open_data(Tiny, {}, None, tmp_path).hash)

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert Tiny.loads == ["load"]
    assert len(results) == 2
    assert len(set(results)) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """Broken if a disk that fills up leaves half a data set that is taken for whole."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_data import Tiny, open_data, UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # a write beyond it fails as on a full disk
try:
    open_data(Tiny, {{}}, None, Path({str(tmp_path)!r}))
except UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot write prepared data" in out
    assert "free some space" in out
    assert out.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    open_data(Tiny, {}, None, tmp_path)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    """Broken if a store below a file, or on a read-only disk, ends in a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot prepare data in .*file"):
        open_data(Tiny, {}, None, tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"limits": 5}, "mean 'limit'"),
        ({"limit": 0}, "limit=0"),
        ({"limit": "many"}, "limit='many'"),
        ({"domains": ["oen"]}, "mean 'one'"),
    ],
)
def test_wrong_parameters_say_how_to_mend_them(tmp_path, params, says):
    """Broken if a misspelt parameter is ignored."""
    with pytest.raises(UserError, match=says):
        open_data(Tiny, params, None, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": torch.full((30,), 3)}, "labels of 'one' must be 0..2"),
        ({"images": torch.zeros(30, 3, 8, 8)}, "uint8"),
        ({"images": torch.zeros(29, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"test": torch.tensor([30])}, "test part of 'one'"),
        ({"group": torch.arange(3)}, "3 groups"),
        ({"name": "uno"}, "gave domains"),
    ],
)
def test_a_plugin_that_loads_nonsense_is_told_so(tmp_path, change, says):
    """Broken if a plugin's mistake surfaces as an index error in mid-run."""

    class Wrong(Tiny):
        domains = ("one",)

        def load(self) -> list[Domain]:
            good = super().load()[0]
            return [Domain(**{**{k: getattr(good, k) for k in ("name", "images", "labels", "group")}, **change})]

    with pytest.raises(UserError, match=says):
        open_data(Wrong, {}, None, tmp_path)


def raising(error: BaseException):
    def hook(self):
        raise error

    return hook


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"domains": ()}, r"domains are \(\); give distinct names"),
        ({"domains": ("a", "a")}, "give distinct names"),
        ({"domains": ("../../a",)}, "give distinct names of letters"),
        ({"domains": 3}, "give distinct names"),
        ({"image": (3, 8)}, r"give \(C, H, W\)"),
        ({"image": (3, 0, 8)}, r"give \(C, H, W\)"),
        ({"image": None}, r"give \(C, H, W\)"),
        ({"crop": 4}, "give"),
        ({"classes": ("x", 3)}, "classes are"),
        ({"classes": None}, "classes are"),
        *(
            ({name: raising(StopIteration())}, f"{name} raised StopIteration")
            for name in ("look", "load", "fingerprint")
        ),
        ({"load": raising(SystemExit(0))}, "load raised SystemExit: 0"),
        ({"load": lambda self: None}, "load returned None; expected a list of Domain"),
        ({"load": lambda self: [3]}, "expected a list of Domain"),
        ({"load": lambda self: [Domain("one", [1], [2])]}, "all of them tensors"),  # type: ignore[arg-type]
        ({"load": lambda self: [Domain("one", torch.zeros(3), torch.tensor(3))]}, "all of them tensors"),
        ({"fingerprint": lambda self: b"x"}, "expected a str"),
    ],
)
def test_a_data_set_plugin_that_misbehaves_is_named(tmp_path, facts, says):
    """Broken if a hook or a fact of a plugin's data set ends in another exception's clothes, or in silence."""
    with pytest.raises((UserError, RunFailed), match=says) as caught:
        open_data(type("Wrong", (Tiny,), {"name": "wrong", **facts}), {}, None, tmp_path)
    assert "wrong" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_are_mapped_not_copied(tmp_path):
    """Broken if opening prepared data reads it all into memory."""
    loaded = open_data(Tiny, {}, None, tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    assert "one.images.npy" in maps.read_text()
    assert np.asarray(loaded["one"].images).nbytes == 30 * 192
