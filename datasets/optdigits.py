"""1,797 real digits inside scikit-learn's wheel, as three domains that need no file and no network."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from ..bench.data import DataSet, Domain

SIZE, SCALE = 28, 4  # fonts are drawn at SCALE times the size, then reduced
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)


class OptDigits(DataSet):
    """Handwritten digits as scanned; the same digits in colour over photographs; digits in print.

    `scanned` and `blended` show the same 1,797 digits, so they are split alike: a digit that trains in one tests in neither.
    """

    name = "optdigits"
    domains = ("scanned", "blended", "fonts")
    classes = tuple("0123456789")
    image = (3, SIZE, SIZE)
    augment = "shift"
    source = "sklearn.datasets.load_digits: the test part of the UCI Optical Recognition of Handwritten Digits data"
    licence = (
        "CC BY 4.0 (digits); BSD-3-Clause (scikit-learn's photographs); Bitstream Vera and STIX (matplotlib's fonts)"
    )
    citation = (
        "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998"
    )
    generated: ClassVar[Mapping[str, str]] = {
        "blended": "the scanned digits, |texture - digit| in colour (MNIST-M's recipe, Ganin et al. 2016), over random "
        "crops of scikit-learn's two sample photographs",
        "fonts": f"digits drawn with {len(FACES)} fonts that matplotlib ships, varied in place, size, slant, colour and blur",
    }

    def fingerprint(self) -> str:
        """The versions of what the images are made from and with."""
        packages = ("scikit-learn", "matplotlib", "pillow", "numpy")
        return " ".join([*map(importlib.metadata.version, packages), str(features.version("freetype2"))])

    def load(self) -> list[Domain]:
        """Draw the domains asked for; each has its own fixed seed, so that one does not depend on another."""
        draw = {"scanned": _scanned, "blended": _blended, "fonts": _fonts}
        return [draw[name]() for name in self.selected]


def _digits() -> tuple[np.ndarray, torch.Tensor]:
    """The digits, smoothly enlarged, uint8 [N, 28, 28]; and their labels."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    large = np.zeros((len(small), SIZE, SIZE), np.uint8)
    large[:, 2:-2, 2:-2] = [np.asarray(Image.fromarray(x).resize((24, 24), Image.Resampling.BICUBIC)) for x in small]
    return large, torch.from_numpy(data.target.astype(np.int64))


def _scanned() -> Domain:
    digits, labels = _digits()
    images = torch.from_numpy(digits)[:, None].expand(-1, 3, -1, -1)
    return Domain("scanned", images, labels, group=torch.arange(len(labels)))


def _blended() -> Domain:
    from sklearn.datasets import load_sample_images

    digits, labels = _digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(1)
    images = np.empty((len(digits), SIZE, SIZE, 3), np.uint8)
    for i, digit in enumerate(digits):
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(SIZE, 4 * SIZE))
        left, top = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
        patch = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        images[i] = np.abs(np.asarray(patch, np.int16) - digit[..., None])
    return Domain("blended", torch.from_numpy(images).permute(0, 3, 1, 2), labels, group=torch.arange(len(labels)))


def _fonts(count: int = 1797) -> Domain:
    folder = importlib.resources.files("matplotlib") / "mpl-data" / "fonts" / "ttf"
    rng = np.random.default_rng(2)
    labels = np.arange(count) % 10
    images = np.stack([_print_digit(str(label), folder, rng) for label in labels])
    return Domain("fonts", torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def _print_digit(text: str, folder: Traversable, rng: np.random.Generator) -> np.ndarray:
    side = SIZE * SCALE
    face, points = FACES[rng.integers(len(FACES))], int(rng.integers(17 * SCALE, 30 * SCALE))
    font = ImageFont.truetype(str(folder / f"{face}.ttf"), points, layout_engine=ImageFont.Layout.BASIC)
    shift = rng.integers(-4 * SCALE, 4 * SCALE + 1, 2)
    mask = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(text)
    corner = (side - left - right) / 2 + shift[0], (side - top - bottom) / 2 + shift[1]
    ImageDraw.Draw(mask).text(corner, text, 255, font)
    slant = rng.uniform(-0.35, 0.35)
    shear = (1, slant, -slant * side / 2, 0, 1, 0)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5) * SCALE)).resize((SIZE, SIZE), Image.Resampling.BOX)
    ink, paper = _colours(rng)
    alpha = np.asarray(mask, np.int32)[..., None]
    return ((alpha * ink + (255 - alpha) * paper + 127) // 255).astype(np.uint8)


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Two colours that can be told apart in grey as well."""
    while True:
        pair = rng.integers(0, 256, (2, 3))
        grey = pair @ (299, 587, 114)
        if abs(int(grey[0]) - int(grey[1])) > 55_000:
            return pair
