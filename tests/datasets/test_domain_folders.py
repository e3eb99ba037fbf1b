"""DomainBed's data sets of folders, on tiny files in their layouts."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from typing import ClassVar

import pytest
from pictures import cut_short, write_classes
from qatbench.bench.errors import UserError
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.domain_folders import PACS, VLCS, DomainNet, OfficeHome, TerraIncognita

SMALL: dict = {"size": 28}
THINGS = [f"thing_{i:03}" for i in range(345)]


def write(dataset, root, counts, classes=None):
    for domain in dataset.domains:
        write_classes(root / dataset.folders[domain][0], dict(zip(classes or dataset.classes, counts, strict=True)))


class TestPACS(DatasetContract):
    dataset = "pacs"
    params: ClassVar = SMALL
    classes_of: ClassVar = {d: [4, 3, 3, 2, 3, 3, 5] for d in PACS.domains}

    def write(self, root):
        write(PACS, root, [4, 3, 3, 2, 3, 3, 5])

    def spoil(self, root):
        return cut_short(root / "PACS/art_painting/giraffe/img_0001.jpg")


class TestVLCS(DatasetContract):
    dataset = "vlcs"
    params: ClassVar = SMALL
    classes_of: ClassVar = {d: [3, 4, 5, 6, 2] for d in VLCS.domains}

    def write(self, root):
        write(VLCS, root, [3, 4, 5, 6, 2])

    def spoil(self, root):
        return cut_short(root / "VLCS/Caltech101/person/img_0001.jpg")


class TestOfficeHome(DatasetContract):
    dataset = "office-home"
    params: ClassVar = SMALL
    classes_of: ClassVar = dict.fromkeys(OfficeHome.domains, [3] * 65)

    def write(self, root):
        write(OfficeHome, root, [3] * 65)

    def spoil(self, root):
        return cut_short(root / "office_home/Art/TV/img_0001.jpg")


class TestTerraIncognita(DatasetContract):
    dataset = "terra-incognita"
    params: ClassVar = SMALL
    classes_of: ClassVar = {d: [3, 4, 2, 3, 3, 6, 3, 3, 3, 1] for d in TerraIncognita.domains}

    def write(self, root):
        write(TerraIncognita, root, [3, 4, 2, 3, 3, 6, 3, 3, 3, 1])

    def spoil(self, root):
        return cut_short(root / "terra_incognita/location_100/empty/img_0005.jpg")


class TestDomainNet(DatasetContract):
    dataset = "domainnet"
    params: ClassVar = SMALL
    classes_of: ClassVar = dict.fromkeys(DomainNet.domains, [4] * 20 + [1] * 325)

    def write(self, root):
        write(DomainNet, root, [4] * 20 + [1] * 325, THINGS)

    def spoil(self, root):
        return cut_short(root / "domain_net/clipart/thing_200/img_0000.jpg")


@pytest.mark.parametrize(
    ("dataset", "images", "classes"),
    [
        (PACS, 9991, 7),
        (VLCS, 10_729, 5),
        (OfficeHome, 15_588, 65),
        (TerraIncognita, 24_788, 10),
        (DomainNet, 586_575, 345),
    ],
)
def test_facts_add_up_to_what_domainbed_publishes(dataset, images, classes):
    """Broken if the table of facts has a wrong number, or forgets a class."""
    assert sum(dataset.counts.values()) == images
    assert tuple(dataset.counts) == dataset.domains == tuple(dataset.folders)
    assert len(set(getattr(dataset, "classes", THINGS))) == classes


def zipped(folder, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(to, "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, path.relative_to(folder))
    return to


def test_archive_of_all_domains_is_unpacked(tmp_path, monkeypatch):
    """Broken if a user with DomainBed's archive in the data root had to unpack and rename it."""
    for domain in PACS.domains:
        write_classes(tmp_path / "made/kfold" / domain, dict.fromkeys(PACS.classes, 2))
    zipped(tmp_path / "made", tmp_path / "root/PACS.zip")
    with pytest.raises(UserError, match=r"PACS\.zip"):
        PACS(root=tmp_path / "root", downloads=tmp_path / "downloads").load()  # these are not the published bytes
    lifted = {d: tuple(replace(r, md5=None) for r in files) for d, files in PACS.remotes.items()}
    monkeypatch.setattr(PACS, "remotes", lifted)
    domains = PACS(root=tmp_path / "root", downloads=tmp_path / "downloads").load()
    assert [len(d.labels) for d in domains] == [14] * 4


def test_archive_of_each_domain_is_unpacked(tmp_path):
    """Broken if the archives of DomainNet could be fetched but not read."""
    for domain in DomainNet.domains[:2]:
        write_classes(tmp_path / f"made/{domain}/{domain}", dict.fromkeys(THINGS, 1))
        zipped(tmp_path / f"made/{domain}", tmp_path / f"root/domain_net/{domain}.zip")
    params = DomainNet.Params(domains=DomainNet.domains[:2])
    dataset = DomainNet(params, tmp_path / "root", tmp_path / "downloads")
    assert [len(d.labels) for d in dataset.load()] == [345] * 2
    assert dataset.classes == tuple(THINGS)


@pytest.mark.parametrize("name", ["Real World", "Real_World"])
@pytest.mark.parametrize(
    "parent", ["office_home", "office_home/OfficeHomeDataset_10072016", "OfficeHomeDataset_10072016"]
)
def test_office_home_in_its_layouts(tmp_path, parent, name):
    """Broken if the official folder, with a space in its name, or the one of the mirrors is not found."""
    write_classes(tmp_path / parent / name, dict.fromkeys(OfficeHome.classes, 1))
    (domain,) = OfficeHome(OfficeHome.Params(domains=("Real_World",)), tmp_path).load()
    assert len(domain.labels) == 65


def test_domainnet_needs_all_classes(tmp_path):
    """Broken if a domain that was unpacked in part were taken for the whole."""
    write_classes(tmp_path / "domain_net/real", dict.fromkeys(THINGS[:344], 1))
    with pytest.raises(UserError, match="domain_net/real has 344 class folders, but 'domainnet' has 345 classes"):
        DomainNet(DomainNet.Params(domains=("real",)), tmp_path).load()


def test_missing_domain_says_how_to_get_it(tmp_path):
    """Broken if a user without the images did not learn where they are."""
    for dataset, way in ((PACS, "drive.google.com"), (TerraIncognita, "download.py"), (DomainNet, "data prepare")):
        with pytest.raises(UserError) as caught:
            dataset(root=tmp_path).load()
        assert way in str(caught.value)
        assert dataset.folders[dataset.domains[0]][0] in str(caught.value)
