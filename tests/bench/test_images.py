"""Images in every mode and format, damaged in every way, against Pillow, torchvision and plain slices."""

from __future__ import annotations

import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin
from qatbench.bench.errors import UserError
from qatbench.bench.images import Encoded, decode, refuse_dark
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 30, 3), dtype=np.uint8)
GREY = NOISE[..., 0]
SMOOTH = np.kron(NOISE[:6, :6], np.ones((8, 8, 1), np.uint8))  # what a lossy format keeps roughly
LOSSLESS = [
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
]
LOSSY = [
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("WEBP", {"quality": 95}),
    ("TIFF", {"compression": "jpeg", "quality": 95}),
]


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """The image as a file's content; an array is taken as RGB or grey."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def filled(encoded_images: Encoded, threads: int | None = None) -> np.ndarray:
    """What ``decode_into`` makes of them; 7 where it wrote nothing."""
    n, channels, height, width = encoded_images.shape
    out = np.full((n, height, width, channels), 7, np.uint8)
    encoded_images.decode_into(out, threads=threads)
    return out


def refusal(source: Path | bytes, name: str = "") -> str:
    """The one line that the image is refused with."""
    with pytest.raises(UserError) as caught:
        decode(source, name)
    message = str(caught.value)
    assert "\n" not in message
    assert "object at 0x" not in message
    return message


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_files_keep_every_pixel(kind, options, tmp_path):
    """Broken if a lossless format loses or reorders pixels or channels, from a file or from bytes."""
    picture = NOISE if kind != "GIF" else np.asarray(Image.fromarray(NOISE).quantize(64).convert("RGB"))
    path = tmp_path / "image"  # the content decides, not the ending
    path.write_bytes(encoded(picture, kind, **options))
    for source in (path, path.read_bytes()):
        image = decode(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), picture)


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_lossy_files_keep_colours(kind, options):
    """Broken if channels are swapped or a colour space is not undone."""
    image = np.asarray(decode(encoded(SMOOTH, kind, **options)))
    assert image.shape == SMOOTH.shape
    assert np.abs(image.astype(int) - SMOOTH).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_grey_has_three_equal_channels(kind):
    """Broken if a grey image keeps one channel, or gets a colour."""
    image = np.asarray(decode(encoded(GREY, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    assert image.shape == (24, 30, 3)
    assert (image == image[..., :1]).all()
    if kind != "JPEG":
        assert np.array_equal(image[..., 0], GREY)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_black_and_white(kind):
    """Broken if one-bit pixels come out as 0 and 1 instead of 0 and 255."""
    image = Image.fromarray(GREY > 127)
    assert image.mode == "1"
    assert np.array_equal(np.asarray(decode(encoded(image, kind)))[..., 1], (GREY > 127) * 255)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette_is_looked_up(kind):
    """Broken if indices are taken for grey values."""
    image = Image.fromarray(NOISE).quantize(16)
    assert np.array_equal(np.asarray(decode(encoded(image, kind))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_ignored(kind):
    """Broken if stored colours are blended with a background: the numbers would depend on which."""
    rgba = np.dstack([NOISE, np.where(GREY > 127, 0, 200).astype(np.uint8)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(np.asarray(decode(encoded(rgba, kind, **options))), NOISE)


def test_transparency_of_grey_and_palette_is_ignored():
    """Broken if LA or a palette with alpha values is refused, blended, or announced by a warning of Pillow's."""
    la = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (30, 24), 9)])
    assert np.array_equal(np.asarray(decode(encoded(la)))[..., 2], GREY)
    palette = Image.fromarray(NOISE).quantize(16)
    raw = encoded(palette, transparency=bytes(range(16)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(raw)).convert("RGB")
        assert seen, "Pillow no longer warns of this: find another image for this test"
        seen.clear()
        assert np.array_equal(np.asarray(decode(raw)), np.asarray(palette.convert("RGB")))
        assert not seen


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_no_negative(kind):
    """Broken if the inverted inks that Adobe (and Pillow) write into a JPEG are not turned round: black would be white."""
    colours = np.zeros((48, 48, 3), np.uint8)
    colours[:24], colours[24:, :24] = (250, 20, 20), (255, 255, 255)
    raw = encoded(Image.fromarray(colours).convert("CMYK"), kind)
    assert kind != "JPEG" or b"Adobe" in raw
    assert np.abs(np.asarray(decode(raw)).astype(int) - colours).mean() < 3


def deep(kind: str) -> Image.Image:
    """Grey of 16 bits whose upper byte is GREY; its lower byte would round some of it up."""
    values = GREY.astype(np.uint16) << 8 | 0xF0
    if kind == "I":
        return Image.fromarray(values.astype(np.int32))
    if kind == "I;16B":
        return Image.frombytes("I;16B", (30, 24), values.astype(">u2").tobytes())
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF"), ("I;16", "PPM")]
)
def test_deep_grey_is_scaled_not_clipped(mode, kind):
    """Broken if 16-bit grey is clipped at 255: nearly all of the image would be white."""
    raw = encoded(deep(mode), kind)
    assert Image.open(io.BytesIO(raw)).mode.startswith("I")
    assert np.array_equal(np.asarray(decode(raw)), np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_beyond_sixteen_bits_are_refused(value, tmp_path):
    """Broken if 32-bit values wrap round."""
    path = tmp_path / "depth.tif"
    Image.fromarray(np.full((4, 5), value, np.int32)).save(path)
    assert refusal(path).startswith(f"{path} has float or 32-bit pixels; save it with 8 or 16 bits")


def grey16(path: Path, values: np.ndarray, bits: int = 16, photometric: int = 1) -> Path:
    """A TIFF of uint16 in one strip, with these tags."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[258], tags[262] = bits, photometric
    Image.fromarray(values.astype(np.uint16)).save(path, tiffinfo=tags)
    raw = bytearray(path.read_bytes())
    for tag, value in ((258, bits), (262, photometric)):  # Pillow writes its own
        at = raw.index(struct.pack("<HH", tag, 3)) + 8
        struct.pack_into("<H", raw, at, value)
    path.write_bytes(raw)
    return path


def test_a_tiff_that_counts_from_white_is_turned_round(tmp_path):
    """Broken if half of a scanner's images were negatives of the others: Pillow heeds the tag up to 8 bits alone."""
    values = GREY.astype(np.uint16) << 8 | 0x80
    plain = decode(grey16(tmp_path / "plain.tif", values))
    turned = decode(grey16(tmp_path / "turned.tif", 0xFFFF - values, photometric=0))
    assert np.array_equal(np.asarray(plain)[..., 0], GREY)
    assert np.array_equal(np.asarray(turned), np.asarray(plain))


def a_set_of(tmp_path: Path, *brightest: int) -> None:
    """A data set of grey images of 16 bits with these largest values, and a plain one of 8 bits."""
    arrays = [np.array([[0, value]], np.uint16) for value in brightest]
    paths = [write_grey(tmp_path / f"{i:03}.png", values) for i, values in enumerate(arrays)]
    plain = write_grey(tmp_path / "plain.png", np.full((8, 8), 255, np.uint8))
    refuse_dark([Encoded([*paths, plain], (8, 8)), Encoded([plain], (8, 8))], "cam")


def write_grey(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_a_data_set_of_12_bits_in_16_is_refused(tmp_path):
    """Broken if a camera's images trained as nearly black ones, with 16 levels of grey."""
    with pytest.raises(UserError, match=r"16 bits in 'cam' have no value above 4,095 of 65,535.*multiply them by 16"):
        a_set_of(tmp_path, *[17] * 150, 4095)
    for bright in range(0, 200, 40):  # wherever it is, also between those that are looked at first
        a_set_of(tmp_path, *[3] * bright, 4096, *[4095] * (199 - bright))
    a_set_of(tmp_path)
    turned = grey16(tmp_path / "turned.tif", np.full((4, 4), 0xFFFF - 100), photometric=0)
    with pytest.raises(UserError, match="no value above 100"):
        refuse_dark([Encoded([turned.read_bytes()], (8, 8))], "cam")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refuse_dark([Encoded([tmp_path / "damaged.png", tmp_path / "nowhere.png"], (8, 8))], "cam")


def test_float_is_refused(tmp_path):
    """Broken if values of unknown range are clipped to 8 bits."""
    path = tmp_path / "x.tif"
    Image.fromarray(GREY.astype(np.float32) / 255).save(path)
    assert refusal(path).startswith(f"{path} has float or 32-bit pixels")


def test_orientation_is_not_applied():
    """Broken if EXIF turns the image: torchvision's ImageFolder does not turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(SMOOTH[:, :24], "JPEG", exif=exif)
    assert Image.open(io.BytesIO(raw)).getexif()[0x0112] == 6
    assert decode(raw).size == (24, 48)


@pytest.mark.parametrize(("kind", "options"), LOSSLESS + LOSSY)
def test_cut_short_is_noticed(kind, options, tmp_path, capfd):
    """Broken if a download that stopped early becomes an image whose lower part is grey."""
    raw = encoded(NOISE, kind, **options)
    path = tmp_path / "short.img"
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        path.write_bytes(raw[: int(len(raw) * share)])
        message = refusal(path)
        assert message.startswith(str(path))
        assert message.endswith("fetch the file again, or remove it")
    if kind != "TIFF":  # libtiff writes to the process's stderr by itself
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_short_is_noticed_by_a_process_that_allows_it(kind, monkeypatch):
    """Broken if another library's LOAD_TRUNCATED_IMAGES = True lets half images in, or is lost to it."""
    raw = encoded(NOISE, kind)
    raw = raw[: len(raw) * 9 // 10]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.open(io.BytesIO(raw)).load()
    refusal(raw)
    with pytest.raises(UserError, match="row 1 is damaged"):  # within one call, too, after another image is done
        filled(Encoded([encoded(NOISE), raw], (4, 4)), 1)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_png_checksums(data):
    """Broken if a PNG with one wrong byte, in pixels or header, passes for the image (but for the end mark's checksum)."""
    raw = bytearray(encoded(NOISE))
    raw[data.draw(st.integers(0, len(raw) - 13))] ^= data.draw(st.integers(1, 255))
    refusal(bytes(raw))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_never_ends_in_a_traceback(data):
    """Broken if some damaged bytes raise anything but a UserError."""
    kind, options = data.draw(st.sampled_from([x for x in LOSSLESS + LOSSY if x[0] != "TIFF"] + [("TIFF", {})]))
    raw = bytearray(encoded(NOISE[:6, :7], kind, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    said = ""
    try:
        assert decode(bytes(raw), "it").mode == "RGB"
    except UserError as error:
        said = str(error)
    assert said.startswith("it ") or not said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"<html>Please log in</html>", "is not an image (JPEG, PNG,"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "is not an image"),
        (encoded(NOISE[:1, :1]), "is a single pixel"),
        (encoded(NOISE[:1, :1], "JPEG"), "is a single pixel"),
    ],
)
def test_what_is_no_image(content, expected, tmp_path):
    """Broken if a placeholder, a login page or a PostScript program gets into a data set."""
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path} {expected}")
    assert message.endswith("; fetch the file again, or remove it")


@pytest.mark.parametrize(("height", "width"), [(1, 2), (2, 1)])
def test_small_is_no_placeholder(height, width):
    """Broken if the check for a single pixel looks at one side only."""
    assert np.array_equal(np.asarray(decode(encoded(NOISE[:height, :width]))), NOISE[:height, :width])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_more_than_one_frame_is_refused(kind):
    """Broken if the first of several frames silently stands for all."""
    frames = [Image.fromarray(np.roll(NOISE, k, 0)) for k in range(3)]
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert refusal(raw, "moving").startswith("moving has 3 frames; save one of them as an image")


def test_photograph_with_further_views():
    """Broken if a camera's JPEG with previews after it (MPO) is taken for an animation."""
    raw = encoded(SMOOTH, "MPO", save_all=True, append_images=[Image.new("RGB", (48, 48))], quality=95)
    image = Image.open(io.BytesIO(raw))
    assert (image.format, image.n_frames) == ("MPO", 2)  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(np.asarray(decode(raw)).astype(int) - SMOOTH).mean() < 12


def test_decompression_bomb(monkeypatch):
    """Broken if a few bytes may claim gigabytes, or if the limit's warning is printed."""
    raw = encoded(NOISE)  # 720 pixels; Pillow warns from its limit and refuses from twice that
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(raw))
        assert len(seen) == 1
        assert np.array_equal(np.asarray(decode(raw)), NOISE)
        assert len(seen) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert refusal(raw, "bomb.png").startswith("bomb.png is too large an image (")


def test_files_that_cannot_be_read(tmp_path):
    """Broken if a missing file, a directory or a link to itself ends in a traceback."""
    assert refusal(tmp_path / "no.png").startswith(f"{tmp_path / 'no.png'} is missing: put the file there")
    assert refusal(tmp_path).startswith(f"{tmp_path} is a directory")
    link = tmp_path / "link.png"
    link.symlink_to(link)
    assert refusal(link).startswith(f"cannot read {link}: ")
    assert "check permissions and links" in refusal(link)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    """Broken if a file that may not be read ends in a traceback."""
    path = tmp_path / "x.png"
    path.write_bytes(encoded(NOISE))
    path.chmod(0)
    assert "check permissions" in refusal(path)


def test_warnings_are_back_after_threads():
    """Broken if threads that decode at once leave Pillow's warnings switched off, or other filters changed."""
    raw = encoded(NOISE)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [raw] * 400))
    assert list(warnings.filters) == before


sizes = st.integers(1, 40)


@settings(max_examples=80, deadline=None)
@given(height=sizes, width=sizes, size=st.tuples(sizes, sizes), fit=st.sampled_from(["stretch", "centre"]))
def test_every_shape(height, width, size, fit):
    """Broken if some shape is not brought to the size, or a constant image does not stay constant."""
    raw = encoded(np.full((height, max(width, 2), 3), (10, 200, 255), np.uint8))
    e = Encoded([raw], size, fit)
    assert e.shape == (1, 3, *size)
    assert e.nbytes == 3 * size[0] * size[1]
    assert e[0].shape == (*size, 3)
    assert e[0].dtype == np.uint8
    assert (e[0] == (10, 200, 255)).all()


@settings(max_examples=60, deadline=None)
@given(side=st.integers(2, 40), more=st.integers(0, 60), upright=st.booleans())
def test_centre_without_scaling_is_a_slice(side, more, upright):
    """Broken if the crop is off the centre, or resamples an image whose shorter side has the size already."""
    picture = RNG.integers(0, 256, (side, side + more, 3), dtype=np.uint8)
    left = round(more / 2)
    expected = picture[:, left : left + side]
    if upright:
        picture, expected = picture.swapaxes(0, 1), expected.swapaxes(0, 1)
    assert np.array_equal(Encoded([encoded(picture)], (side, side), "centre")[0], expected)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(2, 90), width=st.integers(2, 90), side=st.integers(1, 60))
def test_fits_are_torchvisions(height, width, side):
    """Broken if ``centre`` is not Resize and CenterCrop (up to one level), or ``stretch`` not exactly Resize to both sides."""
    picture = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    raw = [encoded(picture)]
    expected = np.asarray(CenterCrop(side)(Resize(side, InterpolationMode.BILINEAR)(picture)))
    assert np.abs(Encoded(raw, (side, side), "centre")[0].astype(int) - expected).max() <= 1
    expected = np.asarray(Resize((side, side + 3), InterpolationMode.BILINEAR)(picture))
    assert np.array_equal(Encoded(raw, (side, side + 3), "stretch")[0], expected)


def test_centre_of_any_rectangle():
    """Broken if a size that is not square is covered by the wrong side, so that the margin shows or too much is cut."""
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[:, 40:80] = 255  # the middle third
    wide = Encoded([encoded(picture)], (10, 40), "centre")[0]  # covered by its width: 20x40, rows 5..15
    assert (wide[:, 15:25] == 255).all()
    assert not wide[:, :12].any()
    assert not wide[:, 28:].any()
    tall = Encoded([encoded(picture)], (30, 10), "centre")[0]  # covered by its height: 30x60, columns 25..35 of 20..40
    assert (tall == 255).all()


def test_long_strip_takes_little_memory():
    """Broken if a strip of one row is scaled as a whole: 2.6 GB for this one."""
    strip = np.zeros((1, 10_000, 3), np.uint8)
    strip[:, 5000:] = 255
    before = time.process_time()  # stands for the memory: computing all those pixels takes seconds
    middle = Encoded([encoded(strip)], (256, 256), "centre")[0]
    assert time.process_time() - before < 0.5
    assert (middle[:, 0] < 128).all()
    assert (middle[:, -1] > 127).all()


class Rows:
    """Lazy bytes: made when asked for, as from an archive."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < self.n:
            raise IndexError(i)
        self.asked.append(i)
        return encoded(np.roll(NOISE, i, 1), "BMP")


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    """70 files of many sizes and formats."""
    kinds = [("PNG", {}), ("JPEG", {}), ("BMP", {}), ("WEBP", {})]
    paths = [tmp_path / f"{i:03d}.img" for i in range(70)]
    for i, path in enumerate(paths):
        picture = RNG.integers(0, 256, (8 + i, 90 - i, 3), dtype=np.uint8)
        path.write_bytes(encoded(picture, kinds[i % 4][0]))
    return paths


@pytest.mark.parametrize("fit", ["stretch", "centre"])
def test_threads_do_not_change_the_result(folder, fit):
    """Broken if an image lands in another's place, is left out at the end of a chunk, or differs from a lone one."""
    e = Encoded(folder, (16, 20), fit)
    alone = np.stack([e[i] for i in range(len(e))])
    for threads in (1, 2, 5, 100, None):
        assert np.array_equal(filled(e, threads), alone)


def test_into_a_memory_map(folder, tmp_path):
    """Broken if a cache on disk does not get what memory gets."""
    e = Encoded(folder[:20], (9, 11))
    out = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(20, 9, 11, 3))
    e.decode_into(out)
    out.flush()
    assert np.array_equal(np.load(tmp_path / "x.npy"), filled(e, 1))


def test_in_parts(folder):
    """Broken if a part gets other images than its own, or reaches beyond the last one."""
    e = Encoded(folder, (9, 11))
    whole = filled(e)
    out = np.zeros((40, 9, 11, 3), np.uint8)
    e.decode_into(out, 30)
    assert np.array_equal(out, whole[30:])
    for start in (31, -1):
        with pytest.raises(ValueError, match=f"^from {start} of 70"):
            e.decode_into(out, start)
    rows = [path.read_bytes() for path in folder]
    rows[34] = b""
    with pytest.raises(UserError, match="row 34 is empty"):
        Encoded(rows, (9, 11)).decode_into(out, 30)


def test_nothing_to_decode():
    """Broken if an empty list is an error or hangs."""
    assert filled(Encoded([], (4, 4))).shape == (0, 4, 4, 3)


def test_wrong_arrays_and_settings():
    """Broken if a wrong array is filled in part, or a misspelt fit falls back to another."""
    e = Encoded([encoded(NOISE)], (4, 5))
    for out in (np.zeros((1, 5, 4, 3), np.uint8), np.zeros((2, 4, 5, 3), np.uint8), np.zeros((1, 4, 5, 3), np.float32)):
        with pytest.raises(ValueError, match="not uint8"):
            e.decode_into(out)
    for options in ({"fit": "center"}, {"size": (0, 4)}):
        with pytest.raises(ValueError, match="'stretch' or 'centre'"):
            Encoded(**{"sources": [], "size": (4, 4), **options})


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_first_bad_image_is_reported(threads):
    """Broken if the error depends on which thread was faster: the earliest bad image here takes the longest to fail."""
    good = encoded(NOISE)
    slow = encoded(RNG.integers(0, 256, (700, 700, 3), dtype=np.uint8))
    sources = [good] * 200
    sources[30], sources[31], sources[33], sources[199] = slow[:-200], b"", b"x", b"y"
    with pytest.raises(UserError, match=r"^train\.parquet, row 30 is damaged"):
        filled(Encoded(sources, (8, 8), where="train.parquet"), threads)


def test_errors_name_file_or_row(tmp_path):
    """Broken if a user cannot find the bad image."""
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.jpg is not an image"):
        _ = Encoded([path], (4, 4), where="ignored for paths")[0]
    with pytest.raises(UserError, match=r"^image data, row 1 is empty"):
        _ = Encoded([encoded(NOISE), b""], (4, 4))[1]


def test_lazy_sources_are_asked_once_by_one_at_a_time():
    """Broken if a row is made twice or by two threads at once, which a reader with a buffer would not stand."""
    busy = threading.Lock()

    class Alone(Rows):
        def __getitem__(self, i: int) -> bytes:
            assert busy.acquire(blocking=False), "asked by two threads at once"
            try:
                time.sleep(0.0005)
                return super().__getitem__(i)
            finally:
                busy.release()

    rows = Alone(100)
    out = filled(Encoded(rows, (24, 30)), 4)  # pyright: ignore[reportArgumentType]
    assert sorted(rows.asked) == list(range(100))
    assert all(np.array_equal(image, np.roll(NOISE, i, 1)) for i, image in enumerate(out))


def test_few_files_are_in_memory_at_once():
    """Broken if all encoded images are read before the first is decoded."""
    alive, most = 0, 0

    class Counted(bytes):
        def __new__(cls, content):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, content)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class Source(Rows):
        def __getitem__(self, i: int) -> bytes:
            return Counted(super().__getitem__(i))

    filled(Encoded(Source(300), (8, 8)), 3)  # pyright: ignore[reportArgumentType]
    assert 1 <= most <= 2 * 3 + 1


def test_no_image_is_resampled_without_need():
    """Broken if an image that has the size is scaled anyway, or handed out read-only."""
    for fit in ("stretch", "centre"):
        image = Encoded([encoded(NOISE)], (24, 30), fit)[0]
        assert np.array_equal(image, NOISE)
        image[:] = 0  # the caller's own
    assert NOISE.any()


def test_pickled_for_workers(folder):
    """Broken if a DataLoader's worker processes cannot be given the images, from files or from lazy bytes."""
    for e in (Encoded(folder, (6, 7), "centre"), Encoded(Rows(12), (6, 7), where="x")):  # pyright: ignore[reportArgumentType]
        copy = pickle.loads(pickle.dumps(e))
        assert (copy.size, copy.fit, copy.where, len(copy)) == (e.size, e.fit, e.where, len(e))
        assert np.array_equal(filled(copy), filled(e))
    e = Encoded(folder[:6], (6, 7))
    batches = list(DataLoader(e, batch_size=3, num_workers=2))  # pyright: ignore[reportArgumentType]
    assert np.array_equal(np.concatenate([b.numpy() for b in batches]), filled(e))


@pytest.fixture
def endless(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process that decodes for hours, as soon as it has said so."""
    program = """
        import io, time
        import numpy as np
        from PIL import Image
        from qatbench.bench.images import Encoded
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, "PNG")
        class Slow:
            def __len__(self): return 50_000
            def __getitem__(self, i):
                print("running", flush=True)
                time.sleep(0.5)
                return file.getvalue()
        Encoded(Slow(), (2, 2)).decode_into(np.zeros((50_000, 2, 2, 3), np.uint8), threads=2)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        yield process
        process.kill()


def test_interrupt_stops_at_once(endless):
    """Broken if Ctrl-C waits until all images, or those that a thread has taken on, are decoded."""
    assert endless.stdout.readline() == "running\n", endless.stderr.read()
    start = time.perf_counter()
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=60)
    assert time.perf_counter() - start < 8  # a thread's 32 images: 16 s and more
    assert "KeyboardInterrupt" in errors
    assert endless.returncode != 0
