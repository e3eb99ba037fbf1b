"""The picture of a data set: read back as pixels."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.data import DataSet, Domain, Loaded, make_splits
from qatbench.reports.montage import _label, montage


def colours(domains: int, classes: int, channels: int = 3, **params) -> Loaded:
    """Images of one colour, a different one for each class and domain."""
    made = []
    for d in range(domains):
        labels = torch.arange(40 * classes) % classes
        images = torch.empty(len(labels), channels, 10, 10, dtype=torch.uint8)
        images[:] = torch.stack([labels * 5 + 7, torch.full_like(labels, 60 * d + 20), 250 - labels * 5], 1)[
            :, :channels, None, None
        ]
        made.append(Domain(f"d{d}", images, labels))
    names = tuple(f"class {c}" for c in range(classes))
    return Loaded("colours", made, "f" * 64, names, params=DataSet.Params.model_validate(params))


def picture(loaded: Loaded) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(montage(loaded, make_splits(loaded, 0), 0))).convert("RGB"))


@pytest.mark.parametrize(("domains", "classes"), [(1, 2), (3, 10), (2, 40)])
def test_every_shown_class_and_domain_is_in_the_picture(domains, classes):
    """Broken if a domain or a class is missing from the picture that is to show what is trained on."""
    loaded = colours(domains, classes)
    seen = set(map(tuple, picture(loaded).reshape(-1, 3).tolist()))
    shown = [c for c in range(classes) if (c * 5 + 7, 20, 250 - c * 5) in seen]
    assert len(shown) == min(classes, 12)
    assert {0, classes - 1} <= set(shown)
    for d in range(domains):
        assert all((c * 5 + 7, 60 * d + 20, 250 - c * 5) in seen for c in shown)


def test_grey_images_and_empty_classes_are_drawn():
    """Broken if a set of one channel, or a long tail that drops classes, ends in a traceback."""
    loaded = colours(1, 40, channels=1, imbalance=1000.0, lt_list="climbq")
    counts = torch.bincount(loaded["d0"].labels[make_splits(loaded, 0)["d0"].train], minlength=40)
    assert counts.min() == 0
    assert picture(loaded).std() > 0


def test_names_that_no_font_here_can_draw_are_numbers(recwarn):
    """Broken if a class named in Chinese were a box, or warned in the words of a library about its glyph."""
    loaded = colours(1, 2)
    names = ("caf\u00e9", "\U000f0000", "a\tb")
    loaded = dataclasses.replace(loaded, classes=names, name="imagefolder:\U000f0000")
    assert [_label(loaded, c) for c in range(3)] == ["caf\u00e9", "class 1", "class 2"]
    assert picture(loaded).std() > 0
    assert not recwarn.list
