"""Whole-batch augmentation against its plain, slow meaning, and against torchvision."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
import torchvision.transforms.functional as V
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.augment import ASPECT, AUGMENTS, Crop, Normalise, ResizedCrop, centre, find_augment
from qatbench.bench.errors import UserError
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

SEEDS = st.integers(0, 1000)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    """Pixels of any value."""
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=seeded(seed))


def smooth(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Images [n, size, size, 3] with the soft gradients of photographs, and every hue."""
    coarse = torch.rand(n, 3, 6, 6, generator=seeded(seed)) * 255
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def planes(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] as torchvision takes it."""
    return x.permute(0, 3, 1, 2)


def moved(down: int, right: int, flip: int) -> torch.Tensor:
    return torch.tensor([[down, right, flip]])


def slow(augment: Crop, image: torch.Tensor, down: int, right: int, flip: int) -> torch.Tensor:
    """The same for one image of the crop's size, pixel by pixel."""
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
    augment=st.builds(Crop, pad=st.integers(0, 3), edge=st.booleans(), flip=st.booleans(), window=st.booleans()),
    size=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    seed=SEEDS,
)
def test_equals_the_slow_way(augment, size, seed):
    """Broken if a window of the strided view starts at a wrong byte, or an image gets another's move."""
    rng = seeded(seed)
    x = noise(*size, seed=seed)
    before = x.clone()
    drawn = augment.draw(len(x), rng, size[1:3], size[1:3])
    y = augment.apply(x, drawn, size[1:3])
    assert y.dtype == torch.uint8
    assert torch.equal(x, before)
    expected = torch.stack([slow(augment, image, *row) for image, row in zip(x, drawn.tolist(), strict=True)])
    assert torch.equal(y, expected)


@settings(max_examples=40, deadline=None)
@given(
    stored=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    crop=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.sampled_from([1, 3]),
    seed=SEEDS,
)
def test_a_window_is_a_part_of_the_stored_image(stored, crop, channels, seed):
    """Broken if an image stored larger than the crop is padded, or its mirror image is another window than was drawn."""
    augment = Crop(pad=4, flip=True, window=True)
    x = noise(5, *stored, channels, seed=seed)
    drawn = augment.draw(5, seeded(seed), stored, crop)
    if stored == crop:
        return
    for image, got, (down, right, flip) in zip(x, augment.apply(x, drawn, crop), drawn.tolist(), strict=True):
        image = image.flip(1) if flip else image
        assert torch.equal(got, image[down : down + crop[0], right : right + crop[1]])
        assert got.shape[:2] == crop


def test_large_images_are_mirrored_as_small_ones():
    """Broken if the call per image that large images get mirrors another image, or a batch's own memory is given out."""
    x = noise(6, 130, 120, 3)
    before = x.clone()
    drawn = torch.tensor([[8, 8, 1], [0, 0, 0], [3, 5, 1], [4, 4, 0], [4, 4, 1], [0, 8, 1]])
    y = AUGMENTS["crop-flip"].apply(x, drawn, (130, 120))
    expected = F.pad(planes(x), (4, 4, 4, 4))
    for image, got, (down, right, flip) in zip(expected, y, drawn.tolist(), strict=True):
        image = V.hflip(image) if flip else image
        assert torch.equal(got.permute(2, 0, 1), V.crop(image, down, right, 130, 120))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["none", "shift"])
def test_what_has_no_window_takes_the_centre(name):
    """Broken if "none" or "shift" moves an image by more than it says because it is stored larger than the crop."""
    x, augment = noise(4, 11, 10, 3), AUGMENTS[name]
    drawn = augment.draw(4, seeded(0), (11, 10), (6, 6))
    middle = x[:, 2:8, 2:8]
    assert torch.equal(augment.apply(x, drawn, (6, 6)), augment.apply(middle, drawn, (6, 6)))


@pytest.mark.parametrize(
    ("name", "stored", "crop"),
    [
        ("none", (32, 32), (32, 32)),
        ("shift", (32, 32), (32, 32)),
        ("crop-flip", (32, 32), (32, 32)),
        ("crop-flip", (36, 40), (32, 32)),
        ("shift", (36, 40), (32, 32)),
    ],
)
def test_draws_cover_every_move_equally(name, stored, crop):
    """Broken if an offset or the mirror image is never drawn, or is drawn too often."""
    augment, n = AUGMENTS[name], 20_000
    drawn = augment.draw(n, seeded(1), stored, crop)
    windowed = augment.window and stored != crop
    margins = [s - c if windowed else 2 * augment.pad for s, c in zip(stored, crop, strict=True)]
    for column, values in zip(drawn.T, (margins[0] + 1, margins[1] + 1, 1 + augment.flip), strict=True):
        counts = torch.bincount(column, minlength=values).double()
        assert len(counts) == values
        chi2 = ((counts - n / values) ** 2 / (n / values)).sum()
        assert chi2 < values - 1 + 4 * math.sqrt(2 * values)  # four deviations


def test_the_first_numbers_are_drawn_as_ever():
    """Broken if a seed gives other batches than it gave before: results in published tables could not be made again."""
    drawn = AUGMENTS["crop-flip"].draw(16, seeded(0), (32, 32), (32, 32))
    rng = seeded(0)
    down, right = torch.randint(9, (2, 16), generator=rng)
    assert torch.equal(drawn, torch.stack([down, right, torch.randint(2, (16,), generator=rng)], 1))


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("size", [16, 90])
def test_parts_of_a_batch_give_the_parts(name, size):
    """Broken if the pixels of an image depend on which other images are in its batch: two ranks would not equal one."""
    augment, stored, crop = AUGMENTS[name], (size + 9, size + 4), (size, size)
    x = noise(23, *stored, 3)
    drawn = augment.draw(23, seeded(1), stored, crop)
    assert drawn.shape == (23, augment.columns)
    assert drawn.device.type == "cpu"
    whole = augment.apply(x, drawn, crop)
    assert whole.shape == (23, *crop, 3)
    assert whole.dtype == torch.uint8
    parts = [augment.apply(x[rows], drawn[rows], crop) for rows in torch.arange(23).split((1, 7, 15))]
    assert torch.equal(whole, torch.cat(parts))


def test_none_changes_nothing():
    """Broken if "none" touches a pixel."""
    x = noise(5, 8, 8, 3)
    assert torch.equal(AUGMENTS["none"].apply(x, AUGMENTS["none"].draw(5, seeded(0), (8, 8), (8, 8)), (8, 8)), x)


@settings(max_examples=30, deadline=None)
@given(stored=st.tuples(st.integers(1, 90), st.integers(1, 90)), low=st.floats(0.01, 1), seed=SEEDS)
def test_drawn_windows_lie_in_the_image(stored, low, seed):
    """Broken if a window reaches beyond the image, is empty, or has an area or aspect that was not asked for."""
    top, left, height, width, flip = ResizedCrop((low, 1.0)).draw(50, seeded(seed), stored, (8, 8)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= stored[0]).all()
    assert (left + width <= stored[1]).all()
    assert set(flip.tolist()) <= {0, 1}
    assert ((width - 0.5) / (height + 0.5) <= ASPECT[1] + 1e-6).all()
    assert ((width + 0.5) / (height - 0.5) >= ASPECT[0] - 1e-6).all()


def test_windows_are_as_often_at_every_place():
    """Broken if a drawn window never touches the lower or right edge, or prefers some places."""
    drawn = ResizedCrop((0.25, 0.25)).draw(20_000, seeded(1), (8, 8), (8, 8))
    for place, size in zip(drawn[:, :2].T, drawn[:, 2:4].T, strict=True):
        counts = torch.bincount(place[size == 4].int(), minlength=5).double()
        assert len(counts) == 5
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 18.5  # chi-square of 4: p = 0.001


@pytest.mark.parametrize(
    ("stored", "scale"), [((256, 256), (0.08, 1.0)), ((60, 200), (0.7, 1.0)), ((90, 64), (0.08, 1))]
)
def test_windows_are_distributed_as_torchvisions(stored, scale):
    """Broken if windows are larger, longer or nearer to an edge than those of RandomResizedCrop; fallback included."""
    n = 4000
    ours = ResizedCrop(scale).draw(n, seeded(0), stored, (8, 8))[:, :4]
    torch.manual_seed(1)
    image = torch.empty(3, *stored)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ASPECT)) for _ in range(n)]).float()
    for mine, other in zip(ours.T, theirs.T, strict=True):  # Kolmogorov and Smirnov: the distance of the distributions
        at = torch.cat([mine, other]).unique()
        apart = [torch.searchsorted(v.sort().values, at, right=True) / n for v in (mine, other)]
        assert (apart[0] - apart[1]).abs().max() < 1.95 * math.sqrt(2 / n)  # p = 0.001


def test_a_window_that_never_fits_is_the_largest_in_the_centre():
    """Broken if the fallback after ten tries is not torchvision's."""
    assert (ResizedCrop((1.0, 1.0)).draw(20, seeded(0), (30, 90), (8, 8))[:, :4] == torch.tensor([0, 25, 30, 40])).all()
    assert (ResizedCrop((1.0, 1.0)).draw(20, seeded(0), (91, 30), (8, 8))[:, :4] == torch.tensor([25, 0, 40, 30])).all()


@settings(max_examples=25, deadline=None)
@given(crop=st.tuples(st.integers(3, 40), st.integers(3, 40)), channels=st.sampled_from([1, 3]), seed=SEEDS)
def test_a_resized_crop_is_torchvisions(crop, channels, seed):
    """Broken if a window is cut elsewhere than drawn, resized without antialiasing, or mirrored before it is cut."""
    x, augment = noise(4, 37, 41, channels, seed=seed), AUGMENTS["resized-crop-flip"]
    drawn = augment.draw(4, seeded(seed), (37, 41), crop)
    for image, got, (top, left, height, width, flip) in zip(
        planes(x), augment.apply(x, drawn, crop), drawn.int().tolist(), strict=True
    ):
        expected = V.resized_crop(image.float(), top, left, height, width, list(crop), antialias=True)
        expected = V.hflip(expected) if flip else expected
        assert (got.permute(2, 0, 1) - expected.round()).abs().max() <= 1


@settings(max_examples=25, deadline=None)
@given(level=st.integers(0, 255), stored=st.integers(5, 60), crop=st.integers(2, 60), seed=SEEDS)
def test_a_resized_crop_of_a_plain_image_is_plain(level, stored, crop, seed):
    """Broken if the weights of resizing do not sum to one, or the border is taken from beyond the window."""
    x, augment = torch.full((3, stored, stored, 3), level, dtype=torch.uint8), AUGMENTS["resized-crop-flip"]
    y = augment.apply(x, augment.draw(3, seeded(seed), (stored, stored), (crop, crop)), (crop, crop))
    assert (y == level).all()


def whole(size: int, *how: float, flip: int = 0) -> torch.Tensor:
    """What is drawn for the window that is all of the image, with these colour changes."""
    return torch.tensor([[0.0, 0, size, size, flip, *how]])


UNCHANGED = (1, 1, 1, 0, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_window_unchanged_is_the_image(channels):
    """Broken if resizing to the same size, or colour changes of strength 0, alter a pixel."""
    x = noise(1, 64, 64, channels)
    assert torch.equal(ResizedCrop((1, 1)).apply(x, whole(64), (64, 64)), x)
    assert torch.equal(AUGMENTS["domainbed"].apply(x, whole(64, *UNCHANGED), (64, 64)), x)
    assert torch.equal(AUGMENTS["domainbed"].apply(x, whole(64, *UNCHANGED, flip=1), (64, 64)), x.flip(2))


FACTORS = st.floats(0.7, 1.3)
HUES = st.floats(-0.5, 0.5)


@settings(max_examples=30, deadline=None)
@given(b=FACTORS, c=FACTORS, s=FACTORS, seed=SEEDS)
def test_each_colour_change_is_torchvisions(b, c, s, seed):
    """Broken if brightness, contrast or saturation is applied to another, or with another grey."""
    x, augment = noise(1, 20, 20, 3, seed=seed), AUGMENTS["domainbed"]
    for how, adjust, factor in (
        ((b, 1, 1, 0, 0), V.adjust_brightness, b),
        ((1, c, 1, 0, 0), V.adjust_contrast, c),
        ((1, 1, s, 0, 0), V.adjust_saturation, s),
    ):
        got = augment.apply(x, whole(20, *how), (20, 20))
        assert (planes(got).int() - adjust(planes(x), factor).int()).abs().max() <= 2


@settings(max_examples=15, deadline=None)
@given(b=FACTORS, c=FACTORS, s=FACTORS, h=HUES, grey=st.booleans(), seed=SEEDS)
def test_colours_together_are_torchvisions_in_that_order(b, c, s, h, grey, seed):
    """Broken if the order of the changes is another, a clamp between them is missing, or hue turns the wrong way."""
    x = torch.cat([noise(1, 24, 24, 3, seed=seed), smooth(2, 24, seed)])
    got = AUGMENTS["domainbed"].apply(x, whole(24, b, c, s, h, grey).expand(3, -1), (24, 24))
    y = V.adjust_contrast(V.adjust_brightness(planes(x) / 255, b), c)
    y = V.adjust_hue(V.adjust_saturation(y, s), h)
    y = V.rgb_to_grayscale(y, 3) if grey else y
    assert (planes(got) - 255 * y).abs().max() <= 2


@settings(max_examples=15, deadline=None)
@given(b=FACTORS, c=FACTORS, s=FACTORS, h=HUES, seed=SEEDS)
def test_colours_are_those_of_a_plain_loop(b, c, s, h, seed):
    """Broken if a pixel's colour depends on anything but itself, the factors and the mean grey of its image."""
    x = torch.cat([noise(1, 6, 6, 3, seed=seed), smooth(1, 6, seed)])[seed % 2][None]
    got = AUGMENTS["domainbed"].apply(x, whole(6, b, c, s, h, 0), (6, 6))[0].view(-1, 3).tolist()

    def grey(p):
        return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]

    def mix(p, q, factor):
        return [min(max(factor * v + (1 - factor) * q, 0), 255) for v in p]

    pixels = [mix(p, 0, b) for p in x.view(-1, 3).tolist()]
    mean = sum(map(grey, pixels)) / len(pixels)
    for p, seen in zip(pixels, got, strict=True):
        p = mix(p, mean, c)
        p = mix(p, grey(p), s)
        hue, saturation, value = colorsys.rgb_to_hsv(*p)
        expected = colorsys.hsv_to_rgb((hue + h) % 1, saturation, value)
        assert max(abs(v - e) for v, e in zip(seen, expected, strict=True)) <= 1


def test_grey_images_are_grey_and_alone():
    """Broken if a grey image keeps a colour, or another image than the one that was drawn turns grey."""
    x = noise(4, 16, 16, 3)
    drawn = whole(16, *UNCHANGED).repeat(4, 1)
    drawn[2, -1] = 1
    y = AUGMENTS["domainbed"].apply(x, drawn, (16, 16))
    assert (y[2] == y[2, :, :, :1]).all()
    assert torch.equal(y[[0, 1, 3]], x[[0, 1, 3]])


def test_colour_draws_are_fair():
    """Broken if a colour change is skewed, reaches beyond 0.3, or grey images are not one in ten."""
    drawn = AUGMENTS["domainbed"].draw(20_000, seeded(0), (64, 64), (56, 56))
    for column, middle in zip(drawn[:, 5:9].T, (1, 1, 1, 0), strict=True):
        counts = torch.histc(column - middle, 20, -0.3, 0.3)
        assert counts.sum() == 20_000
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square of 19: p = 0.001
    assert abs(drawn[:, 9].mean() - 0.1) < 0.01
    assert abs(drawn[:, 4].mean() - 0.5) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_gpu_gives_the_same_pixels(name):
    """Broken if a GPU trains on other images; antialiased resizing alone may differ, by one grey level before the colours."""
    augment, x = AUGMENTS[name], smooth(8, 80)
    drawn = augment.draw(8, seeded(0), (80, 80), (64, 64))
    here, there = augment.apply(x, drawn, (64, 64)), augment.apply(x.cuda(), drawn.cuda(), (64, 64)).cpu()
    assert (here.int() - there.int()).abs().max() <= (4 if isinstance(augment, ResizedCrop) else 0)


@settings(max_examples=30, deadline=None)
@given(stored=st.tuples(st.integers(6, 20), st.integers(6, 20)), crop=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_the_centre_is_torchvisions(stored, crop):
    """Broken if an evaluation sees another part of the image than published ones."""
    x = noise(2, *stored, 3)
    assert torch.equal(planes(centre(x, crop)), V.center_crop(planes(x), list(crop)))


def test_a_crop_larger_than_the_image_is_refused():
    """Broken if a size that cannot be cropped ends in a traceback, or in pixels from elsewhere in memory."""
    for work in (
        lambda: centre(noise(1, 32, 32, 3), (32, 64)),
        lambda: AUGMENTS["crop-flip"].draw(1, seeded(0), (32, 32), (64, 32)),
        lambda: AUGMENTS["none"].apply(noise(1, 32, 32, 3), moved(0, 0, 0), (64, 64)),
    ):
        with pytest.raises(UserError, match="32 x 32"):
            work()


def test_default_is_the_data_sets_own_and_unknown_names_the_nearest():
    """Broken if a misspelt augmentation trains with another one."""
    assert find_augment("default", "shift") is AUGMENTS["shift"]
    with pytest.raises(UserError, match="crop-flip"):
        find_augment("cropflip", "shift")


@pytest.mark.parametrize("size", [(4, 6, 5), (20, 160, 150)])
def test_normalise_equals_the_formula(size):
    """Broken if scale or shift land on another channel, a part of a large batch is left out, or it is not channels_last."""
    x = noise(*size, 3)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    y = Normalise(mean, std, size[1] * size[2])(x)
    expected = (x.permute(0, 3, 1, 2) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_that_is_held_is_never_written_again():
    """Broken if memory is given out again while a batch, a view of one or a graph that saved one still needs it."""
    normalise = Normalise(torch.zeros(3), torch.full((3,), 1 / 255), 8 * 8)  # pixels as they are
    images = [noise(4, 8, 8, 3, seed=k) for k in range(12)]
    weight = torch.ones(1, requires_grad=True)
    whole, view = normalise(images[0]), normalise(images[1])[2, :, :4]
    loss = (normalise(images[2]) * weight).sum()
    rest = [normalise(i) for i in images[3:]]
    loss.backward()
    for image, batch in zip((images[0], *images[3:]), (whole, *rest), strict=True):
        assert torch.equal(batch, planes(image).float())
    assert torch.equal(view, planes(images[1])[2, :, :4].float())
    assert weight.grad == images[2].sum()


def test_memory_is_given_out_again():
    """Broken if each batch takes fresh memory from the kernel, which halves the speed with photographs."""
    normalise = Normalise(torch.zeros(3), torch.ones(3), 8 * 8)
    first = normalise(noise(8, 8, 8, 3)).data_ptr()
    assert [normalise(noise(n, 8, 8, 3)).data_ptr() for n in (8, 5, 8)] == [first] * 3
