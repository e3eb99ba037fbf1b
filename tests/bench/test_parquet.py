"""Parquet files by the names that the hub gives them, and rows by the file that holds them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qatbench.bench.errors import UserError
from qatbench.bench.parquet import Rows, find_splits, locate, read_table


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_every_row_is_in_one_file(sizes):
    """Broken if an error names the wrong file or row; files may be empty."""
    files = [(f"f{i}", n) for i, n in enumerate(sizes)]
    expected = [(f"f{i}", row) for i, n in enumerate(sizes) for row in range(n)]
    assert [locate(files, row) for row in range(sum(sizes))] == expected


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("data/train-00000-of-00001.parquet", "", "train"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "", "train"),
        ("plain_text/test-00000-of-00001.parquet", "plain_text", "test"),
        ("test.parquet", "", "test"),
        ("big/validation/0000.parquet", "big", "validation"),
        ("database/train-blurred-00000-of-00001.parquet", "database", "train-blurred"),
    ],
)
def test_names_of_the_hub(tmp_path, name, config, split):
    """Broken if a test part trains because its name is read in another way."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_splits(tmp_path) == {(config, split): [path]}


def test_lost_shard_is_named(tmp_path):
    """Broken if a set that was fetched in part is taken for whole."""
    for part in (0, 2):
        (tmp_path / f"train-{part:05d}-of-00003.parquet").touch()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is missing"):
        find_splits(tmp_path)


def test_rows_across_files_and_row_groups(tmp_path):
    """Broken if image 7 is another image when files or their row groups have other lengths."""
    values, paths = [b"%d" % i for i in range(20)], []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        paths.append(tmp_path / f"{start}.parquet")
        pq.write_table(pa.table({"image": values[start:stop]}), paths[-1], row_group_size=3)
    table = read_table(paths, ["image"])
    rows = Rows(table, "image", [("a", 7), ("b", 1), ("c", 12)])
    assert [rows[i] for i in range(len(rows))] == values
    assert rows.place(8) == ("c", 0)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
def test_something_else_is_told(tmp_path, content):
    """Broken if a page of HTML that was saved as a Parquet file gives a traceback."""
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet is not a whole Parquet file"):
        read_table([path], ["image"])
