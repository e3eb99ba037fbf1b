"""Office-31, on tiny files in its layouts and on the real ones."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from pictures import cut_short, write_classes
from qatbench.bench.data import Loaded, make_splits, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.office31 import Office31, alignq_test

DATA = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[3] / "shared" / "data")
real = pytest.mark.skipif(not (DATA / "office31").is_dir(), reason=f"no office31 in {DATA}; set QATBENCH_DATA")
COUNTS = {"amazon": 5, "dslr": 3, "webcam": 4}  # tiny: images a class


def write(root: Path, layout: str = "office31/{}/images") -> None:
    for domain, count in COUNTS.items():
        write_classes(root / layout.format(domain), dict.fromkeys(Office31.classes, count))


class TestOffice31(DatasetContract):
    dataset = "office31"
    params: ClassVar = {"size": 28}
    classes_of: ClassVar = {d: [n] * 31 for d, n in COUNTS.items()}

    def write(self, root):
        write(root)

    def spoil(self, root):
        return cut_short(root / "office31/amazon/images/mug/img_0003.jpg")


class TestOffice31AsInAlignQ(DatasetContract):
    dataset = "office31"
    params: ClassVar = {"size": 28, "split": "alignq", "domains": ["dslr", "webcam"]}
    classes_of: ClassVar = {"dslr": [3] * 31, "webcam": [4] * 31}

    def write(self, root):
        write(root)

    def spoil(self, root):
        return cut_short(root / "office31/dslr/images/back_pack/img_0000.jpg")


@pytest.mark.parametrize(
    "layout", ["office31/domain_adaptation_images/{}/images", "domain_adaptation_images/{}/images"]
)
def test_unpacked_where_the_archive_puts_it(tmp_path, layout):
    """Broken if a user had to move the folders of the official archive."""
    write(tmp_path, layout)
    assert [len(d.labels) for d in Office31(root=tmp_path).load()] == [155, 93, 124]


@pytest.mark.parametrize("inside", ["domain_adaptation_images/{}/images", "{}/images"])
def test_official_archive_is_unpacked(tmp_path, inside):
    """Broken if a user with the archive in the data root had to unpack it."""
    write(tmp_path / "made", inside)
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root/domain_adaptation_images.tar.gz", "w:gz") as tar:
        for path in (tmp_path / "made").iterdir():
            tar.add(path, path.name)
    dataset = Office31(root=tmp_path / "root", downloads=tmp_path / "downloads")
    assert [len(d.labels) for d in dataset.load()] == [155, 93, 124]
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["domain_adaptation_images.tar.gz"]


def test_archive_of_one_domain_is_unpacked(tmp_path):
    """Broken if the files of the mirror could be fetched but not read."""
    write(tmp_path / "made", "{}/images")
    (tmp_path / "root/office31").mkdir(parents=True)
    with tarfile.open(tmp_path / "root/office31/dslr.tgz", "w:gz") as tar:
        tar.add(tmp_path / "made/dslr", "dslr")
    params = Office31.Params(domains=("dslr",))
    (dslr,) = Office31(params, tmp_path / "root", tmp_path / "downloads").load()
    assert len(dslr.labels) == 93


def test_missing_domain_says_how_to_get_it(tmp_path):
    """Broken if a user without the images did not learn where they are."""
    with pytest.raises(
        UserError, match=r"office31/amazon/images is missing: .*data prepare office31.*drive\.google\.com"
    ):
        Office31(root=tmp_path).load()


def test_sizes():
    """Broken if the network sees another size than asked for, or crops have no room."""
    for size, stored in ((224, 256), (64, 73), (32, 37)):
        dataset = Office31(Office31.Params(size=size))
        assert (dataset.crop, dataset.image) == ((size, size), (3, stored, stored))


def test_alignq_split_is_that_codes():
    """Broken if a number on this split could not be compared with AlignQ's."""
    labels = torch.tensor([1] * 7 + [0] * 92 + [2] * 10)
    files = [f"frame_{i:04}" for i in range(len(labels))]
    expected = []
    for c in range(3):
        mine = [f for f, label in zip(files, labels.tolist(), strict=True) if label == c]
        np.random.seed(1)  # as the original does
        train = np.random.choice(np.arange(len(mine)), int(len(mine) * 0.8), replace=False)
        expected += sorted(set(mine) - set(np.array(mine)[train].tolist()))
    assert sorted(files[i] for i in alignq_test(labels)) == sorted(expected)
    assert len(expected) == 2 + 19 + 2


def test_alignq_split_of_a_class_with_one_image():
    """Broken if an 80/20 split of a single image left its class without one to train on."""
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    test = alignq_test(labels)
    assert 0 not in test.tolist()
    assert len(test) == 1


@real
@pytest.mark.parametrize("domain", Office31.domains)
def test_real_counts(domain):
    """Broken if an image of the real data set is lost, or gets another label than the published list gives it."""
    (images,) = Office31(Office31.Params(size=32, domains=(domain,)), DATA).load()
    lines = [line.split() for line in (DATA / f"office31/image_list/{domain}.txt").read_text().splitlines()]
    published = {DATA / "office31" / path: int(label) for path, label in lines}
    assert dict(zip(images.images.sources, images.labels.tolist(), strict=True)) == published
    assert len(published) == Office31.counts[domain]


@real
def test_real_images(tmp_path):
    """Broken if a real image cannot be decoded, or the prepared set does not have all of them."""
    loaded = open_data("office31", {"size": 32}, DATA, tmp_path)
    assert {d.name: len(d.labels) for d in loaded.domains} == dict(Office31.counts)
    assert all(d.images.shape[1:] == (3, 37, 37) for d in loaded.domains)
    assert loaded.size == (32, 32)
    assert all(float(d.images.float().mean()) > 50 for d in loaded.domains)


@real
def test_real_alignq_test_part():
    """Broken if the split of AlignQ's code is another one with another NumPy or Python."""
    domains = Office31(Office31.Params(split="alignq"), DATA).load()
    assert [len(d.test) for d in domains] == [574, 112, 171]
    digest = hashlib.sha256(b"".join(d.test.numpy().astype("<i8").tobytes() for d in domains)).hexdigest()
    assert digest[:16] == "9f854b68e42400a7"
    loaded = Loaded("office31", domains, "", Office31.classes)
    assert all(torch.equal(s.test, d.test) for s, d in zip(make_splits(loaded, 5).values(), domains, strict=True))
