"""Whole-batch augmentation against its plain, slow meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.augment import AUGMENTS, Augment, Normalise, find_augment
from qatbench.bench.errors import UserError


def slow(augment: Augment, image: torch.Tensor, down: int, right: int, flip: int) -> torch.Tensor:
    """The same for one image, pixel by pixel."""
    h, w, _ = image.shape
    image = image.flip(1) if flip else image
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            y, x = i + down - augment.pad, j + right - augment.pad
            if augment.edge:
                out[i, j] = image[min(max(y, 0), h - 1), min(max(x, 0), w - 1)]
            elif 0 <= y < h and 0 <= x < w:
                out[i, j] = image[y, x]
    return out


@settings(max_examples=40, deadline=None)
@given(
    augment=st.builds(Augment, pad=st.integers(0, 3), edge=st.booleans(), flip=st.booleans()),
    size=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_way(augment, size, seed):
    """Broken if a window of the strided view starts at a wrong byte, or an image gets another's move."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, size, dtype=torch.uint8, generator=rng)
    before = x.clone()
    drawn = augment.draw(len(x), rng)
    y = augment.apply(x, drawn)
    assert y.dtype == torch.uint8
    assert torch.equal(x, before)
    expected = torch.stack([slow(augment, image, *row) for image, row in zip(x, drawn.tolist(), strict=True)])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", AUGMENTS)
def test_draws_cover_every_move_equally(name):
    """Broken if an offset or the mirror image is never drawn, or is drawn too often."""
    augment = AUGMENTS[name]
    drawn = augment.draw(20_000, torch.Generator().manual_seed(0))
    for column, values in zip(drawn.T, (2 * augment.pad + 1, 2 * augment.pad + 1, 1 + augment.flip), strict=True):
        counts = torch.bincount(column, minlength=values)
        assert len(counts) == values
        assert ((counts * values / 20_000 - 1).abs() < 0.1).all()


def test_none_changes_nothing():
    """Broken if "none" touches a pixel."""
    x = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(AUGMENTS["none"].apply(x, AUGMENTS["none"].draw(5, torch.Generator())), x)


def test_default_is_the_data_sets_own_and_unknown_names_the_nearest():
    """Broken if a misspelt augmentation trains with another one."""
    assert find_augment("default", "shift") is AUGMENTS["shift"]
    with pytest.raises(UserError, match="crop-flip"):
        find_augment("cropflip", "shift")


def test_normalise_equals_the_formula():
    """Broken if scale or shift land on another channel, or the result is not channels_last."""
    x = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    y = Normalise(mean, std, 30)(x)
    expected = (x.permute(0, 3, 1, 2) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
