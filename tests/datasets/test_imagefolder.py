"""A user's own folder, in all its layouts, and ImageNet's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pictures import cut_short, write_classes, write_picture
from PIL import Image
from qatbench.bench.data import find_data, hash_splits, make_splits, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.images import Encoded
from qatbench.bench.prepared import DECODED_GB
from qatbench.bench.stream import gather
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.imagefolder import ImageNet

SMALL: dict = {"size": 28}


class TestClasses(DatasetContract):
    dataset = "imagefolder:my pets"
    params: ClassVar = SMALL
    classes_of: ClassVar = {"images": [9, 6, 5]}

    def write(self, root):
        write_classes(root / "my pets", {"Äffchen": 5, "cat": 9, "dog": 6}, ".png")

    def spoil(self, root):
        return cut_short(root / "my pets/dog/img_0003.png")


class TestDomains(DatasetContract):
    dataset = "imagefolder:deep/pets"
    params: ClassVar = SMALL
    classes_of: ClassVar = {"photo": [9, 6, 1], "sketch-2": [5, 8, 7]}

    def write(self, root):
        write_classes(root / "deep/pets/photo", {"cat": 9, "dog": 6, "elk": 1})
        write_classes(root / "deep/pets/sketch-2", {"cat": 5, "dog": 8, "elk": 7})

    def spoil(self, root):
        return cut_short(root / "deep/pets/photo/elk/img_0000.jpg")


class TestTrainValTest(DatasetContract):
    dataset = "imagefolder:pets"
    params: ClassVar = {**SMALL, "fit": "centre"}
    classes_of: ClassVar = {"images": [12, 14]}

    def write(self, root):
        write_classes(root / "pets/train", {"cat": 7, "dog": 8})
        write_classes(root / "pets/val", {"cat": 2, "dog": 3})
        write_classes(root / "pets/test", {"cat": 3, "dog": 3})

    def spoil(self, root):
        return cut_short(root / "pets/test/dog/img_0001.jpg")


class TestImageNet(DatasetContract):
    dataset = "imagenet"
    params: ClassVar = SMALL
    classes_of: ClassVar = {"imagenet": [3] * 20 + [2] * 980}
    notices_content = False

    def write(self, root):
        for i in range(1000):
            wnid = f"n{i:08}"
            for k in range(2 if i < 20 else 1):
                write_picture(root / f"imagenet/train/{wnid}/{wnid}_{k}.JPEG")
            write_picture(root / f"imagenet/val/{wnid}/ILSVRC2012_val_{i:08}.JPEG")

    def spoil(self, root):
        return cut_short(root / "imagenet/val/n00000007/ILSVRC2012_val_00000007.JPEG")


def pets(tmp_path: Path, **tops) -> Path:
    for top, counts in tops.items():
        write_classes(tmp_path / "pets" / top, counts)
    return tmp_path


def folder(root: Path, **params):
    return find_data("imagefolder:pets", {**SMALL, **params}, root, root / "cache")


def refusal(root: Path, name: str = "imagefolder:pets", **params) -> str:
    with pytest.raises(UserError) as caught:
        find_data(name, {**SMALL, **params}, root, Path("/nowhere/cache"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- layouts


@pytest.mark.parametrize(
    ("tops", "tested"),
    [
        ({"train": 5, "test": 2}, 2),
        ({"train": 5, "val": 3}, 3),
        ({"train": 5, "valid": 3}, 3),
        ({"train": 5, "val": 3, "test": 2}, 2),
        ({"Train": 5, "Validation": 3, "Test": 2}, 2),
        ({"train": 5}, None),
        ({"Training": 5, "Testing": 2}, 2),
        ({"Train set": 5, "dev": 3, "Test set": 2}, 2),
        ({"TrainingData": 5, "val_images": 3}, 3),
        ({"train2017": 5, "valid-2017": 3}, 3),
        ({"training_set": 5, "test_set": 2}, 2),
    ],
)
def test_which_part_tests(tmp_path, tops, tested):
    """Broken if test images trained, or validation images tested where there are test images."""
    root = pets(tmp_path, **{top: {"cat": n, "dog": n} for top, n in tops.items()})
    (domain,) = folder(root).load()
    assert len(domain.labels) == 2 * sum(tops.values())
    if tested is None:
        assert domain.test is None
    else:
        part = "test" if tested == 2 else "val"
        names = [domain.images.sources[i].parts[-3].lower() for i in domain.test.tolist()]
        assert len(names) == 2 * tested
        assert all(name.startswith(part) for name in names)


def test_val_beside_test_is_training_material(tmp_path):
    """Broken if images that a user put aside for validation were lost, or always validated while others are drawn by seed."""
    root = pets(tmp_path, train={"cat": 8, "dog": 8}, val={"cat": 4, "dog": 4}, test={"cat": 3, "dog": 3})
    loaded = open_data("imagefolder:pets", SMALL, root, tmp_path / "cache")
    split = make_splits(loaded, 0)["images"]
    assert len(split.test) == 6
    assert len(split.train) + len(split.val) == 24


def test_a_part_may_lack_a_class_but_not_have_its_own(tmp_path):
    """Broken if a rare class without test images made the folder unusable, or a class were tested that nothing could learn."""
    root = pets(tmp_path, train={"cat": 3, "dog": 3}, test={"cat": 2})
    assert folder(root).classes == ("cat", "dog")
    write_classes(root / "pets/test", {"elk": 1})
    text = refusal(root)
    assert f"class 'elk' is in {root / 'pets/test'}, but not in {root / 'pets/train'}" in text


def test_domains_and_classes_come_from_the_folders(tmp_path):
    """Broken if a user had to list what the folders say."""
    dataset = folder(pets(tmp_path, photo={"cat": 2, "dog": 3}, sketch={"cat": 4, "dog": 1}))
    assert dataset.domains == ("photo", "sketch")
    assert dataset.classes == ("cat", "dog")
    assert folder(tmp_path, domains=["sketch"]).selected == ("sketch",)


def test_absolute_folder_and_home(tmp_path, monkeypatch):
    """Broken if a folder could not be named by its path."""
    pets(tmp_path, cat={".": 0})
    shutil.rmtree(tmp_path / "pets")
    write_classes(tmp_path / "pets", {"cat": 2, "dog": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"imagefolder:{tmp_path}/pets", f"imagefolder:{tmp_path}/pets/", "imagefolder:~/pets"):
        for root in (None, Path("/elsewhere")):
            dataset = find_data(name, SMALL, root, tmp_path / "cache")
            assert dataset.title == "imagefolder:pets"
            assert len(dataset.load()[0].labels) == 4


def test_moving_the_folder_moves_no_split(tmp_path):
    """Broken if results on another machine, or after tidying up, were of other splits."""
    write_classes(tmp_path / "here/pets", {"cat": 20, "dog": 20})
    shutil.copytree(tmp_path / "here", tmp_path / "there/deep")
    hashes = set()
    for name, root in (("pets", tmp_path / "here"), ("deep/pets", tmp_path / "there"), (f"{tmp_path}/here/pets", None)):
        loaded = open_data(f"imagefolder:{name}", SMALL, root, tmp_path / "cache")
        hashes.add((loaded.name, loaded.hash, hash_splits(make_splits(loaded, 0))))
    assert len(hashes) == 1


def test_fit(tmp_path):
    """Broken if `fit` did nothing: `centre` keeps the proportions, `stretch` shows all of the image."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        wide = Image.new("RGB", (96, 32), "red")
        wide.paste("blue", (32, 0, 64, 32))
        wide.save(tmp_path / "pets" / name / "wide.png")
    centre, stretched = (folder(tmp_path, fit=fit).load()[0].images[0] for fit in ("centre", "stretch"))
    assert centre.shape == stretched.shape == (32, 32, 3)
    assert (centre == (0, 0, 255)).all()
    assert (stretched[:, 0] == (255, 0, 0)).all()


def test_streamed_images_are_the_decoded_ones(tmp_path, monkeypatch):
    """Broken if a folder that is too large to be decoded trained on other pixels."""
    root = pets(tmp_path, photo={"cat": 3, "dog": 3}, sketch={"cat": 2, "dog": 4})
    for i, size in enumerate([(50, 20), (20, 50), (64, 64)]):
        write_picture(root / f"pets/photo/cat/other_{i}.png", size)
    decoded = open_data("imagefolder:pets", SMALL, root, tmp_path / "cache")
    monkeypatch.setenv(DECODED_GB, "0")
    streamed = open_data("imagefolder:pets", SMALL, root, tmp_path / "cache")
    for ours, theirs in zip(streamed.domains, decoded.domains, strict=True):
        assert isinstance(ours.images, Encoded)
        assert isinstance(theirs.images, torch.Tensor)
        assert torch.equal(gather(ours.images, torch.arange(len(ours.labels))), theirs.images.permute(0, 2, 3, 1))
        assert torch.equal(ours.labels, theirs.labels)


# -- what is wrong


def test_no_folder(tmp_path):
    """Broken if a mistyped folder were a traceback, or said no way out."""
    assert f"{tmp_path / 'pets'} does not exist" in refusal(tmp_path)
    (tmp_path / "pets").touch()
    assert f"{tmp_path / 'pets'} is no folder" in refusal(tmp_path)
    assert "--data-root" in refusal(None)  # type: ignore[arg-type]
    assert "imagefolder:FOLDER" in refusal(tmp_path, "imagefolder")


def test_no_image(tmp_path):
    """Broken if an empty folder, or one with other files, were a crash."""
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat/notes.txt").touch()
    assert f"{tmp_path / 'pets'} holds no images" in refusal(tmp_path)


def test_images_without_class_folders(tmp_path):
    """Broken if images that nothing labels were a class."""
    write_picture(tmp_path / "pets/cat_1.jpg")
    assert f"{tmp_path / 'pets/cat_1.jpg'} lies 0 folders deep" in refusal(tmp_path)


def test_one_class(tmp_path):
    """Broken if a folder of images, given as the data set, were a task that nothing can fail."""
    write_classes(tmp_path / "pets", {"cat": 5})
    assert f"{tmp_path / 'pets'} has one class folder only" in refusal(tmp_path)


@pytest.mark.parametrize("odd", ["cat/img.jpg", "photo/cat/more/img.jpg", "img.jpg"])
def test_mixed_depths(tmp_path, odd):
    """Broken if some of the images were left out, or a class were taken for a domain."""
    root = pets(tmp_path, photo={"cat": 2, "dog": 2}, sketch={"cat": 2, "dog": 2})
    write_picture(root / "pets" / odd)
    assert f"{root / 'pets' / odd} lies {odd.count('/')} folders deep" in refusal(root)


def test_class_folder_without_images(tmp_path):
    """Broken if a class that was not unpacked were left out in silence."""
    write_classes(tmp_path / "pets", {"cat": 2, "dog": 2, "elk": 0})
    assert f"{tmp_path / 'pets/elk'} holds no images" in refusal(tmp_path)


def test_classes_differ_between_domains(tmp_path):
    """Broken if a domain were tested on classes that it does not have, or labels moved up."""
    root = pets(tmp_path, photo={"cat": 2, "dog": 2}, sketch={"cat": 2, "dog": 2, "elk": 1})
    text = refusal(root)
    assert f"class 'elk' is in {root / 'pets/sketch'}, but not in {root / 'pets/photo'}" in text
    shutil.rmtree(root / "pets/sketch/elk")
    shutil.rmtree(root / "pets/sketch/cat")
    text = refusal(root)
    assert f"class 'cat' of {root / 'pets/photo'} is not in {root / 'pets/sketch'}" in text


def test_domain_with_an_unusable_name(tmp_path):
    """Broken if a domain could not be a part of a metric's or file's name."""
    root = pets(tmp_path, **{"real world": {"cat": 2, "dog": 2}, "sketch": {"cat": 2, "dog": 2}})
    assert f"{root / 'pets/real world'}: a domain's name has letters" in refusal(root)


def test_parts_beside_domains(tmp_path):
    """Broken if test images were a domain that trains."""
    root = pets(tmp_path, train={"cat": 2, "dog": 2}, sketch={"cat": 2, "dog": 2})
    assert "has 'train', a part of a split, beside 'sketch'" in refusal(root)


@pytest.mark.parametrize("name", ["dev", "eval", "Evaluation", "development set", "imgs_val"])
def test_other_words_for_val(tmp_path, name):
    """Broken if images that a user put aside trained, since the folder has another word for it."""
    root = pets(tmp_path, **{"train": {"cat": 2, "dog": 2}, name: {"cat": 3, "dog": 1}})
    (domain,) = folder(root).load()
    assert [domain.images.sources[i].parts[-3] for i in domain.test.tolist()] == [name] * 4


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("seg_train", "seg_test"), "may be a part of a split or a domain"),
        (("art-testing", "sketch"), "may be a part of a split or a domain"),
        (("train", "Training"), "both of which are its train part"),
        (("train", "val", "dev"), "both of which are its val part"),
        (("train1", "train2"), "both of which are its train part"),
    ],
)
def test_names_that_may_be_parts_are_refused(tmp_path, names, words):
    """Broken if a user's test images were a domain that trains, or two parts were taken for one."""
    assert words in refusal(pets(tmp_path, **{name: {"cat": 2, "dog": 2} for name in names}))


@pytest.mark.parametrize("names", [("trains", "planes"), ("contest", "devices"), ("validus", "attest")])
def test_other_words_are_domains(tmp_path, names):
    """Broken if a domain could not be called contest."""
    assert folder(pets(tmp_path, **{name: {"train": 2, "test": 2} for name in names})).domains == tuple(sorted(names))


def test_spellings_of_one_class_in_two_parts(tmp_path):
    """Broken if the test images of class é, unpacked on a Mac, were those of another class."""
    root = pets(tmp_path, train={"caf\u00e9": 2, "bar": 2}, test={"cafe\u0301": 1, "bar": 1})
    dataset = folder(root)
    assert dataset.classes == ("bar", "caf\u00e9")
    assert dataset.load()[0].labels.bincount().tolist() == [3, 3]


def test_parts_without_train(tmp_path):
    """Broken if a folder were trained on what its name says is for testing."""
    root = pets(tmp_path, val={"cat": 2, "dog": 2}, test={"cat": 2, "dog": 2})
    assert "but no train" in refusal(root)


# -- ImageNet


def imagenet(root: Path, classes: int = 3) -> Path:
    for part in ("train", "val"):
        write_classes(root / "imagenet" / part, {f"n{i:08}": 2 for i in range(classes)}, ".JPEG")
    return root


def test_imagenet_val_that_is_not_sorted(tmp_path):
    """Broken if a user who unpacked the official archive did not learn that the images have yet to be sorted."""
    imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet/val")
    for i in range(3):
        write_picture(tmp_path / f"imagenet/val/ILSVRC2012_val_{i:08}.JPEG")
    with pytest.raises(UserError, match=r"imagenet/val is not sorted into class folders; .*valprep\.sh"):
        ImageNet(root=tmp_path).load()


def test_part_of_imagenet_is_not_imagenet(tmp_path):
    """Broken if a number on a subset were shown as one on ImageNet."""
    with pytest.raises(UserError, match=r"has 3 class folders, but ImageNet has 1000; .* use imagefolder:"):
        ImageNet(root=imagenet(tmp_path)).load()


def test_imagenet_lacks_a_class(tmp_path):
    """Broken if a class that was not unpacked moved the labels of all that follow."""
    shutil.rmtree(imagenet(tmp_path) / "imagenet/train/n00000001")
    with pytest.raises(UserError, match=r"class 'n00000001' is in .*/val, but not in .*/train"):
        ImageNet(root=tmp_path).load()


def test_imagenet_is_missing(tmp_path):
    """Broken if a user without the images did not learn where they are."""
    with pytest.raises(UserError, match=r"imagenet/train is missing: .*image-net\.org"):
        ImageNet(root=tmp_path).load()


def test_imagenet_is_opened_without_asking_for_every_file(tmp_path, monkeypatch):
    """Broken if every start of a run asked the disk for 1.3 million files."""
    monkeypatch.setattr(ImageNet, "class_count", 3)
    asked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: asked.append(str(path)) or scandir(path))
    dataset = ImageNet(root=imagenet(tmp_path))
    before = dataset.fingerprint()
    assert asked == [str(tmp_path / "imagenet/train"), str(tmp_path / "imagenet/val")]
    (tmp_path / "imagenet/val/n00000001/img_0000.JPEG").unlink()
    assert dataset.fingerprint() != before
