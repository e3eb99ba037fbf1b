"""The embedded data set: real digits in three dresses."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from qatbench.bench.data import DataModule, make_splits, open_data
from qatbench.bench.testing import DatasetContract
from qatbench.datasets.optdigits import OptDigits

UCI = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # images of each digit, as scikit-learn documents them


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return open_data(OptDigits, {}, None, tmp_path_factory.mktemp("cache"))


def test_three_domains_of_1797_images(loaded):
    """Broken if a digit is lost."""
    assert loaded.names == ("scanned", "blended", "fonts")
    for domain in loaded.domains:
        assert domain.images.shape == (1797, 3, 28, 28)
        assert domain.images.dtype == torch.uint8


def test_scanned_is_the_uci_digit_in_grey(loaded):
    """Broken if digits are enlarged askew, or no longer in the order of their labels."""
    from sklearn.datasets import load_digits

    images = loaded["scanned"].images
    assert torch.equal(images[:, 0], images[:, 1])
    small = torch.nn.functional.interpolate(images[:, :1, 2:-2, 2:-2].float(), (8, 8), mode="area")[:, 0]
    assert (
        small - torch.from_numpy(load_digits().images).float() * 255 / 16
    ).abs().mean() < 20  # of 255; between different digits it is 58


def test_blended_shows_the_scanned_digit_over_a_texture(loaded):
    """Broken if the recipe |texture - digit| is not followed, or a digit got another's label."""
    scanned, blended = (loaded[n].images.int() for n in ("scanned", "blended"))
    ink = scanned > 250  # there |texture - 255| is the negative; beside it (0) the texture shows through
    assert not torch.equal(blended[:, 0], blended[:, 1])
    inside = torch.stack([blended[i][ink[i]].float().mean() for i in range(1797)])
    outside = torch.stack([blended[i][scanned[i] == 0].float().mean() for i in range(1797)])
    inked = ink.flatten(1).any(1)
    assert inked.sum() > 1700
    assert (inside + outside - 255)[inked].abs().mean() < 35  # a patch and its negative add up to white


def test_fonts_differ_in_colour_and_no_two_images_are_equal(loaded):
    """Broken if the print is not varied, or a glyph is blank."""
    images = loaded["fonts"].images.flatten(1)
    assert len(images.unique(dim=0)) == 1797
    assert (images.float().std(1) > 5).all()


def test_generated_domains_say_so(loaded):
    """Broken if a drawn digit passes for a scanned one in a report."""
    assert set(loaded.meta["generated"]) == {"blended", "fonts"}
    only = OptDigits(OptDigits.Params(domains=("scanned",), limit=None))
    assert only.selected == ("scanned",)


def test_a_source_digit_is_in_one_part_only(loaded):
    """Broken if a digit that trains as `scanned` is tested as `blended`."""
    for seed in range(3):
        splits = make_splits(loaded, seed)
        for part in ("train", "val", "test"):
            assert getattr(splits["scanned"], part).tolist() == getattr(splits["blended"], part).tolist()
    data = DataModule(loaded, "lodo:blended", 0, 64)
    assert not set(data.splits["blended"].test.tolist()) & set(data.splits["scanned"].train.tolist())


def test_found_by_name(tmp_path):
    """Broken if the default data set of every command is not in the registry."""
    assert open_data("optdigits", {"domains": ["scanned"]}, None, tmp_path).names == ("scanned",)


class TestOptDigits(DatasetContract):
    dataset = "optdigits"
    classes_of: ClassVar = {"scanned": UCI, "blended": UCI, "fonts": [180] * 7 + [179] * 3}
