"""`digits`, `svhn` and `syndigits-lt`, on tiny files in the official layout, and on the real ones where they are."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import os
import shutil
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.data import DataModule, make_splits, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.longtail import tail_counts
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.digits import SVHN, Digits, SynDigitsLT
from scipy.io import savemat

PIXELS = "f8126f599b9be5ee729f8e3fb628151289fe6d3dd5d1e9fcb597350771b17c1d"  # of version 1, with their labels
REAL = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()


class TinyDigits(Digits):
    """The same reader; the files are not the official ones, so no hash is expected of them."""

    name = "tiny_digits"
    remotes: ClassVar = {}


class TinySVHN(SVHN):
    name = "tiny_svhn"
    remotes: ClassVar = {}


class TinySynDigitsLT(SynDigitsLT):
    name = "tiny_syndigits-lt"
    remotes: ClassVar = {}


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), mtime=0))


def write_mnist(raw: Path, rng: np.random.Generator) -> None:
    raw.mkdir(parents=True)
    for kind, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{kind}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(raw / f"{kind}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))


def write_usps(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir()
    for name, n in (("usps.bz2", 50), ("usps.t.bz2", 20)):
        rows = [
            f"{i % 10 + 1} " + " ".join(f"{k + 1}:{v:.3g}" for k, v in enumerate(rng.uniform(-1, 1, 256)))
            for i in range(n)
        ]
        (folder / name).write_bytes(bz2.compress("\n".join(rows).encode()))


def write_mnist_m(folder: Path, rng: np.random.Generator) -> None:
    for kind, numbers in (("train", [i for i in range(60) if i // 10 % 2 == 0]), ("test", range(20))):
        (folder / f"mnist_m_{kind}").mkdir(parents=True)
        names = [f"{i:08d}.png" for i in numbers]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"mnist_m_{kind}" / name)
        lines = [f"{name} {int(Path(name).stem) % 10}" for name in names]
        (folder / f"mnist_m_{kind}_labels.txt").write_text("\n".join(lines) + "\n")


def write_samples(folder: Path, rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> None:
    for digit in range(10):
        sample = folder / f"Sample{digit + 1:03d}"
        sample.mkdir(parents=True)
        for i in range(1, n + 1):
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(sample / f"img{digit + 1:03d}-{i:05d}.png")


def write_mat(path: Path, rng: np.random.Generator, n: int, first: int) -> None:
    path.parent.mkdir(exist_ok=True)
    labels = (np.arange(n) % 10 + first).astype(np.uint8)
    savemat(path, {"X": rng.integers(0, 256, (32, 32, 3, n), np.uint8), "y": labels[:, None]}, do_compression=True)


def write_all(root: Path) -> None:
    """Every domain in its official layout; SVHN's labels are 1, 2, ..., 9, 10 for 0."""
    rng = np.random.default_rng(0)
    write_mnist(root / "MNIST/raw", rng)
    write_usps(root / "USPS", rng)
    write_mnist_m(root / "mnist_m", rng)
    write_samples(root / "chars74k_digits/English/Fnt", rng, 40, (28, 28))
    for kind, n in (("Good", 4), ("Bad", 3)):
        write_samples(
            root / f"chars74k_digits/English/Img/{kind}Img/Bmp".replace("BadImg", "BadImag"), rng, n, (30, 21, 3)
        )
    for part, n in (("train", 50), ("test", 20)):
        write_mat(root / f"SynDigits/synth_{part}_32x32.mat", rng, n, 0)
        write_mat(root / f"SVHN/{part}_32x32.mat", rng, n, 1)


@pytest.fixture
def root(tmp_path):
    write_all(tmp_path / "data")
    return tmp_path / "data"


def opened(root: Path, cache: Path, cls: type[Digits] = TinyDigits, **params):
    return open_data(cls, params, root, cache / "cache")


def test_all_four_domains_become_3x28x28(root, tmp_path):
    """Broken if a domain comes in another size, with other labels, or without its official test part."""
    loaded = opened(root, tmp_path)
    assert loaded.names == ("mnist", "usps", "mnist_m", "chars74k")
    assert [len(d.labels) for d in loaded.domains] == [80, 70, 50, 400]
    assert [None if d.test is None else len(d.test) for d in loaded.domains] == [20, 20, 20, None]
    for d in loaded.domains:
        assert d.images.shape[1:] == (3, 28, 28)
        assert d.labels.unique().tolist() == list(range(10))


EVEN, MNIST_M = [7] * 10, [5] * 10


class TestDigits(DatasetContract):
    dataset = "digits"
    params: ClassVar = {"domains": Digits.domains}
    classes_of: ClassVar = {
        "mnist": [8] * 10, "usps": EVEN, "mnist_m": MNIST_M, "chars74k": [40] * 10,
        "syndigits": EVEN, "svhn": EVEN, "chars74k_street": EVEN,
    }  # fmt: skip

    def write(self, root: Path) -> None:
        write_all(root)

    def spoil(self, root: Path) -> Path:
        cut(root / MNIST_IMAGES)
        return root / MNIST_IMAGES


class TestSVHN(DatasetContract):
    dataset = "svhn"
    classes_of: ClassVar = {"svhn": EVEN}

    def write(self, root: Path) -> None:
        write_all(root)

    def spoil(self, root: Path) -> Path:
        cut(root / SVHN_TEST)
        return root / SVHN_TEST


class TestSynDigitsLT(DatasetContract):
    dataset = "syndigits-lt"
    params: ClassVar = {"imbalance": 2.0, "val": 0.4}
    classes_of: ClassVar = {"syndigits": EVEN}

    def write(self, root: Path) -> None:
        write_all(root)

    def spoil(self, root: Path) -> Path:
        cut(root / SYNTH)
        return root / SYNTH


@pytest.mark.parametrize("size", [28, 32])
def test_every_domain_in_both_sizes(root, tmp_path, size):
    """Broken if a domain does not follow `size`, or an image that has the size already is filtered."""
    loaded = opened(root, tmp_path, domains=Digits.domains, size=size)
    assert loaded.names == Digits.domains
    assert {tuple(d.images.shape[1:]) for d in loaded.domains} == {(3, size, size)}
    path = root / "mnist_m/mnist_m_train/00000006.png"
    png = Image.open(path) if size == 32 else Image.open(path).resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(loaded["mnist_m"].images[6].permute(1, 2, 0).numpy(), np.asarray(png))


def test_svhn_and_syndigits_show_the_files_images(root, tmp_path):
    """Broken if rows and columns of a MAT file are exchanged, SVHN's 0 is not its 10, or SynDigits' labels are shifted."""
    for name, (path, shift) in {"svhn": (SVHN_TEST, 1), "syndigits": (SYNTH, 0)}.items():
        domain = opened(root, tmp_path, domains=[name], size=32)[name]
        x = np.random.default_rng(5).integers(0, 256, (32, 32, 3, 20), np.uint8)
        savemat(root / path, {"X": x, "y": (np.arange(20) % 10 + shift)[:, None]}, do_compression=False)
        domain = opened(root, tmp_path, domains=[name], size=32)[name]
        rows = domain.test if name == "svhn" else torch.arange(20)
        assert np.array_equal(domain.images[rows].permute(2, 3, 1, 0).numpy(), x)
        assert domain.labels[rows].tolist() == [(i % 10 + shift) % 10 for i in range(20)]
        small = opened(root, tmp_path, domains=[name])[name].images[rows[4]]
        want = Image.fromarray(np.ascontiguousarray(x[..., 4])).resize((28, 28), Image.Resampling.BICUBIC)
        assert np.array_equal(small.permute(1, 2, 0).numpy(), np.asarray(want))


def test_svhn_alone_is_32x32(root, tmp_path):
    """Broken if SVHN by itself is reduced, or needs any other domain's files."""
    shutil.rmtree(root / "MNIST")
    loaded = opened(root, tmp_path, TinySVHN)
    assert loaded.names == ("svhn",)
    assert loaded.size == (32, 32)
    assert loaded.augment == "shift"


def test_street_digits_are_the_good_and_the_bad(root, tmp_path):
    """Broken if the bad photographs are left out, or take other digits' labels."""
    domain = opened(root, tmp_path, domains=["chars74k_street"])["chars74k_street"]
    assert domain.test is None
    assert domain.labels.tolist() == [digit for digit in range(10) for _ in range(7)]
    bad = Image.open(root / "chars74k_digits/English/Img/BadImag/Bmp/Sample002/img002-00001.png")
    want = np.asarray(bad.resize((28, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(domain.images[7 + 4].permute(1, 2, 0).numpy(), want)


def test_syndigits_lt_has_the_papers_counts(tmp_path):
    """Broken if the largest class is not 1,000 images, or the test part not 2,000, as in EmaQ-LT's tables."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 11_000), ("test", 2_500)):
        write_mat(tmp_path / f"SynDigits/synth_{part}_32x32.mat", rng, n, 0)
    loaded = opened(tmp_path, tmp_path, TinySynDigitsLT, imbalance=200.0, lt_list="climbq")
    domain, split = loaded.domains[0], make_splits(loaded, 0)["syndigits"]
    assert domain.labels.bincount().tolist() == [1200] * 10
    kept = domain.labels[torch.cat([split.train, split.val])].bincount().tolist()
    assert kept == [1000, 555, 308, 170, 94, 52, 28, 15, 8, 4]
    assert domain.labels[split.test].bincount().tolist() == [200] * 10
    default = make_splits(opened(tmp_path, tmp_path, TinySynDigitsLT), 0)["syndigits"]
    kept = domain.labels[torch.cat([default.train, default.val])].bincount().tolist()
    assert kept == tail_counts([1000] * 10, 50, "ldam")


def test_syndigits_lt_is_the_first_images(root, tmp_path):
    """Broken if the images that are kept are others than the docstring says."""

    class Few(TinySynDigitsLT):
        name = "few"
        most = (3, 1)

    few = opened(root, tmp_path, Few, imbalance=1).domains[0]
    whole = opened(root, tmp_path, domains=["syndigits"])["syndigits"]
    assert torch.equal(few.images, whole.images[[*range(30), *range(50, 60)]])
    assert few.test.tolist() == list(range(30, 40))


def test_archives_are_unpacked(root, tmp_path):
    """Broken if a data root of the published archives, as they are fetched, is not enough."""
    with tarfile.open(root / "mnist_m.tar.gz", "w:gz") as archive:
        archive.add(root / "mnist_m", "mnist_m")
    for name, folder in (("EnglishFnt", "Fnt"), ("EnglishImg", "Img")):
        (root / "chars74k").mkdir(exist_ok=True)
        with tarfile.open(root / f"chars74k/{name}.tgz", "w:gz") as archive:
            archive.add(root / "chars74k_digits/English" / folder, f"English/{folder}")
    shutil.make_archive(str(root / "SynthDigits"), "zip", root / "SynDigits")
    names = ["mnist_m", "chars74k", "syndigits", "chars74k_street"]
    before = opened(root, tmp_path, domains=names)
    for folder in ("mnist_m", "chars74k_digits", "SynDigits"):
        shutil.rmtree(root / folder)
    remotes = {n: tuple(dataclasses.replace(r, md5=None) for r in Digits.remotes[n]) for n in names}
    published = type("Published", (TinyDigits,), {"remotes": remotes})
    assert opened(root, tmp_path, published, domains=names).hash == before.hash


def test_plain_idx_files_will_do(root, tmp_path):
    """Broken if MNIST that torchvision has unpacked is not found."""
    before = opened(root, tmp_path, domains=["mnist"])
    for path in sorted((root / "MNIST/raw").glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert opened(root, tmp_path, domains=["mnist"]).hash == before.hash


def test_pixels_are_those_of_the_files(root, tmp_path):
    """Broken if rows and columns are exchanged, a grey is shifted, or images and labels get out of step."""
    loaded = opened(root, tmp_path)
    raw = gzip.decompress((root / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes())[16:]
    mnist = np.frombuffer(raw, np.uint8).reshape(60, 28, 28)
    assert np.array_equal(loaded["mnist"].images[:60, 2].numpy(), mnist)
    png = np.asarray(Image.open(root / "chars74k_digits/English/Fnt/Sample003/img003-00002.png"))
    assert np.array_equal(loaded["chars74k"].images[81, 0].numpy(), png)
    png = Image.open(root / "mnist_m/mnist_m_train/00000006.png").resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(loaded["mnist_m"].images[6].permute(1, 2, 0).numpy(), np.asarray(png))
    first = bz2.decompress((root / "USPS/usps.bz2").read_bytes()).split(b"\n")[0].split()[1:]
    grey = np.array([(float(v.split(b":")[1]) + 1) * 127.5 for v in first]).round().astype(np.uint8).reshape(16, 16)
    large = np.asarray(Image.fromarray(grey).resize((28, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(loaded["usps"].images[0, 1].numpy(), large)


def test_sources_and_fonts_stay_in_one_part(root, tmp_path):
    """Broken if an MNIST digit validates while its MNIST-M image trains, or a font both trains and tests."""
    loaded = opened(root, tmp_path)
    splits = make_splits(loaded, 0)
    blend, mnist = loaded["mnist_m"], splits["mnist"]
    for part in ("train", "val", "test"):
        sources = blend.group[getattr(splits["mnist_m"], part)]
        sources = torch.where(
            sources >= 60_000, sources - 60_000 + 60, sources
        )  # there are 60 training digits here, not 60,000
        assert set(sources.tolist()) <= set(getattr(mnist, part).tolist())
    fonts, chars = loaded["chars74k"].group, splits["chars74k"]
    parts = [set(fonts[getattr(chars, p)].tolist()) for p in ("train", "val", "test")]
    assert [len(p) for p in parts] == [7, 1, 2]
    assert len(set.union(*parts)) == 10


def test_limit_and_domains(root, tmp_path):
    """Broken if the limit cuts the test part, or a domain that is not asked for must be there."""
    shutil.rmtree(root / "USPS")
    loaded = opened(root, tmp_path, domains=["chars74k", "mnist"], limit=20)
    assert loaded.names == ("mnist", "chars74k")
    splits = make_splits(loaded, 0)
    assert [len(s.train) + len(s.val) for s in splits.values()] == [20, 20]
    assert len(splits["mnist"].test) == 20
    assert DataModule(loaded, "mdl", 0, 10).steps == 4


def test_a_changed_file_is_read_again(root, tmp_path):
    """Broken if data that was mended, or swapped, still comes from the cache."""
    first = opened(root, tmp_path, domains=["mnist"])
    path = root / "MNIST/raw/train-labels-idx1-ubyte.gz"
    write_idx(path, ((np.arange(60) + 1) % 10).astype(np.uint8))
    os.utime(path, (1, 1))
    assert opened(root, tmp_path, domains=["mnist"]).hash != first.hash


MNIST_IMAGES, MNIST_LABELS = "MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte.gz"
USPS, LIST = "USPS/usps.t.bz2", "mnist_m/mnist_m_train_labels.txt"
PNG, GLYPH = "mnist_m/mnist_m_test/00000003.png", "chars74k_digits/English/Fnt/Sample004/img004-00007.png"

SVHN_TEST, SYNTH = "SVHN/test_32x32.mat", "SynDigits/synth_train_32x32.mat"
STREET = "chars74k_digits/English/Img/BadImag/Bmp/Sample010/img010-00002.png"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def text(content: bytes):
    return lambda path: path.write_bytes(content)


def labels(*values: int):
    return lambda path: write_idx(path, np.array(values, np.uint8))


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        (MNIST_IMAGES, cut, "is truncated"),
        (MNIST_IMAGES, text(b"not gzip at all"), "is damaged"),
        (MNIST_IMAGES, text(b""), "wrong magic|truncated|is empty"),
        (MNIST_IMAGES, text(gzip.compress(b"\0\0\x09\x03" + bytes(40))), "wrong magic number"),
        (MNIST_IMAGES, text(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(40))), "announces"),
        (MNIST_IMAGES, Path.unlink, "is missing"),
        (MNIST_IMAGES, make_folder, "is a directory|is missing"),
        (MNIST_IMAGES, loop, "cannot read|is missing"),
        (MNIST_LABELS, labels(*[10] * 20), "label 10, but labels are 0..9"),
        (MNIST_LABELS, labels(1, 2, 3), "3 labels for 20 images"),
        (USPS, cut, "is truncated"),
        (USPS, text(b"garbage"), "is damaged"),
        (USPS, text(bz2.compress(b"7 1:0.5 hello\n")), "not LIBSVM"),
        (USPS, text(bz2.compress(b"7 300:0.5\n")), "not LIBSVM"),
        (USPS, text(bz2.compress(b"12 1:0.5\n")), "label 12, but labels are 1..10"),
        (USPS, text(bz2.compress(b"7 1:5\n")), "beyond -1..1"),
        (USPS, text(bz2.compress(b"7 1:nan\n")), "beyond -1..1"),
        (USPS, text(bz2.compress(b"")), "USPS"),
        (LIST, text(b"00000002.png\n"), "line 1"),
        (LIST, text(b"00000002.png 12\n"), "label 12, but labels are 0..9"),
        (LIST, text(b"../2.png 1\n"), "line 1"),
        (LIST, text(b""), "is empty"),
        (LIST, text(b"\xff\xfe\0"), "line 1"),
        (PNG, cut, "is damaged, cut short|is not an image"),
        (PNG, text(b"\x89PNG\r\n"), "is damaged, cut short|is not an image"),
        (PNG, Path.unlink, "is missing"),
        (GLYPH, cut, "is damaged, cut short|is not an image"),
        (GLYPH, make_folder, "is a directory"),
        (SVHN_TEST, cut, "is not a whole MAT file"),
        (SVHN_TEST, text(b"<html>404</html>"), "is not a whole MAT file"),
        (SVHN_TEST, lambda path: write_mat(path, np.random.default_rng(0), 20, 0), "label 0, but labels are 1..10"),
        (SVHN_TEST, Path.unlink, "is missing"),
        (SYNTH, cut, "is not a whole MAT file"),
        (SYNTH, lambda path: write_mat(path, np.random.default_rng(0), 20, 1), "label 10, but labels are 0..9"),
        (STREET, text(b"not a png"), "is not an image"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(root, tmp_path, name, harm, says):
    """Broken if a bad file ends in a traceback, goes unnamed, or is silently trained on."""
    harm(root / name)
    with pytest.raises(UserError, match=says) as error:
        opened(root, tmp_path, domains=Digits.domains)
    assert Path(name).name in str(error.value)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache").glob("*") if p.is_dir()]


def test_wrong_hash_is_told(root, tmp_path):
    """Broken if files that only look like MNIST give numbers that are called MNIST's."""
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is not the file that was published"):
        opened(root, tmp_path, Digits)
    with pytest.raises(UserError, match=r"train_32x32.mat is not the file that was published"):
        opened(root, tmp_path, SVHN)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (None, "give --data-root DIR"),
        ("nowhere", "does not exist"),
        ("a file", "is not a directory"),
        ("empty", "train-images-idx3-ubyte.gz is missing: put the files of 'mnist' there"),
    ],
)
def test_wrong_data_roots_say_how_to_mend_them(tmp_path, where, says):
    """Broken if a wrong --data-root ends in a traceback."""
    (tmp_path / "a file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=says):
        opened(tmp_path / where if where else None, tmp_path)


def test_an_unknown_domain_names_the_nearest(root, tmp_path):
    """Broken if a misspelt domain is left out silently."""
    with pytest.raises(UserError, match="mean 'mnist_m'"):
        opened(root, tmp_path, domains=["mnistm"])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not (REAL / "MNIST").is_dir():
        pytest.skip(f"no real images at {REAL}; set QATBENCH_DATA")
    domains = [*Digits.default_domains, "chars74k_street"]
    return open_data(Digits, {"domains": domains}, REAL, tmp_path_factory.mktemp("cache"))


def test_real_files_have_the_published_counts(real):
    """Broken if an image of the real data is lost, or has another label."""
    parts = {}
    for d in real.domains:
        test = len(d.test) if d.test is not None else 0
        parts[d.name] = (len(d.labels) - test, test)
    assert parts["mnist"] == (60_000, 10_000)
    assert parts["usps"] == (7_291, 2_007)
    mnist, usps = real["mnist"], real["usps"]
    assert mnist.labels[:60_000].bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.labels[mnist.test].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert usps.labels[:7_291].bincount().tolist() == [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
    assert usps.labels[usps.test].bincount().tolist() == [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]
    blend = real["mnist_m"]
    assert blend.labels[:7_000].bincount().tolist() == [700] * 10
    assert blend.labels[blend.test].bincount().tolist() == [200] * 10
    assert real["chars74k"].labels.bincount().tolist() == [1016] * 10
    street = real["chars74k_street"].labels.bincount().tolist()
    assert street == [155, 128, 118, 72, 73, 81, 84, 61, 42, 71]
    assert sum(street) == Digits.counts["chars74k_street"]


def test_real_pixels_have_not_moved(real):
    """Broken if results on `digits` that were published before mean other images now."""
    old = [real[d] for d in Digits.default_domains]
    digest = hashlib.sha256()
    for d in old:
        digest.update(d.images.permute(0, 2, 3, 1).contiguous().numpy())
        digest.update(d.labels.numpy())
    assert digest.hexdigest() == PIXELS


def test_real_mnist_m_shows_the_mnist_digit_of_its_number(real):
    """Broken if groups, which keep a digit out of training and test at once, point to other digits."""
    assert torch.equal(real["mnist_m"].labels, real["mnist"].labels[real["mnist_m"].group])


def test_real_fonts_come_four_styles_at_a_time(real):
    """Broken if a font is split between training and test."""
    groups = real["chars74k"].group
    assert groups.unique(return_counts=True)[1].tolist() == [40] * 254


def test_real_split_keeps_to_the_limit(real, tmp_path):
    """Broken if the suite `digits` trains on more images than it says, or tests on fewer."""
    splits = make_splits(open_data(Digits, {"limit": 5000, "domains": ["usps"]}, REAL, tmp_path), 0)
    assert (len(splits["usps"].train), len(splits["usps"].val), len(splits["usps"].test)) == (4500, 500, 2007)
