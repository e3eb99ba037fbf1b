"""The suite that every data set passes, importable by plugin authors.

    from qatbench.bench.testing import DatasetContract

    class TestMine(DatasetContract):
        dataset = "mine"             # as on the command line: "imagefolder:pets"
        plugin = "path/to/mine.py"   # for a data set that is not installed
        params = {"size": 32}        # whatever makes it small
        classes_of = {"photo": [5, 4], "sketch": [6, 3]}   # images per class that `write` makes, train and test

        def write(self, root): ...   # tiny files in the official layout, of every domain; ten images a domain at least
        def spoil(self, root): ...   # make one of the first domain's files unreadable as what it is, return its path

A data set that reads no files needs neither `write` nor `spoil`. Without `write`, files are looked for in ``QATBENCH_DATA``.
The sizes and hashes of `remotes` are lifted, since tiny files are not the published ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from . import registry
from .augment import AUGMENTS, centre
from .data import Batch, DataModule, DataSet, Domain, Loaded, Split, find_data, hash_splits, make_splits, open_data
from .errors import RunFailed, UserError
from .fetch import Remote
from .images import Encoded
from .longtail import RULES, tail_counts
from .prepared import DECODED_GB, prepared_folder
from .resolve import resolve
from .runner import run
from .spec import RunSpec
from .store import Store
from .stream import DECODERS, gather

BATCH, LIMIT = 8, 40  # of the runs here
NETWORK = "contract-net"
WAY_OUT = re.compile(r"--data-root|QATBENCH_DATA|\b(choose|fetch|give|leave|prepare|put|remove|set|use)\b")


@dataclass(frozen=True)
class Made:
    """The data set under test: its name, its settings, its files and a store of its own."""

    data: str
    params: Mapping[str, Any]
    root: Path | None
    store: Store
    names: tuple[str, ...] = ()  # of the domains
    published: Mapping[str, Sequence[Remote]] = dataclasses.field(default_factory=dict)  # remotes with their pins

    def dataset(self, **params: Any) -> DataSet:
        """The plugin, with these settings besides the suite's own; of all domains, if none are named."""
        return find_data(self.data, {**self.params, "domains": self.names, **params}, self.root, self.store.cache)

    def open(self, **params: Any) -> Loaded:
        """The prepared data set."""
        asked = {**self.params, "domains": self.names, **params}
        return open_data(self.data, asked, self.root, self.store.cache)

    def at(self, root: Path | None, cache: Path) -> Made:
        """The same with other files, and nothing prepared."""
        return dataclasses.replace(self, root=root, store=Store(cache))

    def copy(self, folder: Path) -> Made:
        """The same with a copy of the files, and nothing prepared."""
        if self.root is None:
            pytest.skip(f"{self.data} reads no files")
        shutil.copytree(self.root, folder / "root")
        return self.at(folder / "root", folder / "store")

    def sources(self) -> list[Path]:
        """What `load` reads of the data root."""
        assert self.root is not None
        return [path for path in map(Path, self.dataset().sources()) if path.is_relative_to(self.root)]


Raw = tuple[DataSet, list[Domain]]
"""The plugin, and what its `load` gave."""


def pixels(images: Tensor | Encoded) -> Tensor:
    """All images of a domain: uint8 [N, H, W, C]."""
    return gather(images, torch.arange(len(images))) if isinstance(images, Encoded) else images.permute(0, 2, 3, 1)


def unpinned(remotes: Mapping[str, Sequence[Remote]]) -> dict[str, tuple[Remote, ...]]:
    """The same files, of any size and content."""
    bare = {"sha256": None, "md5": None, "size": None}
    return {domain: tuple(dataclasses.replace(r, **bare) for r in files) for domain, files in remotes.items()}


def with_params(loaded: Loaded, **params: Any) -> Loaded:
    """The same images with other settings for the split."""
    return dataclasses.replace(loaded, params=loaded.params.model_copy(update=params))


def refusal(made: Made, **params: Any) -> str:
    """The one line by which the data set refuses to be opened."""
    with pytest.raises(UserError) as caught:
        made.open(**params)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, f"more than one line: {text}"
    return text


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written in the folder; and nothing was, since a superuser can always."""
    before, modes = snapshot(folder), {p: p.stat().st_mode for p in [folder, *folder.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
        assert snapshot(folder) == before, f"something was written in {folder}"
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def protocols(names: Sequence[str]) -> list[str]:
    """Every kind of protocol that these domains allow."""
    several = ["mdl", *(f"lodo:{name}" for name in dict.fromkeys((names[0], names[-1])))] if len(names) > 1 else []
    return [f"single:{names[-1]}", *several, "longtail"]


def module(loaded: Loaded, protocol: str, augment: str = "default") -> DataModule:
    """Small batches of a few images under a protocol."""
    small = with_params(loaded, limit=LIMIT, **({"imbalance": 2.0, "val": 0.5} if protocol == "longtail" else {}))
    return DataModule(small, protocol, 0, BATCH, augment)


def epoch(data: DataModule, number: int = 0) -> list[Batch]:
    """The training batches of an epoch."""
    data.epoch = number
    return list(data.train_dataloader())


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Whether two epochs are the same to the bit."""
    both = zip(ours, theirs, strict=True)
    return all(torch.equal(getattr(a, k), getattr(b, k)) for a, b in both for k in ("x", "y", "domain"))


def seen(data: DataModule, batch: Batch) -> list[bytes]:
    """The stored pixels of each image of a batch that was not augmented."""
    x = batch.x * data.std[:, None, None] + data.mean[:, None, None]
    return [image.numpy().tobytes() for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()]


def stored(data: DataModule, domain: str, rows: Tensor) -> list[tuple[bytes, int]]:
    """The pixels that a network should see of these images, with their labels."""
    found = data.loaded[domain]
    images = centre(pixels(found.images), data.loaded.size)
    return [(images[i].contiguous().numpy().tobytes(), int(found.labels[i])) for i in rows.tolist()]


class DatasetContract:
    """What every data set must do. Subclass it, set ``dataset``, write tiny files, and let pytest find the subclass."""

    dataset: ClassVar[str]
    params: ClassVar[dict[str, Any]] = {}
    plugin: ClassVar[str | None] = None
    classes_of: ClassVar[dict[str, list[int]]] = {}
    notices_content: ClassVar[bool] = (
        True  # whether the fingerprint looks at every file; else at names only, of so many
    )

    def write(self, root: Path) -> None:
        """Tiny files in the official layout, for every domain."""
        raise NotImplementedError

    def spoil(self, root: Path) -> Path:
        """Make a file of the first domain unreadable as what it is, and say which."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
        """The data set on files that were written for it, its pins lifted; one a class."""
        folder = tmp_path_factory.mktemp("contract")
        here = os.environ.get("QATBENCH_DATA")
        root = Path(here) if here else None
        with pytest.MonkeyPatch.context() as mp:
            for name in (DECODED_GB, DECODERS, "QATBENCH_DATA"):
                mp.delenv(name, raising=False)
            if cls.plugin is not None:
                registry.load_file(cls.plugin)
            plugin = registry.find("datasets", cls.dataset)
            published = plugin.remotes
            mp.setattr(plugin, "remotes", unpinned(published))
            if cls._writes():
                root = folder / "root"
                root.mkdir()
                cls().write(root)
            torch.set_num_threads(1)
            asked = tuple(cls.params.get("domains", ()))
            made = Made(cls.dataset, cls.params, root, Store(folder / "store"), asked, published)
            with _told():
                names = asked or made.dataset().domains
            yield dataclasses.replace(made, names=names)

    @pytest.fixture(scope="class")
    @classmethod
    def raw(cls, made: Made) -> Raw:
        """What `load` gives; the domains were asked for in the wrong order."""
        dataset = made.dataset(domains=made.names[::-1])
        with _told():
            return dataset, dataset.load()

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, made: Made) -> Loaded:
        """The prepared data set, of all domains and images."""
        with _told():
            return with_params(made.open(), imbalance=None, limit=None)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
        """The hashes that two processes found which prepared the data set at the same time, and their cache."""
        folder = tmp_path_factory.mktemp("elsewhere")
        return two_processes(made, cls.plugin, folder), folder / "store" / "data"

    @pytest.fixture
    def written(self) -> None:
        """Skips what only written files can show."""
        if not self._writes():
            pytest.skip(f"the suite of {self.dataset} writes no files")

    @classmethod
    def _writes(cls) -> bool:
        return cls.write is not DatasetContract.write

    # -- facts ----------------------------------------------------------------------------------------------------------

    def test_facts_are_there(self, made: Made) -> None:
        """Nobody could tell where the images come from, whom to cite, or whether they may be used."""
        cls = type(made.dataset())
        for fact in ("name", "source", "licence", "citation", "__doc__"):
            assert (getattr(cls, fact, "") or "").strip(), f"{fact} is missing"
        assert isinstance(cls.version, int), "version is no whole number"
        assert cls.version >= 1, "version is below 1"

    def test_facts_name_what_there_is(self, made: Made) -> None:
        """A table would show domains that do not exist, or a default could not be used."""
        dataset = made.dataset()
        for fact in ("counts", "remotes", "default_domains", "generated"):
            unknown = [d for d in getattr(dataset, fact) if d not in dataset.domains]
            assert unknown == [], f"{fact} names domains that are not in `domains`"
        assert len(set(dataset.domains)) == len(dataset.domains), "a domain is named twice"
        assert dataset.augment in AUGMENTS, f"augment {dataset.augment!r} is not one of {list(AUGMENTS)}"
        assert all(isinstance(n, int) and n > 0 for n in dataset.counts.values()), "counts are whole and above 0"

    def test_remotes_are_well_formed(self, made: Made) -> None:
        """A file would be fetched from nowhere, written outside of the data root, or never pass its check."""
        for remote in (r for files in made.published.values() for r in files):
            for path in filter(None, (remote.path, remote.unpack)):
                parts = PurePosixPath(path).parts
                assert parts, f"{remote} has an empty path"
                assert not path.startswith("/"), f"{path} is not relative"
                assert ".." not in parts, f"{path} leaves the data root"
                assert "\\" not in path, f"{path} is written for one system only"
            for url in remote.urls:
                assert re.fullmatch(r"https?://[^\s/]+/\S+", url), f"{url!r} is not an address"
            for kind, digits in (("sha256", 64), ("md5", 32)):
                text = getattr(remote, kind)
                assert text is None or re.fullmatch(f"[0-9a-f]{{{digits}}}", text), f"{kind} of {remote.path}: {text!r}"
            assert remote.size is None or remote.size > 0, f"size of {remote.path} is {remote.size}"
            assert remote.urls or remote.note, f"{remote.path}: no address, and no note that says how to get it"

    def test_is_listed_without_its_files(self, made: Made, tmp_path: Path) -> None:
        """It would be missing from the list of data sets, or one without its files would break that list."""
        name = made.data.partition(":")[0]
        entry = next((p for p in registry.plugins("datasets") if p.name == name), None)
        assert entry is not None, f"{name} is not in the list"
        assert entry.error is None, entry.error
        if not entry.cls.takes:
            for root in (None, tmp_path):
                assert find_data(name, {}, root, tmp_path / "cache").domains, "no domains without the files"

    # -- what load() gives ----------------------------------------------------------------------------------------------

    def test_images(self, raw: Raw) -> None:
        """The images could not be stored or fed to a network; or they show nothing."""
        dataset, domains = raw
        channels, height, width = dataset.image
        assert dataset.crop is None or (dataset.crop[0] <= height and dataset.crop[1] <= width), "crop exceeds image"
        for domain in domains:
            assert tuple(domain.images.shape) == (len(domain.labels), *dataset.image), f"shape of {domain.name}"
            if isinstance(domain.images, Encoded):
                again = pickle.loads(pickle.dumps(domain.images))  # so it reaches the processes that decode
                assert (again[0] == domain.images[0]).all(), f"{domain.name} changes when it is pickled"
            else:
                assert domain.images.dtype == torch.uint8, f"{domain.name} is {domain.images.dtype}"
            values = pixels(domain.images)
            assert tuple(values.shape[1:]) == (height, width, channels), f"decoded shape of {domain.name}"
            assert values.min() < values.max(), f"all pixels of {domain.name} are equal"
            assert len(values) == 1 or (values != values[:1]).any(), f"all images of {domain.name} are equal"

    def test_labels(self, raw: Raw) -> None:
        """A network would learn other classes than the files say, or images would be lost."""
        dataset, domains = raw
        for domain in domains:
            assert domain.labels.dtype == torch.int64, f"labels of {domain.name} are {domain.labels.dtype}"
            inside = (domain.labels >= 0) & (domain.labels < len(dataset.classes))
            assert inside.all(), f"{domain.name} has a label beyond its {len(dataset.classes)} classes"
            found = torch.bincount(domain.labels, minlength=len(dataset.classes)).tolist()
            if domain.name in self.classes_of:
                assert found == self.classes_of[domain.name], f"images per class of {domain.name}: {found}"
            elif not self._writes() and domain.name in dataset.counts:
                assert sum(found) == dataset.counts[domain.name], f"{domain.name} has {sum(found)} images"

    def test_classes(self, raw: Raw) -> None:
        """Two classes could not be told apart in a table, or a superclass would not exist."""
        dataset, _ = raw
        assert len(set(dataset.classes)) == len(dataset.classes) > 0, "a class is named twice"
        assert all(isinstance(c, str) and c.strip() for c in dataset.classes), "a class has no name"
        assert len(dataset.superclass) == (len(dataset.classes) if dataset.superclasses else 0), (
            "superclass of each class"
        )
        assert sorted(set(dataset.superclass)) == list(range(len(dataset.superclasses))), "a superclass has no class"

    def test_domains_are_in_order(self, made: Made, raw: Raw) -> None:
        """Asking for the same domains in another order would be another task."""
        assert [d.name for d in raw[1]] == list(made.names)

    def test_official_test_and_groups(self, raw: Raw) -> None:
        """An image would be tested twice, or move between the parts by itself."""
        for domain in raw[1]:
            n = len(domain.labels)
            if domain.test is not None:
                assert domain.test.dtype == torch.int64, f"{domain.name}: indices are {domain.test.dtype}"
                assert torch.equal(domain.test, domain.test.unique()), f"{domain.name}: not sorted, or one twice"
                assert 0 < len(domain.test) < n, f"{domain.name}: {len(domain.test)} of {n} images are for testing"
                assert 0 <= int(domain.test[0]) <= int(domain.test[-1]) < n, f"{domain.name}: an index beyond {n}"
            if domain.group is not None:
                assert domain.group.dtype == torch.int64, f"{domain.name}: groups are {domain.group.dtype}"
                assert domain.group.shape == (n,), f"{domain.name}: {len(domain.group)} groups for {n} images"

    def test_a_subset_of_domains_is_the_same(self, made: Made, raw: Raw) -> None:
        """A domain alone would not be the domain among others."""
        whole, domains = raw
        for domain in domains:
            dataset = made.dataset(domains=[domain.name])
            (alone,) = dataset.load()
            assert dataset.classes == whole.classes, f"other classes with {domain.name} alone"
            assert torch.equal(pixels(alone.images), pixels(domain.images)), f"other images of {domain.name}"
            assert torch.equal(alone.labels, domain.labels), f"other labels of {domain.name}"
            for part in ("test", "group"):
                ours, theirs = (getattr(d, part) for d in (alone, domain))
                assert (ours is None) == (theirs is None), f"{part} of {domain.name} comes and goes"
                if ours is not None and part == "group":  # numbered apart
                    ours, theirs = (g.unique(return_inverse=True)[1] for g in (ours, theirs))
                assert ours is None or torch.equal(ours, theirs), f"other {part} of {domain.name}"

    # -- the prepared folder --------------------------------------------------------------------------------------------

    def test_prepared_twice_is_the_same(self, made: Made, loaded: Loaded, tmp_path: Path) -> None:
        """A result could not be reproduced, since its images could not."""
        assert made.at(made.root, tmp_path).open().hash == loaded.hash

    def test_opened_again_without_loading(self, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every run would decode all images anew."""

        def refuse(_: DataSet) -> list[Domain]:
            raise AssertionError("load() was called for a data set that is prepared")

        monkeypatch.setattr(type(made.dataset()), "load", refuse)
        again = made.open()
        assert (again.hash, again.names, again.classes) == (loaded.hash, loaded.names, loaded.classes)

    def test_prepared_is_what_was_loaded(self, raw: Raw, loaded: Loaded) -> None:
        """A network would train on other images than the files hold."""
        for theirs in raw[1]:
            ours = loaded[theirs.name]
            assert torch.equal(pixels(ours.images), pixels(theirs.images)), f"images of {ours.name}"
            assert torch.equal(ours.labels, theirs.labels), f"labels of {ours.name}"

    def test_changed_file_is_noticed(self, written: None, made: Made, tmp_path: Path) -> None:
        """Old images would be used after the files were changed."""
        mine = made.copy(tmp_path)

        def folder() -> str:
            try:
                return prepared_folder(mine.dataset(), mine.store.cache).name
            except UserError as error:  # noticed even sooner
                return str(error)

        before = folder()
        assert folder() == before, "the fingerprint differs each time"
        files = sorted(f for s in mine.sources() for f in ([s] if s.is_file() else s.rglob("*")) if f.is_file())
        if not self.notices_content:
            files[0].rename(files[0].with_stem("renamed"))
            assert folder() != before, f"{files[0]} was renamed"
            return
        for path in files[:: len(files) // 20 + 1]:
            content, stat = path.read_bytes(), path.stat()
            path.write_bytes(content + b"\n")
            assert folder() != before, f"{path} was changed"
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        spoilt = self.spoil(tmp_path / "root")
        assert folder() != before, f"{spoilt} was changed"

    def test_prepared_folder_may_be_read_only(self, made: Made, loaded: Loaded) -> None:
        """A cache that several people share could not be used."""
        with read_only(made.store.cache):
            assert made.open().hash == loaded.hash

    def test_data_root_may_be_read_only(self, made: Made, loaded: Loaded, tmp_path: Path) -> None:
        """Data on a shared disk could not be used, or would be changed."""
        mine = made.copy(tmp_path)
        assert mine.root is not None
        with read_only(mine.root):
            hash_ = mine.open().hash
        assert hash_ == loaded.hash

    @pytest.mark.slow
    def test_same_hash_in_another_process(self, loaded: Loaded, elsewhere: tuple[list[str], Path]) -> None:
        """The images would depend on a hash seed, or on what else was imported: no two machines would agree."""
        assert elsewhere[0] == [loaded.hash] * 2

    @pytest.mark.slow
    def test_two_processes_prepare_one_folder(self, loaded: Loaded, elsewhere: tuple[list[str], Path]) -> None:
        """A parallel sweep would find half a data set."""
        left = [p.name for p in elsewhere[1].iterdir() if p.is_dir() and p.name != "downloads"]
        assert len(left) == 1, left
        assert not left[0].endswith(".tmp"), left

    # -- splits ---------------------------------------------------------------------------------------------------------

    def test_splits_are_disjoint_and_whole(self, loaded: Loaded) -> None:
        """An image would train and test, or be lost."""
        splits = make_splits(loaded, 0)
        for domain in loaded.domains:
            split = splits[domain.name]
            both = torch.cat([split.train, split.val, split.test]).sort().values
            assert torch.equal(both, torch.arange(len(domain.labels))), f"parts of {domain.name}"

    def test_splits_follow_the_seed(self, loaded: Loaded) -> None:
        """Runs with one seed would not be comparable, or more seeds would show nothing of the split."""
        hashes = [hash_splits(make_splits(loaded, seed)) for seed in range(5)]
        assert hashes[0] == hash_splits(make_splits(loaded, 0))
        if loaded.params.val or any(d.test is None for d in loaded.domains):
            assert len(set(hashes)) > 1, "every seed draws the same split"

    def test_every_class_trains(self, loaded: Loaded) -> None:
        """A class would be tested that nothing could learn."""
        splits = make_splits(loaded, 0)
        for domain in loaded.domains:
            present = set(domain.labels.tolist())
            trains = set(domain.labels[splits[domain.name].train].tolist())
            assert sorted(present - trains) == [], f"classes of {domain.name} without a training image"

    def test_official_test_part_is_the_test_part(self, loaded: Loaded) -> None:
        """The number could not be compared with any paper's, or would be of images that trained."""
        splits = make_splits(loaded, 0)
        for domain in loaded.domains:
            if domain.test is not None:
                assert torch.equal(splits[domain.name].test, domain.test), f"test part of {domain.name}"

    def test_groups_stay_together(self, loaded: Loaded) -> None:
        """The network would be tested on a source that it has seen in training."""
        splits, part_of = make_splits(loaded, 0), {}
        for domain in loaded.domains:
            groups = domain.group
            for part in ("train", "val", "test") if groups is not None else ():
                for group in groups[getattr(splits[domain.name], part)].unique().tolist():  # type: ignore[index]
                    assert part_of.setdefault(group, part) == part, f"group {group} is in {part_of[group]} and {part}"

    def test_without_val_nothing_validates(self, loaded: Loaded) -> None:
        """`val=0` would hold images back that a paper trains on."""
        for name, split in make_splits(with_params(loaded, val=0.0), 0).items():
            assert len(split.val) == 0, f"{name} has validation images"
            assert len(split.train) + len(split.test) == len(loaded[name].labels), f"{name} lost images"

    def test_limit(self, loaded: Loaded) -> None:
        """A quick look would take as long as the whole, or be tested on other images."""
        whole, some = make_splits(loaded, 0), make_splits(with_params(loaded, limit=5), 0)
        for name, split in some.items():
            assert len(split.train) + len(split.val) <= 5, name
            assert torch.equal(split.test, whole[name].test), f"test part of {name}"

    @pytest.mark.parametrize("rule", RULES)
    def test_long_tail(self, loaded: Loaded, rule: str) -> None:
        """The list would not be the rule's, or a frequent class would weigh more in the test."""
        whole = make_splits(with_params(loaded, val=0.0), 0)
        tail = make_splits(with_params(loaded, val=0.0, imbalance=2.0, lt_list=rule), 0)
        for domain in loaded.domains:
            counts = [_per_class(loaded, domain, splits[domain.name]) for splits in (whole, tail)]
            assert counts[1]["train"] == tail_counts(counts[0]["train"], 2.0, rule), f"{rule} list of {domain.name}"
            tested = {n for n in counts[1]["test"] if n}
            assert len(tested) == 1, f"test part of {domain.name} has {sorted(tested)} images of a class"

    # -- batches --------------------------------------------------------------------------------------------------------

    def test_training_batches(self, loaded: Loaded) -> None:
        """A network could not be trained on the data set under one of the protocols."""
        for protocol in protocols(loaded.names):
            data = module(loaded, protocol)
            batches, domains = epoch(data), len(data.protocol.train)
            assert len(batches) == data.steps > 0, protocol
            for batch in batches:
                channels = loaded.domains[0].images.shape[1]
                assert batch.x.shape == (data.share * domains, channels, *loaded.size), f"{protocol}: {batch.x.shape}"
                assert batch.x.dtype == torch.float32, protocol
                assert batch.x.is_contiguous(memory_format=torch.channels_last), f"{protocol}: memory format"
                assert torch.isfinite(batch.x).all(), f"{protocol}: not finite"
                assert torch.equal(batch.domain, torch.arange(domains).repeat(data.share)), protocol

    def test_training_images_have_their_labels(self, loaded: Loaded) -> None:
        """A network would learn from wrong labels."""
        for protocol in protocols(loaded.names):
            data = module(loaded, protocol, "none")
            known = [set(stored(data, d, data.splits[d].train)) for d in data.protocol.train]
            for batch in epoch(data):
                for image, y, d in zip(seen(data, batch), batch.y.tolist(), batch.domain.tolist(), strict=True):
                    assert (image, y) in known[d], f"{protocol}: an image of {data.protocol.train[d]} as class {y}"

    def test_an_epoch_can_be_made_again(self, loaded: Loaded) -> None:
        """A run that was killed would go on with other batches; or every epoch would be the same."""
        for protocol in protocols(loaded.names):
            ours, theirs = module(loaded, protocol), module(loaded, protocol)
            later = epoch(theirs, 1)
            assert equal(epoch(ours), epoch(theirs)), protocol
            assert not equal(epoch(ours), later), f"{protocol}: two epochs are the same"
            assert equal(epoch(ours, 1), later), protocol

    def test_validation_sees_each_image_once(self, loaded: Loaded) -> None:
        """What is selected would depend on images that count twice, or not at all."""
        for protocol in protocols(loaded.names):
            data = module(loaded, protocol)
            assert data.val_domains == data.protocol.train, protocol
            for name, loader in zip(data.val_domains, data.val_dataloader(), strict=True):
                found = [pair for b in loader for pair in zip(seen(data, b), b.y.tolist(), strict=True)]
                assert sorted(found) == sorted(stored(data, name, data.splits[name].val)), f"{protocol}: {name}"

    def test_test_part_is_opened_once_and_last(self, loaded: Loaded) -> None:
        """Something could be chosen by looking at the test images."""
        for protocol in protocols(loaded.names):
            data = module(loaded, protocol)
            with pytest.raises(RunFailed):
                data.open_test()
            data.training_ended = True
            for name, loader in zip(data.test_domains, data.open_test(), strict=True):
                assert sum(map(len, loader)) == len(data.splits[name].test), f"{protocol}: {name}"
            with pytest.raises(RunFailed):
                data.open_test()

    def test_streamed_batches_are_the_same(
        self, made: Made, raw: Raw, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A data set that is too large to be decoded would train on other pixels, or in another order."""
        if not any(isinstance(d.images, Encoded) for d in raw[1]):
            pytest.skip(f"{self.dataset} is not made of encoded images")
        protocol = protocols(loaded.names)[-2]
        decoded = epoch(module(loaded, protocol))
        monkeypatch.setenv(DECODED_GB, "0")
        streamed = with_params(made.at(made.root, tmp_path).open(), imbalance=None, limit=None)
        assert any(isinstance(d.images, Encoded) for d in streamed.domains), "nothing is streamed"
        for workers in ("0", "2"):
            monkeypatch.setenv(DECODERS, workers)
            assert equal(decoded, epoch(module(streamed, protocol))), f"{workers} workers"

    # -- what is wrong is told ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("what", ["none", "missing", "empty", "file"])
    def test_wrong_data_root_is_told(self, written: None, made: Made, tmp_path: Path, what: str) -> None:
        """A user with a wrong data root would get a traceback, or not learn what to do."""
        root = None if what == "none" else tmp_path / "root"
        if root is not None and what != "missing":
            root.mkdir() if what == "empty" else root.touch()
        text = refusal(made.at(root, tmp_path / "store"))
        assert made.data in text or (root is not None and str(root) in text), f"names neither data set nor path: {text}"
        assert WAY_OUT.search(text), f"says no way out: {text}"

    def test_file_in_place_of_a_folder_is_told(self, written: None, made: Made, tmp_path: Path) -> None:
        """A user who unpacked an archive in the wrong way would get a traceback."""
        mine = made.copy(tmp_path)
        for source in mine.sources()[:1]:
            if source.is_dir():
                shutil.rmtree(source)
                source.touch()
            else:
                source.unlink()
                source.mkdir()
            text = refusal(mine)
            assert str(source) in text, f"does not name {source}: {text}"

    def test_spoilt_file_is_told(self, written: None, made: Made, tmp_path: Path) -> None:
        """A user with a damaged file would get a traceback, wrong images, or not learn which file it is."""
        mine = made.copy(tmp_path)
        spoilt = self.spoil(tmp_path / "root")
        text = refusal(mine, domains=made.names[:1])
        assert spoilt.name in text, f"does not name {spoilt.name}: {text}"

    def test_unknown_domain_is_told(self, made: Made) -> None:
        """A user who mistypes a domain would not learn what there is."""
        wrong = f"{made.names[0]}x"
        text = refusal(made, domains=[wrong])
        assert made.names[0] in text.replace(wrong, ""), f"does not name the nearest domain: {text}"

    def test_unknown_setting_is_told(self, made: Made) -> None:
        """A user who mistypes a setting would train on the whole data set, or not learn what there is."""
        text = refusal(made, limitt=3)
        assert re.search(r"\blimit\b", text), f"does not name the nearest setting: {text}"

    # -- all of it ------------------------------------------------------------------------------------------------------

    def test_a_real_run(self, made: Made, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
        """A user could not train and test a method on the data set."""
        from .testing import TinyNet  # it offers this suite, too

        entry = registry.Plugin(NETWORK, "networks", __file__, TinyNet)
        monkeypatch.setitem(registry._files, Path(__file__), [entry])
        settings: dict[str, Any] = {"epochs": 1, "float_epochs": 1, "batch": BATCH, "calibration": BATCH}
        params = {**made.params, "domains": list(made.names), "limit": LIMIT}
        spec = RunSpec(method="lsq", data=made.data, data_params=params, network=NETWORK, **settings)
        resolved = resolve(spec, data_root=made.root, cache=made.store.cache)
        record = run(resolved, made.store, data_root=made.root, device="cpu", wandb=False)
        assert record["status"] == "done", record["reason"]
        accuracies = [record["metrics"].get(f"test/acc/{d}") for d in made.names]
        assert all(a is not None and 0 <= a <= 1 for a in accuracies), f"test/acc of each domain: {accuracies}"
        recalls = {d: len(v) for d, v in record["per_class"].items()}
        assert recalls == dict.fromkeys(made.names, len(loaded.classes)), f"recalls of each domain: {recalls}"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with the data set is one line for each test, not a traceback through pytest's own machinery."""
    try:
        yield
    except UserError as error:
        pytest.fail(str(error), pytrace=False)


def _per_class(loaded: Loaded, domain: Domain, split: Split) -> dict[str, list[int]]:
    """Images of each class that train and that test."""
    parts = {"train": split.train, "test": split.test}
    return {k: torch.bincount(domain.labels[v], minlength=len(loaded.classes)).tolist() for k, v in parts.items()}


def two_processes(made: Made, plugin: str | None, folder: Path) -> list[str]:
    """Prepare a data set in two processes at once, in ``folder/store``; the hashes that they found."""
    processes = []
    for rank in ("0", "1"):
        asked = {
            "data": made.data, "plugin": plugin, "params": {**made.params, "domains": made.names},
            "root": None if made.root is None else str(made.root), "folder": str(folder), "rank": rank,
        }  # fmt: skip
        command = [sys.executable, "-m", __name__, json.dumps(asked)]
        env = {**os.environ, "PYTHONHASHSEED": rank, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=env, text=True, cwd=folder, stdout=pipe, stderr=pipe))
    hashes = []
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-2000:]
        hashes.append(out.strip().splitlines()[-1])
    return hashes


def _one_process(asked: dict[str, Any]) -> None:
    """What each of `two_processes` does: it waits for the other one before it begins."""
    if asked["plugin"]:
        registry.load_file(asked["plugin"])
    plugin, folder = registry.find("datasets", asked["data"]), Path(asked["folder"])
    plugin.remotes = unpinned(plugin.remotes)
    (folder / f"ready-{asked['rank']}").touch()
    end = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    root = None if asked["root"] is None else Path(asked["root"])
    print(open_data(asked["data"], asked["params"], root, Store(folder / "store").cache).hash)


if __name__ == "__main__":
    _one_process(json.loads(sys.argv[1]))
