"""Encoded images (files, or bytes out of an archive) -> uint8 arrays of one size, with Pillow alone."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import UserError

# Tried in this order. Not all that Pillow knows: it would, for one, start Ghostscript for a PostScript file named .jpg.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
_FETCH = "fetch the file again, or remove it"
_CHUNK = 32  # images that a thread takes at a time: tiny ones should not cost a hand-over each


_SIGNATURES = {  # of formats that are read and of some that are not
    "JPEG": r"\xff\xd8\xff",
    "PNG": r"\x89PNG\r\n\x1a\n",
    "GIF": r"GIF8[79]a",
    "WebP": r"RIFF....WEBP",
    "BMP": r"BM....\0\0\0\0....[\x0c-\x80]\0\0\0",
    "TIFF": r"II\*\0|MM\0\*",
    "PNM": r"P[1-6]\s+(#|\d+\s+\d+\s)",
    "BigTIFF": r"II\+\0|MM\0\+",
    "HEIF": r"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    "AVIF": r"....ftypavi[fs]",
    "JPEG 2000": r"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "JPEG XL": r"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "Photoshop": r"8BPS\0[\x01\x02]",
    "OpenEXR": r"v/1\x01",
    "DICOM": r".{128}DICM",
}
_KINDS = {kind: re.compile(pattern.encode("latin-1"), re.DOTALL) for kind, pattern in _SIGNATURES.items()}


def kind_of(path: Path) -> str | None:
    """The format of an image, by the first bytes of a file; None if it is no image, or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return None
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(head)), None)


def decode(source: Path | bytes, name: str = "") -> Image.Image:
    """One image as RGB, 8 bits a channel.

    Grey gets three equal channels and a palette its colours. Transparency is ignored (the stored colour counts, whatever
    its alpha), CMYK is converted without a colour profile. Grey of 9 to 16 bits keeps its upper 8, as Pillow does with
    colour of 16 bits; a TIFF that counts from white is turned round. EXIF orientation is not applied, like torchvision's
    ``ImageFolder``.

    Args:
        source: the file, or its content.
        name: what it is called in an error; default: its path.

    Raises:
        UserError: missing, unreadable, empty, not an image, damaged, cut short, animated, a single pixel, far too many
            pixels, or values that 8 bits cannot hold.
    """
    raw = source if isinstance(source, bytes) else _read(source)
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    if not raw:
        raise UserError(f"{name} is empty; {_FETCH}")
    with _STRICT:
        try:
            return _rgb(raw, name)
        except (UserError, MemoryError):
            raise
        except UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise UserError(f"{name} is not an image ({known}), or its first bytes are damaged; {_FETCH}") from None
        except Image.DecompressionBombError as error:
            raise UserError(f"{name} is too large an image ({_line(error)}); make it smaller, or remove it") from None
        except Exception as error:  # what Pillow raises for damaged bytes is not limited to a few types
            raise UserError(f"{name} is damaged, cut short or not supported ({_line(error)}); {_FETCH}") from None


def _rgb(raw: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.size == (1, 1):
        raise UserError(f"{name} is a single pixel, a placeholder rather than an image; {_FETCH}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's MPO is a JPEG with further views of the same after it
        raise UserError(f"{name} has {frames} frames; save one of them as an image, or remove it")
    if image.format == "PNG":
        image.verify()  # the checksums, which decoding skips
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image, name)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits, which ``convert`` would clip at 255 instead of scaling."""
    values, bits = np.asarray(image), _grey_bits(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**bits:
        raise UserError(f"{name} has float or 32-bit pixels; save it with 8 or 16 bits a channel, or remove it")
    values = (values >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - values if _white_is_zero(image) else values).convert("RGB")


def _grey_bits(image: Image.Image) -> int:
    """Bits of a pixel of deep grey: a TIFF may say fewer than 16."""
    tags = getattr(image, "tag_v2", {})
    said = tags.get(258, (16,))  # BitsPerSample
    bits = int(said[0] if isinstance(said, tuple) else said)
    return bits if 8 < bits < 16 else 16


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts from white (PhotometricInterpretation 0), which Pillow heeds up to 8 bits alone."""
    return getattr(image, "tag_v2", {}).get(262) == 0


DARK = 4096  # grey of 16 bits that stays below has 16 levels after decoding


def refuse_dark(images: Sequence[Encoded], title: str) -> None:
    """Refuse a data set of grey images of 16 bits whose values are those of 12, as cameras and scanners write them.

    Some are looked at, and all only if those are dark.

    Args:
        images: Of each domain.
        title: What the data set is called.

    Raises:
        UserError: No value reaches `DARK`.
    """
    brightest = 0
    for some in (True, False):
        deep = [value for part in images for value in part.brightest(64 if some else len(part))]
        brightest = max(deep, default=DARK)
        if brightest >= DARK:
            return
    raise UserError(
        f"the grey images of 16 bits in {title!r} have no value above {brightest:,} of 65,535, as if they had 12: they would be "
        "read as nearly black; multiply them by 16, or save them with 8 bits"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the file there, or remove it from the list that names it") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not an image file: remove or rename it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check permissions and links") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


class _Strict:
    """While at least one thread is inside, Pillow warns of nothing and takes no truncated file.

    Both settings belong to the process, not to the thread: the first one in makes them, the last one out puts them back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.truncated = ImageFile.LOAD_TRUNCATED_IMAGES
                self.warnings = warnings.catch_warnings()
                self.warnings.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                ImageFile.LOAD_TRUNCATED_IMAGES = False

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.truncated
                self.warnings.__exit__(None, None, None)


_STRICT = _Strict()


@dataclass(frozen=True)
class Encoded:
    """Images that are still files (or bytes): decoded once when prepared or, if too many for that, when they are needed.

    Resampling is Pillow's antialiased bilinear, as in torchvision's ``Resize`` of a Pillow image; an image that already
    has the size is left as it is. For a square ``centre`` is torchvision's ``Resize(side)`` and ``CenterCrop(side)``, up to
    one level of the 255: only the pixels of the crop are computed.

    Attributes:
        sources: paths or bytes: anything with ``len`` and ``[int]``. May be lazy; is asked by one thread at a time.
        size: (height, width) that the images are brought to.
        fit: ``stretch`` to the size, or ``centre``: cover it, keeping the proportions, and cut out its centre.
        where: names bytes in an error: ``train-0.parquet`` -> ``train-0.parquet, row 17`` (the first row is 0).
    """

    sources: Sequence[Path] | Sequence[bytes]
    size: tuple[int, int]
    fit: Literal["stretch", "centre"] = "stretch"
    where: str = ""

    def __post_init__(self) -> None:
        if self.fit not in ("stretch", "centre") or min(self.size) < 1:
            raise ValueError(f"fit {self.fit!r}, size {self.size}: expected 'stretch' or 'centre', and at least 1x1")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(images, 3, height, width), as of the tensor that they become."""
        return (len(self), 3, *self.size)

    @property
    def nbytes(self) -> int:
        """Bytes that all images take once decoded."""
        return len(self) * 3 * self.size[0] * self.size[1]

    def __getitem__(self, i: int) -> np.ndarray:
        """Image ``i``: uint8 [H, W, 3], the caller's own."""
        return self._array(self.sources[i], i)

    def decode_into(self, out: np.ndarray, start: int = 0, threads: int | None = None) -> None:
        """Decode as many images as fit into ``out``; the result does not depend on ``threads``.

        Args:
            out: uint8 [n, H, W, 3], in memory or a memory map.
            start: the image that goes into ``out[0]``.
            threads: default: one for each CPU, but not more than 8.

        Raises:
            UserError: about the first image (in the order of ``sources``) that cannot be decoded.
        """
        n = len(out)
        if out.dtype != np.uint8 or out.shape != (n, *self.size, 3) or not 0 <= start <= len(self) - n:
            raise ValueError(
                f"from {start} of {len(self)}: out is {out.dtype} {out.shape}, not uint8 [n, {self.size}, 3]"
            )
        if threads is None:
            threads = min(os.cpu_count() or 1, 8)
        reading, stop = threading.Lock(), threading.Event()

        def work(first: int) -> None:
            for i in range(first, min(first + _CHUNK, n)):
                if stop.is_set():
                    return
                with reading:
                    source = self.sources[start + i]
                out[i] = self._array(source, start + i)

        with _STRICT, ThreadPoolExecutor(threads) as pool:
            try:
                for _ in pool.map(work, range(0, n, _CHUNK)):  # in order: it is the first bad image that is reported
                    pass
            except BaseException:  # Ctrl-C, too: leaving the pool waits for what runs, so let that end now
                stop.set()
                raise

    def brightest(self, most: int) -> Iterator[int]:
        """The largest value of each grey image of 16 bits, among so many images at equal distances."""
        with _STRICT:
            for i in np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)).tolist():
                source = self.sources[i]
                with (
                    suppress(Exception),
                    Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image,
                ):  # what is wrong with it is told when it is decoded
                    if image.mode.startswith("I") and _grey_bits(image) == 16:
                        values = np.asarray(image)
                        yield int(0xFFFF - values.min() if _white_is_zero(image) else values.max())

    def called(self, i: int) -> str:
        """What bytes are called in an error."""
        return f"{self.where or 'image data'}, row {i}"

    def _array(self, source: Path | bytes, i: int) -> np.ndarray:
        image = decode(source, self.called(i) if isinstance(source, bytes) else "")
        height, width = self.size
        box = _centre(image.size, self.size) if self.fit == "centre" else None
        # Where nothing is to be scaled, Pillow copies the pixels.
        return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _centre(image: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an image of (width, height) that ``size`` shows, with torchvision's roundings.

    It is scaled alone. To scale the whole until it covers, and then to crop, could take gigabytes for a long strip.
    """
    (w, h), (height, width) = image, size
    wide = width * h >= height * w  # then its width just covers, else its height
    covering = (width, width * h // w) if wide else (height * w // h, height)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    x, y = w / covering[0], h / covering[1]
    return left * x, top * y, min((left + width) * x, w), min((top + height) * y, h)
