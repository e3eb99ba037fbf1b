"""Folders of classes of images: what is read, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import cut_short, write_classes, write_picture
from PIL import Image
from qatbench.bench.data import make_splits, open_data
from qatbench.bench.dataset import walk
from qatbench.bench.errors import UserError
from qatbench.bench.folders import Files, classes_in, encoded, images_in, same_classes
from qatbench.datasets.domain_folders import VLCS

A, B = "VLCS/Caltech101", "VLCS/LabelMe"
PARAMS = {"size": 28, "domains": ["Caltech101", "LabelMe"]}


@pytest.fixture
def root(tmp_path):
    """Two domains of VLCS."""
    for domain in (A, B):
        write_classes(tmp_path / "root" / domain, dict.fromkeys(VLCS.classes, 3))
    return tmp_path / "root"


def load(root):
    return open_data(VLCS, PARAMS, root, root.parent / "cache")


def refusal(root):
    with pytest.raises(UserError) as caught:
        load(root)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- names


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.dictionaries(names.filter(lambda n: n not in (".", "..")), st.lists(names, max_size=5), max_size=5))
def test_files_are_the_paths_that_went_in(folders):
    """Broken if an image is taken for another, or a name with an umlaut is cut in its middle."""
    files = Files({Path("/data") / name: found for name, found in folders.items()})
    expected = [Path("/data") / name / image for name, found in folders.items() for image in found]
    assert list(files) == expected
    assert files[:] == expected
    assert list(pickle.loads(pickle.dumps(files))) == expected
    assert len(files) == len(expected)
    with pytest.raises(IndexError):
        files[len(expected)]
    if expected:
        assert files[-1] == expected[-1]


def test_files_of_a_million_images_are_small():
    """Broken if ImageNet's list took half a gigabyte in every process that decodes."""
    files = Files({Path(f"/data/n{c:08}"): [f"n{c:08}_{i}.JPEG" for i in range(1000)] for c in range(100)})
    assert len(pickle.dumps(files)) < 40 * len(files)
    assert files[99_999] == Path("/data/n00000099/n00000099_999.JPEG")


def test_names_with_spaces_and_umlauts(tmp_path):
    """Broken if a user whose folders are not named in ASCII could not train."""
    write_classes(tmp_path / "größe 1", {"Köln am Rhein": 1, "東京": 2})
    assert classes_in(tmp_path / "größe 1") == {
        "Köln am Rhein": ["img_0000.jpg"],
        "東京": ["img_0000.jpg", "img_0001.jpg"],
    }


def test_what_is_no_image_is_ignored(tmp_path):
    """Broken if what an operating system leaves in folders were an error, or an image."""
    write_classes(tmp_path, {"a": 1, "b": 1})
    for junk in (
        ".DS_Store",
        "a/Thumbs.db",
        "a/notes.txt",
        "b/._img_0000.jpg",
        "__MACOSX/a/img_0000.jpg",
        ".git/x.png",
    ):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).touch()
    assert classes_in(tmp_path) == {"a": ["img_0000.jpg"], "b": ["img_0000.jpg"]}


def test_every_ending_counts_in_any_case(tmp_path):
    """Broken if images were left out in silence because of how their names end."""
    endings = ["jpg", "JPG", "jpeg", "JPEG", "png", "ppm", "bmp", "pgm", "tif", "TIFF", "webp", "gif"]
    endings += ["jfif", "JFIF", "jpe", "jfi", "jif", "pbm", "pnm", "dib"]
    (tmp_path / "a").mkdir()
    for i, ending in enumerate(endings):
        (tmp_path / "a" / f"{i:02}.{ending}").touch()
    assert [Path(name).suffix[1:] for name in classes_in(tmp_path)["a"]] == endings


def test_links_to_images_and_folders_are_followed(tmp_path):
    """Broken if a data set that was put together from links were empty."""
    write_classes(tmp_path / "far", {"a": 2})
    (tmp_path / "near").mkdir()
    (tmp_path / "near/b").symlink_to(tmp_path / "far/a")
    assert images_in(tmp_path / "near") == {("b",): ["img_0000.jpg", "img_0001.jpg"]}


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".jfi", ".jif"])
def test_every_name_of_a_jpeg_is_decoded(root, ending):
    """Broken if the images that a browser saved, as .jfif, were missing from a class."""
    for path in (root / A / "bird").iterdir():
        path.rename(path.with_suffix(ending))
    assert len(load(root)["Caltech101"].labels) == 3 * len(VLCS.classes)


# -- what is wrong


def as_kind(format):
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, format)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jpg.1", as_kind("JPEG"), "(JPEG) but is not read; rename them, to end in .jpg"),
        ("a", as_kind("PNG"), "(PNG) but is not read; rename them, to end in .png"),
        ("a.txt", as_kind("WEBP"), "(WebP)"),
        ("a.tif~", as_kind("TIFF"), "(TIFF)"),
        ("a.bak", as_kind("BMP"), "(BMP)"),
        ("a.ppm_", as_kind("PPM"), "(PNM)"),
        ("a.gfi", as_kind("GIF"), "(GIF)"),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "(HEIF) but is not read; convert them to JPEG or PNG"),
        ("a.avif", b"\0\0\0\x20ftypavif\0\0\0\0", "(AVIF)"),
        ("a.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "(JPEG 2000)"),
        ("a.jxl", b"\xff\x0a\0\0", "(JPEG XL)"),
        ("a.dcm", bytes(128) + b"DICM", "(DICOM)"),
    ],
)
def test_an_image_that_is_not_read_is_named(root, name, content, words):
    """Broken if a class lost half of its images in silence, since their names end otherwise."""
    (root / A / "bird" / name).write_bytes(content)
    assert f"{root / A / 'bird' / name} is an image by its first bytes {words}" in refusal(root)
    (root / A / "bird" / f"{name}2").write_bytes(content)
    assert "and so are 1 more files in that folder" in refusal(root)


@pytest.mark.parametrize(
    "content", [b"", b"BMW and others", b"P5 is a phone", b"II", b"RIFF....WAVE", b"{}", b"\0" * 200]
)
def test_other_files_are_still_ignored(tmp_path, content):
    """Broken if notes, lists and sounds beside the images were taken for images."""
    write_classes(tmp_path, {"a": 1})
    (tmp_path / "a/other").write_bytes(content)
    assert classes_in(tmp_path) == {"a": ["img_0000.jpg"]}


def test_one_name_in_two_spellings_is_one_class(tmp_path):
    """Broken if a folder from a Mac, where é is e and an accent, were told to lack a class whose name looks the same."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    write_classes(tmp_path / "linux", {composed: 2, "bar": 1})
    write_classes(tmp_path / "mac", {apart: 1, "bar": 1})
    found = {tmp_path / name: classes_in(tmp_path / name) for name in ("linux", "mac")}
    assert set(same_classes(found)) == {composed, "bar"}
    assert same_classes(dict(reversed(found.items()))) == ("bar", composed)
    images, labels = encoded(found.items(), ("bar", composed), (8, 8))
    assert labels.tolist() == [0, 1, 1, 0, 1]
    assert all(Path(path).is_file() for path in images.sources)
    write_classes(tmp_path / "linux", {apart: 1})
    with pytest.raises(UserError, match=r"two folders that look like 'café', .*e\\u0301"):
        same_classes({tmp_path / "linux": classes_in(tmp_path / "linux")})


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x7f", os.fsdecode(b"caf\xe9")])
def test_a_class_that_no_table_can_show_is_refused(tmp_path, name):
    """Broken if a name broke the lines of a table, coloured a terminal, or could not be written at the end of a sweep."""
    write_classes(tmp_path, {"b": 1})
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="control character, or is not UTF-8") as caught:
        classes_in(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.timeout(30)
def test_links_that_lead_back_end(tmp_path):
    """Broken if two links to a folder above were followed in all 2^40 orders."""
    write_classes(tmp_path / "a", {"x": 1})
    for name in ("one", "two", "three"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    for look in (images_in, lambda folder: list(walk(folder))):
        with pytest.raises(UserError, match="leads back to a folder that it lies in"):
            look(tmp_path)


@pytest.mark.timeout(30)
def test_a_pipe_with_an_images_name_is_refused(tmp_path):
    """Broken if a pipe among the images were waited for."""
    write_classes(tmp_path, {"a": 1})
    os.mkfifo(tmp_path / "a/pipe")  # no image by its name: ignored
    assert classes_in(tmp_path) == {"a": ["img_0000.jpg"]}
    os.mkfifo(tmp_path / "a/pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is a broken link, or no file"):
        classes_in(tmp_path)


def test_domain_folder_missing(root):
    """Broken if two domains were trained where one is not there, or a user did not learn which."""
    shutil.rmtree(root / B)
    assert f"{root / B} is missing" in refusal(root)


def test_domain_folder_empty(root):
    """Broken if a domain without images were a crash or a domain."""
    shutil.rmtree(root / B)
    (root / B).mkdir()
    assert f"{root / B} holds no images" in refusal(root)


def test_domain_folder_is_a_file(root):
    """Broken if an archive that was renamed instead of unpacked were a traceback."""
    shutil.rmtree(root / B)
    (root / B).touch()
    assert f"cannot read {root / B}: Not a directory" in refusal(root)


def test_class_that_the_data_set_does_not_have(root):
    """Broken if images of a class that other domains lack trained in silence."""
    (root / B / "dog").rename(root / B / "dogs")
    text = refusal(root)
    assert f"class 'dogs' is in {root / B}, but not in 'vlcs'; did you mean 'dog'?" in text


def test_class_that_a_domain_lacks(root):
    """Broken if a domain without some of the classes were tested on them, or labels moved up."""
    shutil.rmtree(root / A / "car")
    assert f"class 'car' of 'vlcs' is not in {root / A}" in refusal(root)


def test_class_folder_without_images(root):
    """Broken if a class that was not unpacked were left out in silence."""
    shutil.rmtree(root / A / "car")
    (root / A / "car/inside").mkdir(parents=True)
    (root / A / "car/readme.txt").touch()
    assert f"{root / A / 'car/inside'} holds no images" in refusal(root)


@pytest.mark.parametrize("place", ["stray.jpg", "car/more/stray.jpg"])
def test_image_out_of_place(root, place):
    """Broken if images outside of the class folders were left out in silence."""
    write_picture(root / A / place)
    assert f"{root / A / place} is out of place" in refusal(root)


def test_broken_link(root):
    """Broken if an image that is not there were left out in silence."""
    (root / A / "car/img_0009.jpg").symlink_to("/nowhere/img.jpg")
    assert str(root / A / "car/img_0009.jpg") in refusal(root)
    with pytest.raises(UserError, match=r"img_0009\.jpg is a broken link"):
        images_in(root / A)


def test_link_that_leads_in_a_circle(root):
    """Broken if a folder that holds itself were read until memory is full."""
    (root / A / "car/again").symlink_to(root / A)
    assert "again" in refusal(root)


def corrupt(path):
    path.write_bytes(b"no image")


def single_pixel(path):
    Image.new("RGB", (1, 1)).save(path)


def animated(path):
    frames = [Image.new("L", (8, 8), i * 80) for i in range(3)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    path.unlink()


@pytest.mark.parametrize("harm", [corrupt, single_pixel, animated, cut_short, lambda path: path.write_bytes(b"")])
def test_bad_image(root, harm):
    """Broken if an unusable image trained, or a user did not learn which one it is."""
    harm(root / B / "dog/img_0001.jpg")
    assert re.search(rf"{root / B / 'dog'}/img_0001\.(jpg|gif)", refusal(root))
    assert not list((root.parent / "cache").glob("vlcs-*/meta.json"))


def test_grey_cmyk_and_deep_images_are_accepted(root):
    """Broken if a folder with images of several kinds, as there are in ImageNet, could not be used."""
    folder = root / A / "bird"
    shutil.rmtree(folder)
    write_picture(folder / "1.jpg", mode="L")
    write_picture(folder / "2.jpg", (40, 30), mode="CMYK")
    write_picture(folder / "3.png", mode="RGBA")
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "4.png")
    images = load(root)["Caltech101"].images
    assert images.shape == (16, 3, 32, 32)
    assert (images[0, 0] == images[0, 2]).all()
    assert (images[3, 0].numpy() == ramp >> 8).all()
    assert (images[1] != images[2]).any()


def test_class_with_one_image_trains(root):
    """Broken if an 80/20 split of a single image left its class without one to train on."""
    for name in ("img_0001.jpg", "img_0002.jpg"):
        (root / A / "person" / name).unlink()
    loaded = load(root)
    person = loaded.classes.index("person")
    only = int((loaded["Caltech101"].labels == person).nonzero())
    for seed in range(5):
        assert only in make_splits(loaded, seed)["Caltech101"].train.tolist()
