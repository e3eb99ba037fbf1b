"""CIFAR-10 and CIFAR-100 on tiny files in both layouts, their long tails, and the real subset where it is."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.dataset import DataSet, Domain, Loaded, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.splits import make_splits
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.cifar import COARSE, FINE, FINE_TO_COARSE, Cifar10, Cifar100

import datasets

REAL = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
needs_real = pytest.mark.skipif(
    not (REAL / "cifar10/plain_text").is_dir(), reason=f"no CIFAR-10 in {REAL}; set QATBENCH_DATA"
)
TRAIN = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
CLIMBQ = {  # emaq-lt.md (d), of the authors' own lists
    10: [5000, 3871, 2997, 2320, 1796, 1390, 1076, 833, 644, 498],
    50: [5000, 3237, 2095, 1356, 877, 567, 367, 237, 153, 99],
    200: [5000, 2775, 1540, 854, 474, 263, 145, 80, 44, 24],
}


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Images, uint8 [n, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def numbered(classes: int, each: int) -> np.ndarray:
    """Labels, so many of each class, mixed."""
    return np.arange(classes * each) * 7 % (classes * each) % classes


def write_batch(path: Path, images: np.ndarray, python2: bool = False, **labels: np.ndarray) -> None:
    """A batch as torchvision's files are: a pickle of protocol 2 with the colours one after the other."""
    flat = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    batch = {b"batch_label": b"1 of 1", b"data": flat, b"filenames": [b"x.png"] * len(images)}
    raw = pickle.dumps({**batch, **{k.encode(): v.tolist() for k, v in labels.items()}}, protocol=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw.replace(b"numpy._core.", b"numpy.core.") if python2 else raw)


def write_shards(folder: Path, split: str, images: np.ndarray, shards: int = 1, **columns: np.ndarray) -> None:
    """Parquet files as the hub's: PNG in column img, class names in the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"label": Cifar10.classes, "fine_label": FINE, "coarse_label": COARSE}
    features = {"img": datasets.Image(), **{c: datasets.ClassLabel(names=list(names[c])) for c in columns}}
    for part in range(shards):
        rows = np.array_split(np.arange(len(images)), shards)[part]
        content = {"img": [{"bytes": png(images[i]), "path": None} for i in rows]}
        content |= {c: v[rows].tolist() for c, v in columns.items()}
        table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}-{part:05d}-of-{shards:05d}.parquet")


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write_cifar10(root: Path, parquet: bool = False) -> None:
    """40 training and 20 test images, the same in both layouts."""
    images, labels = pictures(60), np.concatenate([numbered(10, 4), numbered(10, 2)])
    if parquet:
        write_shards(root / "cifar10/plain_text", "train", images[:40], 2, label=labels[:40])
        write_shards(root / "cifar10/plain_text", "test", images[40:], label=labels[40:])
        return
    for i in range(5):
        part = slice(8 * i, 8 * i + 8)
        write_batch(root / f"cifar-10-batches-py/data_batch_{i + 1}", images[part], i < 3, labels=labels[part])
    write_batch(root / "cifar-10-batches-py/test_batch", images[40:], labels=labels[40:])


def write_cifar100(root: Path, parquet: bool = False) -> None:
    """Two training images and a test image of each class."""
    images, fine = pictures(300), np.concatenate([numbered(100, 2), numbered(100, 1)])
    coarse = np.asarray(FINE_TO_COARSE)[fine]
    for split, part in (("train", slice(200)), ("test", slice(200, 300))):
        if parquet:
            labels = {"fine_label": fine[part], "coarse_label": coarse[part]}
            write_shards(root / "cifar100/cifar100", split, images[part], 1, **labels)
        else:
            labels = {"fine_labels": fine[part], "coarse_labels": coarse[part]}
            write_batch(root / "cifar-100-python" / split, images[part], True, **labels)


def cut(path: Path) -> Path:
    """The file without its second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


class TestCifar10(DatasetContract):
    dataset = "cifar10"
    classes_of: ClassVar = {"cifar10": [6] * 10}

    def write(self, root: Path) -> None:
        write_cifar10(root)

    def spoil(self, root: Path) -> Path:
        return cut(root / "cifar-10-batches-py/data_batch_3")


class TestCifar100(DatasetContract):
    dataset = "cifar100"
    params: ClassVar = {"labels": "both"}
    classes_of: ClassVar = {"cifar100": [3] * 100}

    def write(self, root: Path) -> None:
        write_cifar100(root, parquet=True)

    def spoil(self, root: Path) -> Path:
        return cut(root / "cifar100/cifar100/train-00000-of-00001.parquet")


class TestCifar10LongTail(DatasetContract):
    dataset = "cifar10-lt"
    params: ClassVar = {"imbalance": 2.0, "val": 0.25}
    classes_of: ClassVar = {"cifar10": [6] * 10}

    def write(self, root: Path) -> None:
        write_cifar10(root, parquet=True)

    def spoil(self, root: Path) -> Path:
        return cut(root / "cifar10/plain_text/train-00001-of-00002.parquet")


class TestCifar100LongTail(DatasetContract):
    dataset = "cifar100-lt"
    params: ClassVar = {"imbalance": 2.0, "labels": "coarse"}
    classes_of: ClassVar = {"cifar100": [15] * 20}

    def write(self, root: Path) -> None:
        write_cifar100(root)

    def spoil(self, root: Path) -> Path:
        return cut(root / "cifar-100-python/train")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def opened(root: Path, name: str = "cifar10", **params) -> Loaded:
    return open_data(name, params, root, root.parent / "cache")


def refused(root: Path, name: str = "cifar10", **params) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, name, **params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "write"), [("cifar10", write_cifar10), ("cifar100", write_cifar100)])
def test_both_layouts_hold_the_same_images(tmp_path, name, write):
    """Broken if colours, rows or columns are mixed up in one of the layouts, or the test part is another."""
    write(tmp_path / "a/root")
    write(tmp_path / "b/root", parquet=True)
    ours, theirs = (opened(tmp_path / where / "root", name) for where in "ab")
    assert ours.hash == theirs.hash
    images = ours.domains[0].images.permute(0, 2, 3, 1)
    assert torch.equal(images, torch.from_numpy(pictures(len(images))))
    assert ours.domains[0].test.tolist() == list(range(2 * len(images) // 3, len(images)))


def test_archive_is_checked_and_unpacked(root, monkeypatch):
    """Broken if the archive as published is not found in the data root, or one with another content is unpacked."""
    write_cifar10(root / "made")
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(root / "made/cifar-10-batches-py", "cifar-10-batches-py")
    assert "cifar-10-python.tar.gz" in refused(root)
    bare = dataclasses.replace(Cifar10.remotes["cifar10"][0], sha256=None, md5=None, size=None)
    monkeypatch.setattr(Cifar10, "remotes", {"cifar10": (bare,)})
    assert len(opened(root).domains[0].labels) == 60
    assert not (root / "cifar10-python").exists(), "unpacked into the data root"


def test_pickle_runs_nothing(root, tmp_path):
    """Broken if a file made by an attacker can run a program when it is read."""

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    write_cifar10(root)
    path = root / "cifar-10-batches-py/data_batch_2"
    for payload in (Attack(), {b"data": Attack()}, {b"data": np.array([Attack()], object)}):
        path.write_bytes(pickle.dumps(payload, protocol=2))
        assert "data_batch_2" in refused(root)
        for use in (b"cnumpy\nload\n(S'x'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"cos\nsystem\n(S'true'\ntR."):
            path.write_bytes(use)
            assert "asks for" in refused(root)
    assert not (tmp_path / "ran").exists()


def test_wrong_batches_are_told(root):
    """Broken if labels beyond the classes, lost labels or other arrays are taken for images."""
    write_cifar10(root)
    path = root / "cifar-10-batches-py/data_batch_1"
    write_batch(path, pictures(3), labels=np.array([1, 10, 2]))
    assert "row 1" in refused(root)
    write_batch(path, pictures(3), labels=np.array([1, 2]))
    assert "2 labels for 3 images" in refused(root)
    write_batch(path, pictures(3).astype(np.float32), labels=np.array([1, 2, 3]))
    assert "uint8" in refused(root)
    write_batch(path, pictures(3), fine_labels=np.array([1, 2, 3]))
    assert "labels" in refused(root)
    path.unlink()
    assert f"{path} is missing" in refused(root)


def test_wrong_shards_are_told(root):
    """Broken if a set with a lost shard, no test part, or classes in another order is taken for CIFAR-10."""
    write_cifar10(root, parquet=True)
    folder = root / "cifar10/plain_text"
    one = folder / "train-00001-of-00002.parquet"
    kept = one.read_bytes()
    one.unlink()
    assert f"{one} is missing" in refused(root)
    one.write_bytes(kept)
    (folder / "test-00000-of-00001.parquet").rename(folder / "x")
    assert "test-*.parquet" in refused(root)
    (folder / "x").rename(folder / "test-00000-of-00001.parquet")
    table = datasets.Dataset.from_parquet(str(one), cache_dir=str(root / "c"))
    order = [*Cifar10.classes[1:], "airplane"]
    table.cast_column("label", datasets.ClassLabel(names=order)).to_parquet(folder / "train-00000-of-00002.parquet")
    assert "counts 'automobile' as class 0" in refused(root)
    (folder / "train-00000-of-00002.parquet").write_bytes(kept)
    table.rename_column("label", "kind").to_parquet(one)
    assert f"{one} has no column 'label'" in refused(root)


def test_bad_image_is_named_by_file_and_row(root):
    """Broken if a user does not learn which of 60,000 images is damaged."""
    write_cifar10(root, parquet=True)
    path = root / "cifar10/plain_text/train-00001-of-00002.parquet"
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(root / "c")).cast_column(
        "img", datasets.Image(decode=False)
    )
    rows = table.to_list()
    rows[7]["img"]["bytes"] = rows[7]["img"]["bytes"][:50]
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(path)
    assert f"{path}, row 7" in refused(root)


def test_superclasses_are_the_published_ones():
    """Broken if a class is put under another superclass than the files put it."""
    published = (
        "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 "
        "12 14 16 9 11 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 "
        "9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13 "
    )
    assert list(FINE_TO_COARSE) == [int(c) for c in published.split()]
    assert len(set(FINE)) == 100
    assert np.bincount(FINE_TO_COARSE).tolist() == [5] * 20


def test_labels_are_fine_coarse_or_both(root):
    """Broken if the two tasks of CIFAR-100 are exchanged, or the second head gets no classes."""
    write_cifar100(root)
    fine, coarse, both = (opened(root, "cifar100", labels=kind) for kind in ("fine", "coarse", "both"))
    assert (fine.classes, coarse.classes, both.classes) == (FINE, COARSE, FINE)
    assert torch.equal(fine.domains[0].labels, both.domains[0].labels)
    assert torch.equal(torch.tensor(FINE_TO_COARSE)[fine.domains[0].labels], coarse.domains[0].labels)
    assert (both.superclasses, both.superclass) == (COARSE, FINE_TO_COARSE)
    assert (fine.superclasses, coarse.superclasses) == ((), ())


def test_class_with_two_superclasses_is_told(root):
    """Broken if a mislabelled file trains the second head wrongly."""
    write_cifar100(root)
    fine = np.arange(100)
    coarse = np.asarray(FINE_TO_COARSE)
    coarse[3] = 0
    write_batch(root / "cifar-100-python/test", pictures(100), fine_labels=fine, coarse_labels=coarse)
    text = refused(root, "cifar100")
    assert "row 3: 'bear'" in text
    assert "large_carnivores" in text


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Loaded:
    return open_data("cifar10-lt", {}, REAL, tmp_path_factory.mktemp("cache"))


def kept(loaded: Loaded, **params) -> tuple[list[int], list[int]]:
    """Images of each class that train or validate, and that test."""
    params = loaded.params.model_copy(update=params)
    split = make_splits(dataclasses.replace(loaded, params=params), 0)[loaded.names[0]]
    labels, n = loaded.domains[0].labels, len(loaded.classes)
    assert len(torch.cat([split.train, split.val]).unique()) == len(split.train) + len(split.val)
    parts = (torch.cat([split.train, split.val]), split.test)
    return tuple(torch.bincount(labels[part], minlength=n).tolist() for part in parts)


@needs_real
def test_real_subset(real):
    """Broken if images of the real files are lost, or are no photographs any more."""
    domain = real.domains[0]
    assert domain.images.shape == (22_431, 3, 32, 32)
    labels, test = domain.labels, domain.test
    assert torch.bincount(labels[test]).tolist() == [200] * 10
    assert (torch.bincount(labels) - 200).tolist() == TRAIN
    mean = domain.images[labels == 0].float().mean((0, 2, 3)) / 255  # airplanes: sky, so blue is the brightest
    assert mean[2] > mean[1] > 0.5
    published = torch.tensor([0.4914, 0.4822, 0.4465])  # of the balanced set
    balanced = torch.stack([domain.images[labels == c].float().mean((0, 2, 3)) for c in range(10)]).mean(0) / 255
    assert (balanced - published).abs().max() < 0.01


@needs_real
@pytest.mark.parametrize("imbalance", [10, 50, 200])
def test_real_long_tail(real, imbalance):
    """Broken if a long-tailed run trains on other counts than the papers', or is tested on unequal classes."""
    closed = [int(5000 * imbalance ** (-i / 9) + 1e-9) for i in range(10)]
    for rule, list_ in (("ldam", closed), ("climbq", CLIMBQ[imbalance])):
        for val in (0.0, 0.1):
            train, test = kept(real, imbalance=float(imbalance), lt_list=rule, val=val)
            assert train == list_, rule
            assert test == [200] * 10
    assert (imbalance != 10) or closed == TRAIN
    assert sum(CLIMBQ[imbalance]) == {10: 20_425, 50: 13_988, 200: 11_199}[imbalance]


def test_long_tail_shares_the_images(root):
    """Broken if the long-tailed set is prepared a second time, or is long-tailed only when asked to be."""
    write_cifar10(root)
    plain, tail = opened(root), opened(root, "cifar10-lt")
    assert (plain.params.imbalance, tail.params.imbalance) == (None, 50)
    assert len(list((root.parent / "cache").glob("*/meta.json"))) == 1


@pytest.mark.parametrize(
    ("imbalance", "images", "classes", "least"), [(10, 18_292, 100, 32), (50, 11_761, 90, 1), (200, 8_883, 72, 1)]
)
def test_cifar100_long_tail(imbalance, images, classes, least):
    """Broken if the lists of CIFAR-100 lose other classes than the authors' own, or `ldam` loses any."""
    labels = torch.arange(100).repeat(600)
    made = Domain("cifar100", torch.zeros(60_000, 3, 2, 2, dtype=torch.uint8), labels, torch.arange(50_000, 60_000))
    loaded = Loaded("cifar100-lt", [made], "made", FINE, params=Cifar100.Params())
    train, test = kept(loaded, imbalance=float(imbalance), lt_list="climbq")
    present = [n for n in train if n]
    assert (sum(train), len(present), min(present)) == (images, classes, least)
    assert test == [100] * 100
    train, test = kept(loaded, imbalance=float(imbalance), lt_list="ldam")
    assert train == sorted(train, reverse=True)
    assert (train[0], train[-1]) == (500, int(500 / imbalance + 1e-9))
    assert test == [100] * 100


def test_any_set_can_be_long_tailed(tmp_path):
    """Broken if `imbalance` works for the sets named -lt only."""
    loaded = open_data("optdigits", {"imbalance": 5, "domains": ["scanned"]}, None, tmp_path)
    train, test = kept(loaded)
    assert max(train) / min(train) == pytest.approx(5, rel=0.1)
    assert len(set(test)) == 1
    assert isinstance(loaded.params, DataSet.Params)
