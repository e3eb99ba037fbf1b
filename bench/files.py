"""File formats that several data sets come in, read with errors of one line: IDX (MNIST's), MAT (SVHN's), gz and bz2."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Container
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import UserError

FETCH = "fetch the file again"  # the end of most lines about damaged files
_CHUNK = 2**20  # bytes that are read and unpacked at a time


def open_file(path: Path) -> BinaryIO:
    """The file, open for reading.

    Raises:
        UserError: It is missing, a directory, or may not be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the file there or leave its domain out of `domains`") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a file; {FETCH}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check permissions and links") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; errors as of `open_file`."""
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:  # a disk or a network that fails
            raise UserError(f"cannot read {path}: {error.strerror}; {FETCH}") from None


def unpack(path: Path, decompress: Callable[[bytes], bytes], packed: bytes) -> bytes:
    """`decompress(packed)`, where `packed` is the content of `path`.

    Raises:
        UserError: It is damaged or ends too soon.
    """
    try:
        return decompress(packed)
    except (EOFError, ValueError):  # bz2 says ValueError for a stream that ends too soon
        raise UserError(f"{path} is truncated; {FETCH}") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {FETCH}") from None


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A uint8 array in MNIST's own format: two zero bytes, type 8 (uint8), the number of axes, the sizes, the values.

    Args:
        path: The file, compressed if its name ends in ``.gz``.
        axes: 3 for images [N, H, W], 1 for labels [N].

    Raises:
        UserError: The file is missing, damaged, or not such an array.
    """
    raw = read_bytes(path)
    if path.suffix == ".gz":
        raw = unpack(path, gzip.decompress, raw)
    head = 4 + 4 * axes
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, axes]):
        raise UserError(f"{path} is not an IDX file of {axes} axes (wrong magic number); {FETCH}")
    shape = struct.unpack(f">{axes}I", raw[4:head])
    if len(raw) - head != np.prod(shape, dtype=object):
        raise UserError(f"{path} holds {len(raw) - head} bytes but announces {'x'.join(map(str, shape))}; {FETCH}")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def read_idx_pair(images: Path, labels: Path, size: tuple[int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images of one size and their labels, from two IDX files.

    Returns:
        uint8 [N, *size] and int64 [N], labels 0..classes - 1.

    Raises:
        UserError: A file is missing or damaged, or the two do not fit together.
    """
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if x.shape[1:] != size or not len(x):
        wanted = "x".join(map(str, size))
        raise UserError(f"{images} holds {'x'.join(map(str, x.shape))} values, not images of {wanted}; {FETCH}")
    if len(x) != len(y):
        raise UserError(f"{labels} has {len(y)} labels for {len(x)} images; {FETCH}")
    return x, check_labels(y, classes, labels)


def read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in SVHN's layout: a MAT file (version 5 to 7) of `X` [H, W, 3, N] and `y` [N, 1].

    Not with scipy, which ends the process on some damaged files and would hold the packed images in memory as well.

    Returns:
        uint8 [N, H, W, 3], a view that is not contiguous; and int64 [N], labels as they are in the file.

    Raises:
        UserError: The file is missing, damaged, or not in this layout.
    """
    with open_file(path) as file:
        try:
            mat = _mat_arrays(file, ("X", "y"))
        except MemoryError:
            raise UserError(f"{path} holds more than fits into memory, or is damaged; {FETCH}") from None
        except (OSError, ValueError, zlib.error) as error:
            raise UserError(f"{path} is not a whole MAT file of version 5 to 7 ({one_line(error)}); {FETCH}") from None
    x, y = mat.get("X"), mat.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[2] != 3 or not x.size:
        raise UserError(f"{path} has no array 'X' of height x width x 3 x images, uint8; {FETCH}")
    if y is None:
        raise UserError(f"{path} has no array 'y' of labels; {FETCH}")
    if y.size != x.shape[3]:
        raise UserError(f"{path} has {y.size} labels for {x.shape[3]} images; {FETCH}")
    return x.transpose(3, 0, 1, 2), _whole(y.ravel(), path)


def check_labels(labels: np.ndarray, classes: int, path: Path, first: int = 0) -> np.ndarray:
    """The labels as int64, which are first..first + classes - 1.

    Raises:
        UserError: One is not; it names `path`, the file that they come from.
    """
    labels = _whole(labels, path)
    wrong = labels[(labels < first) | (labels >= first + classes)]
    if len(wrong):
        raise UserError(f"{path} holds label {wrong[0]}, but labels are {first}..{first + classes - 1}; {FETCH}")
    return labels


def one_line(error: Exception) -> str:
    """What an exception says, cut to fit into a line of ours."""
    return " ".join(str(error).split())[:100]


def _whole(labels: np.ndarray, path: Path) -> np.ndarray:
    wrong = labels[~(np.abs(labels) < 2**31) | (labels != np.floor(labels))] if labels.dtype.kind == "f" else labels[:0]
    if len(wrong):
        raise UserError(f"{path} holds label {wrong[0]:g}, which is no whole number; {FETCH}")
    return labels.astype(np.int64)


# MAT files of version 5: elements of a type, a size and data; an array is an element made of elements, mostly compressed.

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC = range(6, 16)  # classes of arrays: not cells, structures, objects, text and sparse ones
_Read = Callable[[int], bytes | bytearray]  # up to so many bytes, fewer only at the end


def _mat_arrays(file: BinaryIO, names: Container[str]) -> dict[str, np.ndarray]:
    """The arrays of numbers that have one of these names; ValueError or zlib.error if the file is damaged."""
    header = _exactly(file.read, 128)
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(bytes(header[124:]))
    if order is None:
        raise ValueError("MATLAB 7.3: save it as 7" if header.startswith(b"MATLAB 7.3") else "wrong header")
    arrays = {}
    while tag := file.read(8):
        kind, size = struct.unpack(f"{order}II", tag.ljust(8, b"\0"))
        start = file.tell()
        if kind == _COMPRESSED:
            inner = _Inflated(file, size)
            (kind, _), read = struct.unpack(f"{order}II", _exactly(inner.read, 8)), inner.read
        else:
            inner, read = None, file.read
        if kind == _MATRIX:
            name, array = _mat_array(read, order, names)
            if array is not None:
                arrays[name] = array
                if inner is not None:
                    inner.finish()
        file.seek(start + size)
    return arrays


def _mat_array(read: _Read, order: str, names: Container[str]) -> tuple[str, np.ndarray | None]:
    """The name of an array and its values, in the axes that MATLAB shows; None if it is not wanted or holds no numbers."""
    flags = _mat_element(read, order)[1]
    if len(flags) != 8:
        raise ValueError("an array without flags")
    (word,) = struct.unpack(f"{order}I", flags[:4])
    shape = np.frombuffer(_mat_element(read, order)[1], f"{order}i4").tolist()
    name = bytes(_mat_element(read, order)[1]).decode("ascii", "replace")
    is_complex = bool(word & 0x800)
    if name not in names or word & 0xFF not in _NUMERIC or is_complex:
        return name, None
    kind, values = _mat_element(read, order)
    if kind not in _NUMBERS or min(shape, default=0) < 0:
        raise ValueError(f"array {name!r} is of unknown type or shape")
    return name, np.frombuffer(values, order + _NUMBERS[kind]).reshape(shape, order="F")


def _mat_element(read: _Read, order: str) -> tuple[int, bytes | bytearray]:
    """Type and data of an element of an array."""
    tag = _exactly(read, 8)
    kind, size = struct.unpack(f"{order}II", tag)
    if kind >> 16:  # up to four bytes of data are inside of the tag, and their number is in the type's upper half
        return kind & 0xFFFF, tag[4 : 4 + min(kind >> 16, 4)]
    data = _exactly(read, size)
    read(-size % 8)  # to the next multiple of eight
    return kind, data


def _exactly(read: _Read, n: int) -> bytes | bytearray:
    data = read(n)
    if len(data) != n:
        raise ValueError("truncated")
    return data


class _Inflated:
    """What a zlib stream of `size` bytes in a file holds."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.zlib = file, size, zlib.decompressobj()

    def read(self, n: int) -> bytearray:
        """The next `n` bytes, fewer only at the end."""
        data = bytearray()
        while len(data) < n and not self.zlib.eof:
            packed = self.zlib.unconsumed_tail
            if not packed:
                packed = self.file.read(min(self.left, _CHUNK))
                self.left -= len(packed)
            piece = self.zlib.decompress(packed, min(n - len(data), _CHUNK))
            if not packed and not piece:
                break
            data += piece
        return data

    def finish(self) -> None:
        """Read to the end, where the checksum is."""
        while self.read(_CHUNK):
            pass
        if not self.zlib.eof:
            raise ValueError("truncated")
