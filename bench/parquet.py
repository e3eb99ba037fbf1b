"""Parquet files of encoded images, as the Hugging Face hub keeps them: found by split, read, and named by row in errors."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .images import Encoded

if TYPE_CHECKING:  # imported where it is used: listing data sets should not wait for it
    import pyarrow as pa

_SHARD = re.compile(r"(?P<split>.+?)-(?P<part>\d{5})-of-(?P<of>\d{5})(-[0-9a-f]+)?")
_FETCH = "fetch the file again"

Splits = dict[tuple[str, str], list[Path]]
"""(configuration, split) -> its files, in order; the configuration of files in the folder itself or in ``data`` is empty."""


def find_splits(folder: Path) -> Splits:
    """The Parquet files under a folder, by the names that the hub gives them.

    ``[CONFIG/]SPLIT-00000-of-00002.parquet``, ``[CONFIG/]SPLIT.parquet``, and ``CONFIG/SPLIT/0000.parquet`` of the hub's own
    conversions. ``data`` stands for no configuration.

    Raises:
        UserError: A shard is missing.
    """
    splits: Splits = {}
    parts: dict[tuple[str, str], tuple[set[int], int]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        above = list(path.relative_to(folder).parts[:-1])
        shard = _SHARD.fullmatch(path.stem)
        if shard:
            split = shard["split"]
        elif path.stem.isdigit() and above:
            split = above.pop()
        else:
            split = path.stem
        key = ("/".join(above if above != ["data"] else []), split)
        splits.setdefault(key, []).append(path)
        if shard:
            seen, _ = parts.setdefault(key, (set(), int(shard["of"])))
            seen.add(int(shard["part"]))
    for key, (seen, of) in parts.items():
        lost = sorted(set(range(of)) - seen)
        if lost:
            where = splits[key][0].parent
            raise UserError(
                f"{where / f'{key[1]}-{lost[0]:05d}-of-{of:05d}.parquet'} is missing; fetch it, or all files again"
            )
    return splits


def read_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file; only its end is read.

    Raises:
        UserError: It is missing, cut short, or something else.
    """
    import pyarrow.parquet as pq

    with _reading(path):
        return pq.read_schema(path)


def read_table(paths: Sequence[Path], columns: Sequence[str]) -> pa.Table:
    """Some columns of several files of the same kind, one after the other.

    Raises:
        UserError: A file cannot be read, or has other columns than the first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_columns(paths, columns)
    tables = []
    for path in paths:
        with _reading(path):
            tables.append(pq.ParquetFile(path).read(columns=list(columns)))
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def check_columns(paths: Sequence[Path], columns: Sequence[str]) -> None:
    """Refuse files that lack a column, or hold it as another type than the first file."""
    schemas = [read_schema(path) for path in paths]
    for path, schema in zip(paths, schemas, strict=True):
        for column in columns:
            if column not in schema.names:
                raise UserError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
            if schema.field(column).type != schemas[0].field(column).type:
                raise UserError(f"column {column!r} of {path} is of another type than in {paths[0].name}; {_FETCH}")
            ours, theirs = (class_names(s, column) for s in (schema, schemas[0]))
            if ours and theirs and ours != theirs:
                raise UserError(f"column {column!r} of {path} counts other classes than in {paths[0].name}; {_FETCH}")


def rows_in(paths: Iterable[Path]) -> list[tuple[str, int]]:
    """Each file and how many rows it has."""
    import pyarrow.parquet as pq

    counts = []
    for path in paths:
        with _reading(path):
            counts.append((str(path), pq.read_metadata(path).num_rows))
    return counts


def locate(files: Sequence[tuple[str, int]], row: int) -> tuple[str, int]:
    """The file, of several with their rows, that holds a row of all of them, and its number there, from 0."""
    starts = [0, *accumulate(n for _, n in files)]
    k = bisect_right(starts, row) - 1
    return files[k][0], row - starts[k]


def features(schema: pa.Schema) -> dict[str, Any]:
    """What the ``datasets`` library wrote of each column: ``{"label": {"_type": "ClassLabel", "names": [...]}}``; or nothing."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names that the numbers of a ``ClassLabel`` column count; empty if it is none."""
    feature = features(schema).get(column, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images: bytes, or the struct of bytes and path of ``datasets.Image``."""
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


class Rows(Sequence[bytes]):
    """The encoded images of a column, by number. Nothing is copied before it is asked for.

    Args:
        table: A ``pyarrow.Table`` or one of the ``datasets`` library, which is mapped from disk and pickled by its path.
        column: The column of images.
        files: The files that it was read from, with their rows; they name an image in an error.
        rows: int64 [n]: the rows that are meant; none: all.
    """

    def __init__(
        self, table: Any, column: str, files: Sequence[tuple[str, int]], rows: np.ndarray | None = None
    ) -> None:
        self.table, self.column, self.files = table, column, list(files)
        self.rows = np.arange(table.num_rows) if rows is None else rows
        self._chunks: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._chunks is None:
            self._chunks = [_bytes_of(chunk) for chunk in self.table.column(self.column).chunks]
            self._starts = [0, *accumulate(len(chunk) for chunk in self._chunks)]
        row = int(self.rows[i])
        k = bisect_right(self._starts, row) - 1
        value = self._chunks[k][row - self._starts[k]].as_py()
        if value is None:
            file, row = self.place(i)
            raise UserError(
                f"{file}, row {row} has no image in column {self.column!r}; files with paths alone are not read"
            )
        return value

    def place(self, i: int) -> tuple[str, int]:
        """The file of image ``i`` and its row there, counted from 0."""
        return locate(self.files, int(self.rows[i]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chunks": None}


def _bytes_of(chunk: Any) -> Any:
    from pyarrow import types

    return chunk.field("bytes") if types.is_struct(chunk.type) else chunk


@dataclass(frozen=True)
class ParquetImages(Encoded):
    """Encoded images in the rows of Parquet files; a bad one is named by its file and row there."""

    def called(self, i: int) -> str:
        """The file and the row there."""
        assert isinstance(self.sources, Rows)
        file, row = self.sources.place(i)
        return f"{file}, row {row}"


class _reading:  # noqa: N801  # reads as a statement: `with _reading(path):`
    """Turns what pyarrow raises into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        if not self.path.exists():
            raise UserError(f"{self.path} is missing: put the file there or fetch it again")

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        from pyarrow import ArrowException

        if isinstance(error, ArrowException | OSError):
            line = " ".join(str(error).split())[:100]
            raise UserError(f"{self.path} is not a whole Parquet file ({line}); {_FETCH}") from None
