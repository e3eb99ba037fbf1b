"""CIFAR-10 and CIFAR-100, balanced as published or long-tailed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ..bench.dataset import DataSet, Domain
from ..bench.errors import UserError
from ..bench.fetch import Remote
from ..bench.images import Encoded
from ..bench.parquet import (
    ParquetImages,
    Rows,
    class_names,
    find_splits,
    holds_images,
    read_schema,
    read_table,
    rows_in,
)

SIZE = 32
_FETCH = "fetch the file again"


class Cifar10(DataSet):
    """60,000 small colour photographs of 10 classes, 6,000 each; 10,000 of them are the official test part.

    Read from torchvision's folder `cifar-10-batches-py`, from its archive, or from the hub's Parquet files.
    """

    name = "cifar10"
    domains = ("cifar10",)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    image = (3, SIZE, SIZE)
    augment = "crop-flip"
    source = "https://www.cs.toronto.edu/~kriz/cifar.html; as Parquet: https://huggingface.co/datasets/uoft-cs/cifar10"
    licence = "none stated; cite"
    citation = "A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009"
    counts: ClassVar[Mapping[str, int]] = {"cifar10": 60_000}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "cifar10": (
            Remote(
                "cifar-10-python.tar.gz",
                (
                    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",  # where PaddlePaddle takes it from
                ),
                sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",  # published by Keras
                md5="c58f30108f718f92721af3b95e74349a",  # published by the authors, torchvision and PaddlePaddle
                size=170_498_071,
                unpack="cifar10-python",
                note="put the hub's files there as cifar10/plain_text/{train,test}-*.parquet",
            ),
        )
    }
    folder: ClassVar[str] = "cifar-10-batches-py"  # torchvision's, and the archive's
    batches: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    }
    hub: ClassVar[str] = "cifar10/plain_text"
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {  # of labels: in the pickles, in the Parquet files
        "pickle": ("labels",),
        "parquet": ("label",),
    }

    def sources(self) -> list[Path]:
        """Torchvision's files, or the hub's."""
        return [path for paths in self._files().values() for path in paths]

    def load(self) -> list[Domain]:
        """The training images and, after them, those of the official test part."""
        files = self._files()
        paths = [path for part in ("train", "test") for path in files[part]]
        parquet = paths[0].suffix == ".parquet"
        images, labels, sizes = self._from_parquet(paths) if parquet else self._from_batches(paths)
        n_train = sum(sizes[: len(files["train"])])
        if not 0 < n_train < len(labels):
            part = "test" if n_train else "training"
            raise UserError(f"{paths[0].parent} holds no {part} images; {_FETCH}")
        test = torch.arange(n_train, len(labels))
        return [Domain(self.domains[0], images, torch.from_numpy(self.target(labels)), test)]

    def target(self, labels: np.ndarray) -> np.ndarray:
        """The class of each image, int64 [N], from the label columns, int64 [N, columns]."""
        return labels[:, 0].copy()

    def known_names(self) -> Sequence[tuple[str, ...]]:
        """The classes that each label column counts."""
        return (self.classes,)

    def _files(self) -> dict[str, list[Path]]:
        """Train and test files, in their official order."""
        remote = self.remotes[self.domains[0]][0]
        unpacked = f"{remote.unpack}/{self.folder}"
        for place in self.places:
            for folder in (place / self.folder, place / unpacked):
                if folder.is_dir():
                    return self._listed(folder)
            for folder in (place / self.hub, place / "uoft-cs" / self.hub):
                if folder.is_dir():
                    return self._sharded(folder)
        if any(self.archives(remote) for remote in self.remotes[self.domains[0]]):
            return self._listed(self.find(self.domains[0], unpacked))
        raise self.missing(self.folder, self.domains[0])

    def _listed(self, folder: Path) -> dict[str, list[Path]]:
        for name in (name for names in self.batches.values() for name in names):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder / name} is missing: put all files of {folder.name} there, or unpack the archive again"
                )
        return {part: [folder / name for name in names] for part, names in self.batches.items()}

    def _sharded(self, folder: Path) -> dict[str, list[Path]]:
        splits = find_splits(folder)
        for part in self.batches:
            if ("", part) not in splits:
                raise UserError(f"{folder} has no {part}-*.parquet: put all of the hub's files there")
        return {part: splits["", part] for part in self.batches}

    def _from_batches(self, paths: Sequence[Path]) -> tuple[torch.Tensor, np.ndarray, list[int]]:
        names = self.columns["pickle"]
        read = [_read_batch(path, names) for path in paths]
        for path, (_, labels) in zip(paths, read, strict=True):
            self._check(labels, str(path))
        images = torch.from_numpy(np.concatenate([pixels for pixels, _ in read]))
        return images, np.concatenate([labels for _, labels in read]), [len(labels) for _, labels in read]

    def _from_parquet(self, paths: Sequence[Path]) -> tuple[Encoded, np.ndarray, list[int]]:
        schema, names = read_schema(paths[0]), self.columns["parquet"]
        image = next((n for n in ("img", "image") if n in schema.names), None)
        if image is None or not holds_images(schema.field(image).type):
            raise UserError(f"{paths[0]} has no column 'img' of encoded images; it has {', '.join(schema.names)}")
        for name, known in zip(names, self.known_names(), strict=True):
            _check_order(class_names(schema, name), known, paths[0])
        table, files = read_table(paths, [image, *names]), rows_in(paths)
        columns = [_whole(table.column(name), paths) for name in names]
        labels = np.stack(columns, 1)
        sizes = [n for _, n in files]
        for (path, _), part in zip(files, np.split(labels, np.cumsum(sizes)[:-1]), strict=True):
            self._check(part, path)
        images = ParquetImages(Rows(table.select([image]), image, files), (SIZE, SIZE))
        return images, labels, sizes

    def _check(self, labels: np.ndarray, path: str) -> None:
        """Refuse labels, int64 [N, columns], that name no class."""
        for column, known in zip(labels.T, self.known_names(), strict=True):
            wrong = ((column < 0) | (column >= len(known))).nonzero()[0]
            if len(wrong):
                raise UserError(
                    f"{path}, row {wrong[0]}: label {column[wrong[0]]} is not one of 0..{len(known) - 1}; {_FETCH}"
                )


# The published grouping, in the order of the superclasses' numbers; classes are numbered by the alphabet.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
COARSE = tuple(GROUPS)
FINE = tuple(sorted(name for group in GROUPS.values() for name in group))
FINE_TO_COARSE = tuple(next(i for i, g in enumerate(GROUPS.values()) if name in g) for name in FINE)


class Cifar100(Cifar10):
    """60,000 small colour photographs of 100 classes, 600 each, in 20 superclasses; 10,000 are the official test part.

    `labels` chooses: the 100 fine classes, the 20 coarse ones, or both, as two tasks of one network.
    """

    name = "cifar100"
    domains = ("cifar100",)
    classes = FINE
    source = "https://www.cs.toronto.edu/~kriz/cifar.html; as Parquet: https://huggingface.co/datasets/uoft-cs/cifar100"
    counts: ClassVar[Mapping[str, int]] = {"cifar100": 60_000}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "cifar100": (
            Remote(
                "cifar-100-python.tar.gz",
                (
                    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                    "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",  # where PaddlePaddle takes it from
                ),
                sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",  # published by Keras
                md5="eb9058c3a382ffc7106e4002c42a8d85",  # published by the authors, torchvision and PaddlePaddle
                size=169_001_437,
                unpack="cifar100-python",
                note="put the hub's files there as cifar100/cifar100/{train,test}-*.parquet",
            ),
        )
    }
    folder = "cifar-100-python"
    batches: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    hub = "cifar100/cifar100"
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pickle": ("fine_labels", "coarse_labels"),
        "parquet": ("fine_label", "coarse_label"),
    }

    class Params(DataSet.Params):
        """What a user can ask for."""

        labels: Literal["fine", "coarse", "both"] = Field(
            "fine", description="100 fine classes, 20 coarse ones, or both: a second head learns the coarse ones"
        )

    def look(self) -> None:
        """Take the classes that were asked for."""
        self.labels = self.params.model_dump()["labels"]
        if self.labels == "coarse":
            self.classes = COARSE
        elif self.labels == "both":
            self.superclasses, self.superclass = COARSE, FINE_TO_COARSE

    def target(self, labels: np.ndarray) -> np.ndarray:
        """Fine classes, or coarse ones."""
        return labels[:, int(self.labels == "coarse")].copy()

    def known_names(self) -> Sequence[tuple[str, ...]]:
        """The classes that each label column counts."""
        return (FINE, COARSE)

    def _check(self, labels: np.ndarray, path: str) -> None:
        super()._check(labels, path)
        fine, coarse = labels.T
        wrong = (np.asarray(FINE_TO_COARSE)[fine] != coarse).nonzero()[0]
        if len(wrong):
            i = wrong[0]
            found, right = COARSE[coarse[i]], COARSE[FINE_TO_COARSE[fine[i]]]
            raise UserError(
                f"{path}, row {i}: {FINE[fine[i]]!r} with the coarse label {found!r} instead of {right!r}; {_FETCH}"
            )


class Cifar10LongTail(Cifar10):
    """CIFAR-10 with exponentially fewer images from class to class; the test part stays balanced."""

    name = "cifar10-lt"
    stored_as = "cifar10"
    citation = f"{Cifar10.citation}; long-tailed: Cui et al. 2019, Cao et al. 2019 (ldam), Chen et al. 2022 (climbq)"

    class Params(Cifar10.Params):
        """What a user can ask for."""

        imbalance: float | None = Field(50.0, ge=1, description="the largest class over the smallest")


class Cifar100LongTail(Cifar100):
    """CIFAR-100 with exponentially fewer images from class to class; the test part stays balanced."""

    name = "cifar100-lt"
    stored_as = "cifar100"
    citation = Cifar10LongTail.citation

    class Params(Cifar100.Params):
        """What a user can ask for."""

        imbalance: float | None = Field(50.0, ge=1, description="the largest class over the smallest")


def _whole(column: Any, paths: Sequence[Path]) -> np.ndarray:
    """A column of labels as int64."""
    if column.null_count or str(column.type) not in ("int64", "int32", "int16", "int8", "uint8"):
        raise UserError(
            f"{paths[0].parent}: a column of labels holds {column.type} with {column.null_count} nulls; {_FETCH}"
        )
    return column.to_numpy().astype(np.int64)


def _check_order(names: Sequence[str], known: tuple[str, ...], path: Path) -> None:
    """Refuse a file that counts its classes in another order; another spelling (the hub had "cra" for "crab") is none."""
    for i, name in enumerate(names):
        if name in known and known.index(name) != i:
            raise UserError(
                f"{path} counts {name!r} as class {i}, not {known.index(name)}: it is not the published set"
            )


def _read_batch(path: Path, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One of torchvision's files: images uint8 [N, 3, 32, 32], labels int64 [N, columns]."""
    try:
        with open(path, "rb") as file:
            batch = _Plain(file, encoding="bytes").load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check permissions and links") from None
    except Exception as error:  # what damaged bytes raise is not limited to a few types
        line = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or no batch of CIFAR images ({line}); {_FETCH}") from None
    try:
        batch = {_text(key): value for key, value in batch.items()}
        pixels = batch["data"].array().reshape(-1, 3, SIZE, SIZE)
        labels = np.stack([np.asarray(batch[name], dtype=np.int64) for name in columns], 1)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path} does not hold 'data' (uint8, N x 3072) and {' and '.join(columns)}; {_FETCH}"
        ) from None
    if labels.shape != (len(pixels), len(columns)):
        raise UserError(f"{path} has {len(labels)} labels for {len(pixels)} images; {_FETCH}")
    return pixels, labels


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Plain(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and arrays of bytes; nothing that a pickle names is imported or called.

    NumPy's own functions, too, are not called: what stands for them here only takes notes.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the few names that a pickled array needs."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of images needs")


class _Array:
    """Notes of a pickled array."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, uint8."""
        _version, shape, dtype, fortran, raw = self.state
        if dtype.kind != "u1" or fortran:
            raise ValueError("not an array of bytes, row by row")
        return np.frombuffer(_raw(raw), np.uint8).reshape(shape)


class _DType:
    """Notes of a pickled dtype."""

    def __init__(self, kind: Any = None, *_: Any) -> None:
        self.kind = _text(kind)

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle of protocol 2."""
    return text.encode("latin1")


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin1")


_KNOWN = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode}
