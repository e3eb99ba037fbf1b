"""`digits`, on tiny files in the official layout, and on the real ones where they are."""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.data import DataModule, make_splits, open_data
from qatbench.bench.errors import UserError
from qatbench.datasets.digits import Digits

REAL = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()


class TinyDigits(Digits):
    """The same reader; the files are not the official ones, so no hash is expected of them."""

    name = "tiny_digits"
    sha256 = {}  # noqa: RUF012


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), mtime=0))


@pytest.fixture
def root(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "data"
    raw, usps, blend, fonts = (root / f for f in ("MNIST/raw", "USPS", "mnist_m", "chars74k_digits/English/Fnt"))
    for folder in (raw, usps, blend / "mnist_m_train", blend / "mnist_m_test", fonts):
        folder.mkdir(parents=True)
    for kind, n in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{kind}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(raw / f"{kind}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    for name, n in (("usps.bz2", 50), ("usps.t.bz2", 20)):
        rows = [
            f"{i % 10 + 1} " + " ".join(f"{k + 1}:{v:.3g}" for k, v in enumerate(rng.uniform(-1, 1, 256)))
            for i in range(n)
        ]
        (usps / name).write_bytes(bz2.compress("\n".join(rows).encode()))
    for kind, numbers in (("train", range(0, 60, 2)), ("test", range(20))):
        names = [f"{i:08d}.png" for i in numbers]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(blend / f"mnist_m_{kind}" / name)
        lines = [f"{name} {int(Path(name).stem) % 10}" for name in names]
        (blend / f"mnist_m_{kind}_labels.txt").write_text("\n".join(lines) + "\n")
    for digit in range(10):
        sample = fonts / f"Sample{digit + 1:03d}"
        sample.mkdir()
        for i in range(1, 41):
            Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(sample / f"img{digit + 1:03d}-{i:05d}.png")
    return root


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
        assert d.labels.unique().tolist() == list(range(10)) if d.name != "mnist_m" else len(d.labels.unique()) == 10


def test_pixels_are_those_of_the_files(root, tmp_path):
    """Broken if rows and columns are exchanged, a grey is shifted, or images and labels get out of step."""
    loaded = opened(root, tmp_path)
    raw = gzip.decompress((root / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes())[16:]
    mnist = np.frombuffer(raw, np.uint8).reshape(60, 28, 28)
    assert np.array_equal(loaded["mnist"].images[:60, 2].numpy(), mnist)
    png = np.asarray(Image.open(root / "chars74k_digits/English/Fnt/Sample003/img003-00002.png"))
    assert np.array_equal(loaded["chars74k"].images[81, 0].numpy(), png)
    png = Image.open(root / "mnist_m/mnist_m_train/00000006.png").resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(loaded["mnist_m"].images[3].permute(1, 2, 0).numpy(), np.asarray(png))
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
        (MNIST_IMAGES, text(b""), "wrong magic|truncated"),
        (MNIST_IMAGES, text(gzip.compress(b"\0\0\x09\x03" + bytes(40))), "wrong magic number"),
        (MNIST_IMAGES, text(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(40))), "announces"),
        (MNIST_IMAGES, Path.unlink, "is missing"),
        (MNIST_IMAGES, make_folder, "is a directory|is missing"),
        (MNIST_IMAGES, loop, "cannot read"),
        (MNIST_LABELS, labels(*[10] * 20), r"no digit \(10\)"),
        (MNIST_LABELS, labels(1, 2, 3), "3 labels for 20 images"),
        (USPS, cut, "is truncated"),
        (USPS, text(b"garbage"), "is damaged"),
        (USPS, text(bz2.compress(b"7 1:0.5 hello\n")), "not LIBSVM"),
        (USPS, text(bz2.compress(b"7 300:0.5\n")), "not LIBSVM"),
        (USPS, text(bz2.compress(b"12 1:0.5\n")), "no digit"),
        (USPS, text(bz2.compress(b"7 1:5\n")), "beyond -1..1"),
        (USPS, text(bz2.compress(b"7 1:nan\n")), "beyond -1..1"),
        (USPS, text(bz2.compress(b"")), "USPS"),
        (LIST, text(b"00000002.png\n"), "line 1"),
        (LIST, text(b"00000002.png 12\n"), "no digit"),
        (LIST, text(b""), "is empty"),
        (LIST, text(b"\xff\xfe\0"), "line 1"),
        (PNG, cut, "not a whole PNG"),
        (PNG, text(b"\x89PNG\r\n"), "not a whole PNG"),
        (PNG, Path.unlink, "is missing"),
        (GLYPH, cut, "not a whole PNG"),
        (GLYPH, make_folder, "is a directory"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(root, tmp_path, name, harm, says):
    """Broken if a bad file ends in a traceback, goes unnamed, or is silently trained on."""
    harm(root / name)
    with pytest.raises(UserError, match=says) as error:
        opened(root, tmp_path)
    assert Path(name).name in str(error.value)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache").glob("*") if p.is_dir()]


def test_wrong_hash_is_told(root, tmp_path):
    """Broken if files that only look like MNIST give numbers that are called MNIST's."""
    with pytest.raises(UserError, match=r"t.*-ubyte.gz is not the official file \(wrong sha256"):
        opened(root, tmp_path, Digits)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (None, "give --data-root DIR"),
        ("nowhere", "does not exist"),
        ("a file", "is not a directory"),
        ("empty", "MNIST/raw is missing: put the files of 'mnist' there"),
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
    return open_data(Digits, {}, REAL, tmp_path_factory.mktemp("cache"))


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
    assert len(set(real["mnist_m"].labels.bincount().tolist())) == 1
    assert len(set(real["chars74k"].labels.bincount().tolist())) == 1


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
