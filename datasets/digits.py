"""Digits of four kinds from the data root: MNIST, USPS, MNIST-M and Chars74K's computer fonts, all as 3x28x28."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from ..bench.data import DataSet, Domain
from ..bench.errors import UserError

SIZE = 28
_FOLDERS = {"mnist": "MNIST/raw", "usps": "USPS", "mnist_m": "mnist_m", "chars74k": "chars74k_digits/English/Fnt"}
_FONTS = 1_000_000  # groups of Chars74K's fonts start here, beyond the numbers of MNIST's digits


class Digits(DataSet):
    """MNIST, USPS, MNIST-M and Chars74K fonts.

    MNIST-M's digits are MNIST's, so both are split alike. Chars74K has no official split: a font, in all its styles, is
    in one part only.
    """

    name = "digits"
    domains = ("mnist", "usps", "mnist_m", "chars74k")
    classes = tuple("0123456789")
    image = (3, SIZE, SIZE)
    augment = "shift"
    source = "MNIST/raw/*.gz, USPS/*.bz2, mnist_m/, chars74k_digits/English/Fnt/ under the data root"
    licence = "MNIST: CC BY-SA 3.0; USPS, MNIST-M: none stated; Chars74K: research use"
    citation = (
        "LeCun et al. 1998 (MNIST); Hull 1994 (USPS); Ganin et al. 2016 (MNIST-M); de Campos et al. 2009 (Chars74K)"
    )
    generated: ClassVar[Mapping[str, str]] = {
        "mnist_m": "MNIST digits, |texture - digit| over crops of photographs (Ganin et al. 2016)",
        "chars74k": "digits rendered from computer fonts (de Campos et al. 2009)",
    }
    sha256: ClassVar[Mapping[str, str]] = {  # of MNIST's official files; of the other domains copies differ
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }

    def fingerprint(self) -> str:
        """Names, sizes and times of the files."""
        digest = hashlib.sha256()
        for name in self.selected:
            for path, stat in _walk(self._folder(name)):
                digest.update(f"{path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def load(self) -> list[Domain]:
        """Read the domains asked for."""
        read = {"mnist": self._mnist, "usps": _usps, "mnist_m": _mnist_m, "chars74k": _chars74k}
        return [read[name](self._folder(name)) for name in self.selected]

    def _folder(self, domain: str) -> Path:
        if self.root is None:
            raise UserError("data set 'digits' is read from files: give --data-root DIR or set QATBENCH_DATA")
        mend = "give --data-root DIR or set QATBENCH_DATA to the folder that holds MNIST/, USPS/, mnist_m/ and chars74k_digits/"
        if not self.root.is_dir():
            what = "is not a directory" if self.root.exists() else "does not exist"
            raise UserError(f"data root {self.root} {what}; {mend}")
        folder = self.root / _FOLDERS[domain]
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "is missing"
            raise UserError(f"{folder} {what}: put the files of {domain!r} there or leave it out of `domains`")
        return folder

    def _mnist(self, folder: Path) -> Domain:
        parts = []
        for kind in ("train", "t10k"):
            images = self._idx(folder / f"{kind}-images-idx3-ubyte.gz", 3)
            path = folder / f"{kind}-labels-idx1-ubyte.gz"
            labels = self._idx(path, 1)
            if len(images) != len(labels):
                raise UserError(f"{path} has {len(labels)} labels for {len(images)} images; {_FETCH}")
            parts.append((_fit(images), _labels(labels.astype(np.int64), path)))
        return _join("mnist", parts, group=torch.arange(sum(len(labels) for _, labels in parts)))

    def _idx(self, path: Path, axes: int) -> np.ndarray:
        """An array from MNIST's own format: two zero bytes, type 8 (uint8), the number of axes, the sizes, the bytes."""
        packed = _bytes(path)
        raw = _unpack(path, gzip.decompress, packed)
        head = 4 + 4 * axes
        if len(raw) < head or raw[:4] != bytes([0, 0, 8, axes]):
            raise UserError(f"{path} is not an IDX file of {axes} axes (wrong magic number); {_FETCH}")
        shape = struct.unpack(f">{axes}I", raw[4:head])
        if len(raw) - head != np.prod(shape, dtype=object):
            raise UserError(f"{path} holds {len(raw) - head} bytes but announces {'x'.join(map(str, shape))}; {_FETCH}")
        expected = self.sha256.get(path.name)
        if expected and hashlib.sha256(packed).hexdigest() != expected:
            raise UserError(f"{path} is not the official file (wrong sha256, expected {expected[:12]}...); {_FETCH}")
        return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


_FETCH = "fetch the file again"


def _usps(folder: Path) -> Domain:
    """LIBSVM text: a label 1..10, then 256 values -1..1 as index:value."""
    from sklearn.datasets import load_svmlight_file

    parts = []
    for name in ("usps.bz2", "usps.t.bz2"):
        path = folder / name
        text = _unpack(path, bz2.decompress, _bytes(path))
        try:
            values, labels = load_svmlight_file(io.BytesIO(text), n_features=256, zero_based=False)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UserError(f"{path} is not LIBSVM text of 256 values a line ({_line(error)}); {_FETCH}") from None
        values = values.toarray()
        if not (np.abs(values) <= 1).all() or not len(values):
            raise UserError(f"{path} holds no values, or values beyond -1..1; {_FETCH}")
        pixels = np.round((values + 1) * 127.5).astype(np.uint8).reshape(-1, 16, 16)
        parts.append((_fit(pixels), _labels(labels - 1, path)))
    return _join("usps", parts)


def _mnist_m(folder: Path) -> Domain:
    """PNG files named after the MNIST digit that they show, and a list of names and labels for each part."""
    parts, groups = [], []
    for kind, start in (("train", 0), ("test", 60_000)):
        path = folder / f"mnist_m_{kind}_labels.txt"
        names, labels = _label_list(path)
        images = [_png(folder / f"mnist_m_{kind}" / name) for name in names]
        parts.append((np.stack(images), _labels(labels, path)))
        groups += [start + int(Path(name).stem) for name in names]
    return _join("mnist_m", parts, group=torch.tensor(groups))


def _label_list(path: Path) -> tuple[list[str], np.ndarray]:
    names, labels = [], []
    for number, line in enumerate(_bytes(path).decode("ascii", "replace").splitlines(), 1):
        name, _, label = line.strip().partition(" ")
        if not (Path(name).stem.isdigit() and label.isdigit()):
            raise UserError(f"{path}, line {number}: expected 'NUMBER.png LABEL', found {line[:40]!r}; {_FETCH}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise UserError(f"{path} is empty; {_FETCH}")
    return names, np.asarray(labels)


def _chars74k(folder: Path) -> Domain:
    """Folder Sample00N holds digit N-1: fonts in order, each in four styles."""
    images, labels, groups = [], [], []
    for digit in range(10):
        sample = folder / f"Sample{digit + 1:03d}"
        files = sorted(sample.glob("*.png")) if sample.is_dir() else []
        if not files:
            raise UserError(f"{sample} has no PNG files: put Chars74K's there or leave 'chars74k' out of `domains`")
        for path in files:
            number = path.stem.partition("-")[2]
            if not number.isdigit():
                raise UserError(f"{path} is not named imgCCC-NNNNN.png as in Chars74K; remove it")
            groups.append(_FONTS + (int(number) - 1) // 4)
            images.append(_png(path))
            labels.append(digit)
    return Domain("chars74k", _tensor(np.stack(images)), torch.tensor(labels), group=torch.tensor(groups))


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    try:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir():
                yield from ((f"{entry.name}/{path}", stat) for path, stat in _walk(Path(entry.path)))
            else:
                yield entry.name, entry.stat()
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder}: {error.strerror}; check permissions and links"
        ) from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the file there or leave its domain out of `domains`") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a file; {_FETCH}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check permissions and links") from None


def _unpack(path: Path, decompress, packed: bytes) -> bytes:
    try:
        return decompress(packed)
    except (EOFError, ValueError):  # bz2 says ValueError for a stream that ends too soon
        raise UserError(f"{path} is truncated; {_FETCH}") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({_line(error)}); {_FETCH}") from None


def _png(path: Path) -> np.ndarray:
    """One image as uint8 [28, 28, 3]."""
    raw = _bytes(path)
    try:
        Image.open(
            io.BytesIO(raw), formats=["PNG"]
        ).verify()  # checksums and the end, which decoding alone does not miss
        image = Image.open(io.BytesIO(raw), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError, ValueError, zlib.error, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a whole PNG image ({_line(error)}); {_FETCH}") from None
    return np.asarray(_resized(image))


def _resized(image: Image.Image) -> Image.Image:
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _fit(grey: np.ndarray) -> np.ndarray:
    """Grey images of any size as uint8 [N, 28, 28, 3]; the three channels share memory."""
    if grey.shape[1:] != (SIZE, SIZE):
        grey = np.stack([np.asarray(_resized(Image.fromarray(x))) for x in grey])
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def _labels(labels: np.ndarray, path: Path) -> np.ndarray:
    wrong = labels[(labels < 0) | (labels > 9) | (labels != np.floor(labels))]
    if len(wrong):
        raise UserError(f"{path} holds a label that is no digit ({wrong[0]}); {_FETCH}")
    return labels.astype(np.int64)


def _join(name: str, parts: list[tuple[np.ndarray, np.ndarray]], group: torch.Tensor | None = None) -> Domain:
    """The training part and, after it, the official test part."""
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test = torch.arange(len(parts[0][1]), len(labels))
    return Domain(name, _tensor(images), torch.from_numpy(labels), test, group)


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
