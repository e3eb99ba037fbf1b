"""`fashion_mnist`, on tiny files in the official layout."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from qatbench.bench.data import open_data
from qatbench.bench.errors import UserError
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.fashion_mnist import FashionMNIST

LABELS = "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz"


class Tiny(FashionMNIST):
    name = "tiny_fashion"
    remotes: ClassVar = {}


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), mtime=0))


def write_all(root: Path) -> dict[str, np.ndarray]:
    rng, raw, images = np.random.default_rng(0), root / "FashionMNIST/raw", {}
    raw.mkdir(parents=True)
    for kind, n in (("train", 50), ("t10k", 20)):
        images[kind] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        write_idx(raw / f"{kind}-images-idx3-ubyte.gz", images[kind])
        write_idx(raw / f"{kind}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return images


class TestFashionMNIST(DatasetContract):
    dataset = "fashion_mnist"
    classes_of: ClassVar = {"fashion_mnist": [7] * 10}

    def write(self, root: Path) -> None:
        write_all(root)

    def spoil(self, root: Path) -> Path:
        (root / LABELS).write_bytes((root / LABELS).read_bytes()[:-9])
        return root / LABELS


def test_pixels_are_those_of_the_files(tmp_path):
    """Broken if rows and columns are exchanged, or the test images are not the official ones."""
    images = write_all(tmp_path)
    (domain,) = open_data(Tiny, {}, tmp_path, tmp_path / "cache").domains
    for channel in range(3):
        assert np.array_equal(domain.images[:50, channel].numpy(), images["train"])
        assert np.array_equal(domain.images[domain.test][:, channel].numpy(), images["t10k"])
    assert domain.labels.tolist() == [i % 10 for i in range(50)] + [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    ("labels", "says"), [([1, 2], "2 labels for 20 images"), ([10] * 20, "label 10, but labels are 0..9")]
)
def test_labels_that_do_not_fit_are_told(tmp_path, labels, says):
    """Broken if images get other images' labels, or a class that does not exist."""
    write_all(tmp_path)
    write_idx(tmp_path / LABELS, np.array(labels, np.uint8))
    with pytest.raises(UserError, match=says):
        open_data(Tiny, {}, tmp_path, tmp_path / "cache")


def test_another_file_is_not_taken_for_the_official_one(tmp_path):
    """Broken if MNIST in Fashion-MNIST's folder gives numbers that are called Fashion-MNIST's."""
    write_all(tmp_path)
    with pytest.raises(UserError, match="is not the file that was published"):
        open_data(FashionMNIST, {}, tmp_path, tmp_path / "cache")
