"""Readers of file formats: what is right is read to the bit, what is wrong is one line."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.files import check_labels, read_bytes, read_idx, read_idx_pair, read_mat
from scipy.io import savemat


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def one_line(error: pytest.ExceptionInfo[UserError], path: Path) -> None:
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(5, 3, 4), (7,), (0, 28, 28)])
@pytest.mark.parametrize("ending", [".gz", ""])
def test_idx_is_read_back(tmp_path, shape, ending):
    """Broken if rows and columns are exchanged, or only one of the compressed and the plain file can be read."""
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / f"x-ubyte{ending}"
    path.write_bytes(gzip.compress(idx(array)) if ending else idx(array))
    assert np.array_equal(read_idx(path, array.ndim), array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "wrong magic number"),
        (b"\0\0\x09\x01\0\0\0\1x", "wrong magic number"),
        (b"\0\0\x08\x03\0\0\0\1x", "wrong magic number"),
        (b"\0\0\x08\x01\0\0\0", "wrong magic number"),
        (b"\0\0\x08\x01\0\0\0\2x", "1 bytes but announces 2"),
        (b"\0\0\x08\x01\xff\xff\xff\xffx", "announces 4294967295"),
    ],
)
def test_wrong_idx_is_one_line(tmp_path, content, says):
    """Broken if a file that is no IDX, or lies about its size, ends in a traceback or in wrong labels."""
    path = tmp_path / "y-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        read_idx(path, 1)
    one_line(error, path)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ((3, 28, 28), [0, 1], "2 labels for 3 images"),
        ((2, 28, 28), [0, 3], "holds label 3, but labels are 0..2"),
        ((2, 28, 27), [0, 1], "2x28x27 values, not images of 28x28"),
        ((0, 28, 28), [], "0x28x28"),
    ],
)
def test_images_and_labels_must_fit(tmp_path, x, y, says):
    """Broken if images get other images' labels, or a class that does not exist."""
    (tmp_path / "x").write_bytes(idx(np.zeros(x, np.uint8)))
    (tmp_path / "y").write_bytes(idx(np.array(y, np.uint8)))
    with pytest.raises(UserError, match=says):
        read_idx_pair(tmp_path / "x", tmp_path / "y", (28, 28), 3)


def digits(n: int = 4, shape: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3, n), np.uint8)


@pytest.mark.parametrize("packed", [True, False])
def test_mat_is_read_back(tmp_path, packed):
    """Broken if rows and columns are exchanged or the colours mixed: SVHN's images are the last axis."""
    x, path = digits(), tmp_path / "x.mat"
    savemat(path, {"X": x, "y": np.arange(1, 1 + x.shape[-1])[:, None].astype(np.uint8)}, do_compression=packed)
    images, labels = read_mat(path)
    assert labels.dtype == np.int64
    assert labels.tolist() == list(range(1, 1 + x.shape[-1]))
    assert images.dtype == np.uint8
    for i, image in enumerate(images):
        assert np.array_equal(image, x[:, :, :, i])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.ones((4, 1))}, "no array 'X'"),
        ({"X": digits().astype(float), "y": np.ones((4, 1))}, "no array 'X'"),
        ({"X": digits()[:, :, :1], "y": np.ones((4, 1))}, "no array 'X'"),
        ({"X": digits()[..., 0], "y": np.ones((4, 1))}, "no array 'X'"),
        ({"X": "text", "y": np.ones((4, 1))}, "no array 'X'"),
        ({"X": digits()}, "no array 'y'"),
        ({"X": digits(), "y": "1234"}, "no array 'y'"),
        ({"X": digits(), "y": np.ones((3, 1))}, "3 labels for 4 images"),
        ({"X": digits(), "y": np.full((4, 1), 0.5)}, "label 0.5, which is no whole number"),
        ({"X": digits(), "y": np.full((4, 1), np.nan)}, "label nan"),
    ],
)
def test_other_mat_files_are_one_line(tmp_path, arrays, says):
    """Broken if a MAT file of something else ends in a traceback."""
    path = tmp_path / "x.mat"
    savemat(path, arrays)
    with pytest.raises(UserError, match=says) as error:
        read_mat(path)
    one_line(error, path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_mat_file_cut_anywhere_is_one_line(tmp_path, packed):
    """Broken if a download that broke off is read as if it were whole, or ends in a traceback."""
    path = tmp_path / "x.mat"
    savemat(path, {"X": digits(8), "y": np.ones((8, 1), np.uint8)}, do_compression=packed)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            read_mat(path)
        one_line(error, path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_mat_file_is_one_line_or_an_array(tmp_path_factory, data):
    """Broken if any damage ends in a traceback."""
    path = tmp_path_factory.mktemp("mat") / "x.mat"
    savemat(path, {"X": digits(3, (2, 2)), "y": np.ones((3, 1), np.uint8)}, do_compression=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(100, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        images, labels = read_mat(path)
    except UserError as error:
        said = str(error)
    else:
        said = str(path) if len(images) == len(labels) else ""
    assert str(path) in said
    assert "\n" not in said


def test_bytes_after_the_compressed_ones_are_no_trap(tmp_path):
    """Broken if a file with rubbish behind a compressed array is read for ever."""
    path = tmp_path / "x.mat"
    savemat(path, {"X": digits(), "y": np.ones((4, 1), np.uint8)}, do_compression=True)
    whole = path.read_bytes()
    (size,) = struct.unpack("<I", whole[132:136])  # of the first array
    path.write_bytes(
        whole[:132] + struct.pack("<I", size + 9) + whole[136 : 136 + size] + b"rubbish 9" + whole[136 + size :]
    )
    assert np.array_equal(read_mat(path)[0][2], digits()[..., 2])
    path.write_bytes(path.read_bytes()[: 136 + size])
    with pytest.raises(UserError, match="no array 'y'"):
        read_mat(path)


def test_matlab_73_is_told(tmp_path):
    """Broken if a file that MATLAB saved in its newest format gives no hint of that."""
    path = tmp_path / "x.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400))
    with pytest.raises(UserError, match=r"MATLAB 7\.3: save it as 7"):
        read_mat(path)


@given(st.lists(st.integers(0, 255), max_size=20), st.integers(1, 20), st.integers(0, 3))
def test_labels_are_within_the_classes_or_told(labels, classes, first):
    """Broken if a label beyond the classes gets through, or a right one does not."""
    array = np.array(labels, np.uint8)
    if all(first <= y < first + classes for y in labels):
        checked = check_labels(array, classes, Path("y"), first)
        assert checked.dtype == np.int64
        assert checked.tolist() == labels
    else:
        with pytest.raises(UserError, match=rf"labels are {first}\.\.{first + classes - 1}"):
            check_labels(array, classes, Path("y"), first)


@pytest.mark.parametrize("label", [0.5, np.nan, np.inf, -np.inf, 1e300])
def test_labels_that_are_no_whole_numbers_are_told(label):
    """Broken if a label is rounded to a class."""
    with pytest.raises(UserError, match="no whole number"):
        check_labels(np.array([1.0, label]), 10, Path("y"))


def test_what_cannot_be_opened_is_told(tmp_path):
    """Broken if a missing file, a folder, or a link in a circle ends in a traceback."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, says in (("none", "is missing"), (".", "is a directory"), ("loop", "cannot read")):
        with pytest.raises(UserError, match=says):
            read_bytes(tmp_path / name)
