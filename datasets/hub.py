"""Any image classification set of the Hugging Face hub, from its Parquet files."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from ..bench.dataset import DataSet, Domain
from ..bench.errors import UserError, nearest
from ..bench.folders import square
from ..bench.parquet import (
    ParquetImages,
    Rows,
    check_columns,
    class_names,
    features,
    find_splits,
    holds_images,
    locate,
    read_schema,
    read_table,
    rows_in,
)

_NAME = re.compile(r"(?=.*[A-Za-z0-9])[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LABELS = ("label", "labels", "fine_label")  # the usual names
_CONVERTED = "refs/convert/parquet"  # where the hub keeps its own conversion of a set that is not Parquet


class Hub(DataSet):
    """Any image classification set of the Hugging Face hub, from its Parquet files.

    The files are looked for in DATA_ROOT/OWNER/NAME and DATA_ROOT/NAME, in the hub's layout or as `Dataset.to_parquet`
    writes them (train.parquet, test.parquet); then in the cache of the Hugging Face libraries. From the network they come
    only when `online` is set, as `qatbench data prepare` does.

    The one image column and the one class column are found by themselves; otherwise `image` and `label` name them. The
    images are mapped from a copy in Arrow's format that the `datasets` library keeps in the store.
    """

    name = "hf"
    takes = "OWNER/NAME"
    augment = "crop-flip"
    source = "https://huggingface.co/datasets"
    licence = "as its owner says on the hub"
    citation = "as its owner says on the hub; Q. Lhoest et al.: Datasets: A Community Library for NLP, EMNLP 2021"

    class Params(DataSet.Params):
        """Which columns and splits, and how large the images are."""

        image: str | None = Field(None, description="the column of images (none: the only one)")
        label: str | None = Field(
            None, description="the column of classes (none: the only one, or label, labels, fine_label)"
        )
        domain: str | None = Field(None, description="a column that tells domains apart (none: one domain)")
        config: str | None = Field(None, description="the configuration, if there are several")
        split: str = Field("train", description="the split that trains")
        test_split: str | None = Field(
            "test", description="the official test part; none, or not there: a fifth is drawn"
        )
        size: int = Field(224, ge=8, le=1024, description="height and width that the network sees")
        margin: bool = Field(
            True, description="store images 8/7 as large, for crops; false: they are as small as `size`, e.g. 32"
        )
        fit: Literal["stretch", "centre"] = Field(
            "stretch", description="stretch: to a square; centre: keep the proportions, cut out the centre"
        )

    params: Params

    def look(self) -> None:
        """Find the files; their columns settle classes and domains."""
        asked = self.params
        if not _NAME.fullmatch(self.variant):
            raise UserError(f"{self.title!r} is no set of the hub: write hf:OWNER/NAME, as in hf:uoft-cs/cifar10")
        self.crop, self.image = square(asked.size)
        if not asked.margin:
            self.image = (3, *self.crop)
        self.train, self.test = self._files()
        schema = read_schema(self.train[0])
        self.image_column = self._image(schema)
        self.label_column = self._label(schema)
        if asked.domain is not None and asked.domain not in schema.names:
            raise UserError(f"{self.train[0]} has no column {asked.domain!r}{nearest(asked.domain, schema.names)}")
        used = [self.image_column, self.label_column, *([asked.domain] if asked.domain else [])]
        check_columns([*self.train, *self.test], list(dict.fromkeys(used)))
        self.classes = class_names(schema, self.label_column) or tuple(
            dict.fromkeys(map(str, self._values(self.label_column)[1]))
        )
        for twice in (n for n in self.classes if self.classes.count(n) > 1):
            raise UserError(
                f"class name {twice!r} stands twice in the metadata of column {self.label_column!r} of {self.train[0]}; rename one"
            )
        self.domain_of, self.domains = self._domains(schema)

    def sources(self) -> list[Path]:
        """The Parquet files of both splits."""
        return [*self.train, *self.test]

    def load(self) -> list[Domain]:
        """The training rows of each domain and, after them, its test rows."""
        files = rows_in(self.sources())
        n_train = sum(n for _, n in files[: len(self.train)])
        labels = torch.from_numpy(self._labels(files))
        table = self._table(files)
        domains = []
        for name in self.selected:
            index = (
                (self.domain_of == self.domains.index(name)).nonzero()[0]
                if self.params.domain
                else np.arange(len(labels))
            )
            rows = Rows(table, self.image_column, files, index)
            test = torch.from_numpy((index >= n_train).nonzero()[0])
            images = ParquetImages(rows, self.image[1:], self.params.fit)
            domains.append(Domain(name, images, labels[torch.from_numpy(index)], test if len(test) else None))
        return domains

    # -- files ----------------------------------------------------------------------------------------------------------

    def _files(self) -> tuple[list[Path], list[Path]]:
        """The files of the training split and of the test split."""
        folder = self._folder()
        splits = find_splits(folder)
        configs = sorted({config for config, _ in splits})
        config = self.params.config
        if config is None and len(configs) > 1:
            raise UserError(
                f"{folder} holds several configurations: choose one with config=, of {', '.join(filter(None, configs))}"
            )
        config = configs[0] if config is None else config
        if config not in configs:
            raise UserError(f"{folder} has no configuration {config!r}{nearest(config, filter(None, configs))}")
        there = {split: files for (c, split), files in splits.items() if c == config}
        train, test = self.params.split, self.params.test_split
        if train == test:
            raise UserError(
                f"split and test_split are both {train!r}: the same images would train and test; use test_split=null"
            )
        for split, key in ((train, "split"), (test, "test_split")):
            if split is not None and split not in there and (key, split) != ("test_split", "test"):
                raise UserError(f"{folder} has no split {split!r}: set {key} to one of {', '.join(sorted(there))}")
        return there[train], there.get(test or "", [])

    def _folder(self) -> Path:
        """Where the Parquet files are."""
        names = dict.fromkeys((self.variant, self.variant.rpartition("/")[2]))
        looked = [place / name for place in self.places for name in names]
        for folder in looked:
            if _has_parquet(folder):
                return folder
        cached = self._snapshot(self.online)
        if cached is not None:
            return cached
        where = f"put its Parquet files in {looked[0]}" if self.root else "give --data-root DIR or set QATBENCH_DATA"
        raise UserError(
            f"{self.title!r} is neither under a data root nor in the Hugging Face cache: fetch it (qatbench data prepare "
            f"{self.title}), or {where}"
        )

    def _snapshot(self, online: bool) -> Path | None:
        """The set in the cache of the Hugging Face libraries, fetched if that is allowed; None if it is not there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

        for revision in (None, _CONVERTED):
            try:
                folder = snapshot_download(
                    self.variant,
                    repo_type="dataset",
                    revision=revision,
                    allow_patterns="*.parquet",
                    local_files_only=not online,
                )
            except RevisionNotFoundError:
                continue
            except (
                Exception
            ) as error:  # network, names, rights: the library's own types, and those of what it is built on
                if not online and isinstance(error, LocalEntryNotFoundError):
                    continue
                line = " ".join(str(error).split())[:160]
                raise UserError(
                    f"{self.title!r} cannot be had from the hub ({line}); check the name, the network, and, if it is gated, "
                    "your login (hf auth login)"
                ) from None
            if _has_parquet(Path(folder)):
                return Path(folder)
        return None

    # -- columns --------------------------------------------------------------------------------------------------------

    def _image(self, schema: Any) -> str:
        """The column of images."""
        asked, kinds = self.params.image, features(schema)
        columns = ", ".join(schema.names)
        if asked is None:
            found = [n for n in schema.names if kinds.get(n, {}).get("_type") == "Image"]
            found = found or [n for n in schema.names if holds_images(schema.field(n).type)]
            if len(found) != 1:
                what = "several columns of images" if found else "no column of encoded images"
                raise UserError(f"{self.train[0]} has {what}: name one with image=, of {columns}")
            asked = found[0]
        if asked not in schema.names:
            raise UserError(f"{self.train[0]} has no column {asked!r}: set image to one of {columns}")
        if not holds_images(schema.field(asked).type):
            kind = str(schema.field(asked).type)[:60]
            raise UserError(
                f"column {asked!r} of {self.train[0]} holds {kind}, not encoded images; set image to another one of {columns}"
            )
        return asked

    def _label(self, schema: Any) -> str:
        """The column of classes."""
        asked, kinds = self.params.label, features(schema)
        columns = ", ".join(n for n in schema.names if n not in (self.image_column, self.params.domain))
        if asked is None:
            named = [n for n in columns.split(", ") if kinds.get(n, {}).get("_type") == "ClassLabel"]
            usual = [n for n in _LABELS if n in schema.names]
            if len(named) != 1 and not usual:
                raise UserError(
                    f"{self.train[0]} has no column of labels that is known as one: set label to one of {columns or '(none)'}"
                )
            return named[0] if len(named) == 1 else usual[0]
        if asked not in schema.names:
            raise UserError(f"{self.train[0]} has no column {asked!r}: set label to one of {columns}")
        return asked

    def _values(self, column: str) -> tuple[np.ndarray, list[Any]]:
        """A column of both splits as numbers, int64 [N], into its sorted values; -1 for none."""
        import pyarrow as pa

        table = read_table(self.sources(), [column])
        kind = table.schema.field(column).type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
            raise UserError(
                f"column {column!r} of {self.train[0]} holds {kind}, neither whole numbers nor names; choose another one"
            )
        array: Any = table.column(column).combine_chunks()
        coded = (array if pa.types.is_integer(kind) else array.cast(pa.string())).dictionary_encode()
        found = coded.dictionary.to_pylist()
        values = sorted(v for v in found if v != -1)
        order = {value: i for i, value in enumerate(values)}
        number = np.asarray([*(order.get(v, -1) for v in found), -1], np.int64)
        return number[coded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)], values

    def _labels(self, files: Sequence[tuple[str, int]]) -> np.ndarray:
        """The class of every row, int64 [N]."""
        numbers, values = self._values(self.label_column)
        if class_names(
            read_schema(self.train[0]), self.label_column
        ):  # numbers that count names: they stay what they are
            known = np.asarray([*values, -1], np.int64)
            numbers = known[numbers]
        n_train = sum(n for _, n in files[: len(self.train)])
        for split, part in ((self.params.split, numbers[:n_train]), (self.params.test_split, numbers[n_train:])):
            if len(part) and (part == -1).all():
                key = "split" if split == self.params.split else "test_split"
                raise UserError(
                    f"split {split!r} of {self.title!r} has no labels (column {self.label_column!r} is -1 or empty throughout): "
                    f"set {key} to another split" + ("" if key == "split" else ", or to null")
                )
        wrong = ((numbers < 0) | (numbers >= len(self.classes))).nonzero()[0]
        if len(wrong):
            file, row = locate(files, int(wrong[0]))
            unlabelled = int((numbers == -1).sum())
            if numbers[wrong[0]] == -1:
                raise UserError(
                    f"{file}, row {row}: label -1 or none, as in {unlabelled:,} of {len(numbers):,} rows, counts as unlabelled; "
                    "if it is a class, number the classes from 0, else drop those rows"
                )
            raise UserError(
                f"{file}, row {row}: label {numbers[wrong[0]]} is not one of 0..{len(self.classes) - 1}; mend or drop that row"
            )
        return numbers

    def _domains(self, schema: Any) -> tuple[np.ndarray, tuple[str, ...]]:
        """The domain of every row, by number, and the names of the domains."""
        if self.params.domain is None:
            return np.zeros(0, np.int64), (_clean(self.variant.rpartition("/")[2]),)
        numbers, values = self._values(self.params.domain)
        if (numbers < 0).any():
            raise UserError(
                f"column {self.params.domain!r} of {self.train[0].parent} has empty rows; choose another one as domain"
            )
        known = class_names(schema, self.params.domain)
        names = tuple(_clean(known[v] if known else str(v)) for v in values)
        if len(set(names)) < len(names):
            raise UserError(
                f"domains of {self.title!r} are no longer told apart as names of metrics: {', '.join(sorted(names))}"
            )
        return numbers, names

    def _table(self, files: Sequence[tuple[str, int]]) -> Any:
        """The images, mapped from disk, where any row is found at once; in a Parquet file it would be unpacked with its group."""
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        cache = None if self.downloads is None else str(self.downloads / "arrow")
        paths = [glob.escape(file) for file, _ in files]
        try:
            rows: Any = datasets.load_dataset(
                "parquet", data_files=paths, split="train", columns=[self.image_column], cache_dir=cache
            )
        except Exception as error:  # the library wraps what pyarrow and the system raise
            for path in self.sources():
                read_table([path], [self.image_column])  # says which file it is, if it is one
            line = " ".join(str(error.__cause__ or error).split())[:160]
            if _is_of_the_system(error):
                raise UserError(
                    f"cannot copy the images of {self.title!r} to {cache} ({line}); free some space or choose another store"
                ) from None
            raise UserError(
                f"the library datasets does not read {self.sources()[0]} ({line}); mend the file or its metadata"
            ) from None
        return rows.data


def _is_of_the_system(error: BaseException | None) -> bool:
    """Whether a disk or a right is what is missing: such an error, or what was raised from it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return True
        error = error.__cause__ or error.__context__
    return False


def _has_parquet(folder: Path) -> bool:
    return folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def _clean(name: str) -> str:
    """A name that metrics and files can have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_") or "_"
