"""Images in folders: CLASS/IMAGE, and DOMAIN/CLASS/IMAGE. Read strictly, so that none is left out, or mislabelled, unnoticed."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, overload

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .dataset import DataSet, Domain
from .errors import UserError, nearest
from .images import Encoded, kind_of

EXTENSIONS = (  # in any case
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif",
)  # fmt: skip
STORED = 256 / 224  # side of a stored image over that of what the network sees: room for random crops

_ENDING = {
    "JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WebP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "PNM": ".pnm",
}  # fmt: skip

Names = Mapping[str, Sequence[str]]
"""Class -> the names of its images, in the folder of that name."""


class Folders(DataSet):
    """Domains that are folders of classes; a data set sets facts only.

    Images are stretched to a square of `STORED` times the size that the network sees.
    """

    folders: ClassVar[
        Mapping[str, tuple[str, ...]]
    ]  # domain -> where it may be, below a data root; the usual place first
    class_count: ClassVar[int | None] = None  # where `classes` is left to the folders

    class Params(DataSet.Params):
        """`DataSet.Params`, and how large the images are."""

        size: int = Field(224, ge=8, le=1024, description="height and width that the network sees")

    params: Params

    def look(self) -> None:
        """Set the sizes."""
        self.crop, self.image = square(self.params.size)

    def sources(self) -> list[Path]:
        """The folders of the domains asked for."""
        return [self.folder(d) for d in self.selected]

    def load(self) -> list[Domain]:
        """List the images of the domains asked for."""
        folders = {d: self.folder(d) for d in self.selected}
        found = {folder: classes_in(folder) for folder in folders.values()}
        self.classes = same_classes(found, getattr(self, "classes", ()), self.title)
        if self.class_count not in (None, len(self.classes)):
            raise UserError(
                f"{self.sources()[0]} has {len(self.classes)} class folders, but {self.title!r} has {self.class_count} classes; "
                "unpack its archive again"
            )
        return [self.domain(d, folder, found[folder]) for d, folder in folders.items()]

    def domain(self, name: str, folder: Path, found: Names) -> Domain:
        """One domain of these images."""
        images, labels = encoded([(folder, found)], self.classes, self.image[1:])
        return Domain(name, images, labels)

    def folder(self, domain: str) -> Path:
        """The folder of a domain."""
        return self.find(domain, *self.folders[domain])


def square(size: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """What the network sees, and what is stored: (224, 224), (3, 256, 256)."""
    side = round(size * STORED)
    return (size, size), (3, side, side)


def images_in(folder: Path, _above: frozenset[tuple[int, int]] = frozenset()) -> dict[tuple[str, ...], list[str]]:
    """The images under a folder: their names, by the parts of the path of the folder that they lie in; all sorted.

    A folder that holds neither images nor folders has an empty list. What is hidden, and files that are no images, are ignored.

    Raises:
        UserError: Something may not be read, is a broken link or a link back, is an image with another ending, or a folder's
            name cannot be a class's.
    """
    try:
        here = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if _visible(e.name)), key=lambda e: e.name)
        folders = [e.name for e in visible if e.is_dir()]
        files = [e for e in visible if not e.is_dir()]
        images, others = [], []
        for e in files:
            (images if e.name.lower().endswith(EXTENSIONS) else others).append(e)
        broken = [e.path for e in images if not e.is_file()]
        _check_others([e.path for e in others if e.is_file()])
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot read {where}: {error.strerror}; check that folder, permissions and links") from None
    identity = here.st_dev, here.st_ino
    if identity in _above:
        raise UserError(f"{folder} leads back to a folder that it lies in; remove that link")
    if broken:
        raise UserError(f"{broken[0]} is a broken link, or no file: put back the image that it points to, or remove it")
    found = {(): [e.name for e in images]} if images or not folders else {}
    for name in folders:
        _check_name(folder, name)
        below = images_in(folder / name, _above | {identity})
        found |= {(name, *parts): names for parts, names in below.items()}
    return found


def _check_others(paths: Sequence[str]) -> None:
    """Refuse images that would be left out: those whose ending, or whose format, is not read."""
    kinds = {path: kind for path in paths if (kind := kind_of(Path(path)))}
    if not kinds:
        return
    first, kind = next(iter(kinds.items()))
    more = f", and so are {len(kinds) - 1} more files in that folder" if len(kinds) > 1 else ""
    how = f"rename them, to end in {_ENDING[kind]}" if kind in _ENDING else "convert them to JPEG or PNG"
    raise UserError(f"{first} is an image by its first bytes ({kind}) but is not read{more}; {how}, or remove them")


def _check_name(folder: Path, name: str) -> None:
    """Refuse a folder whose name would not be the same in a table, a file and a terminal."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise UserError(
            f"the name of folder {name!r} in {folder} has a control character, or is not UTF-8; rename the folder"
        )


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"  # macOS leaves both, with files named like images


def classes_in(folder: Path) -> dict[str, list[str]]:
    """The images of a folder of class folders.

    Raises:
        UserError: There are none, a class has none, or an image lies elsewhere.
    """
    images = images_in(folder)
    if not any(images.values()):
        raise UserError(f"{folder} holds no images; put those of each class in a folder of its own there")
    for parts, names in images.items():
        path = folder.joinpath(*parts)
        if not names:
            raise UserError(f"{path} holds no images; put those of that class there, or remove the folder")
        if len(parts) != 1:
            raise UserError(
                f"{path / names[0]} is out of place: images belong at {folder / 'CLASS'}/IMAGE; move or remove it"
            )
    return {parts[0]: names for parts, names in images.items()}


def nfc(name: str) -> str:
    """A class's name, composed: macOS writes é as e and an accent, which look the same and are other bytes."""
    return unicodedata.normalize("NFC", name)


def same_classes(found: Mapping[Path, Iterable[str]], known: Sequence[str] = (), title: str = "") -> tuple[str, ...]:
    """The classes that all folders have, composed (`nfc`): those that are known or, if none are, the first folder's.

    Raises:
        UserError: A folder lacks a class, has one that another lacks, or two that look the same.
    """
    first = next(iter(found))
    classes = tuple(known) or tuple(nfc(name) for name in found[first])
    for folder, names in found.items():
        check_lookalikes(folder, names)
        other = f"{title!r}" if known else str(first)
        here = {nfc(name) for name in names}
        for name in sorted(here - set(classes)):
            hint = nearest(name, classes) if known else "; restore it there, or remove it here"
            raise UserError(f"class {name!r} is in {folder}, but not in {other}{hint}")
        for name in sorted(set(classes) - here):
            raise UserError(
                f"class {name!r} of {other} is not in {folder}; every domain needs the folders of all classes"
            )
    return classes


def check_lookalikes(folder: Path, names: Iterable[str]) -> None:
    """Refuse two class folders whose names differ only in how their letters are composed."""
    seen: dict[str, str] = {}
    for name in names:
        if nfc(name) in seen:
            raise UserError(
                f"{folder} has two folders that look like {nfc(name)!r}, {seen[nfc(name)]!a} and {name!a}; put them together"
            )
        seen[nfc(name)] = name


def encoded(
    parts: Iterable[tuple[Path, Names]],
    classes: Sequence[str],
    size: tuple[int, int],
    fit: Literal["stretch", "centre"] = "stretch",
) -> tuple[Encoded, Tensor]:
    """The images of folders of classes, one folder after the other, with their labels (int64)."""
    number = {name: i for i, name in enumerate(classes)}
    folders = {folder / name: names for folder, found in parts for name, names in found.items()}
    labels = torch.tensor([number[nfc(folder.name)] for folder in folders], dtype=torch.int64)
    counts = torch.tensor([len(names) for names in folders.values()])
    return Encoded(Files(folders), size, fit), labels.repeat_interleave(counts)


class Files(Sequence[Path]):
    """Paths, whose names are kept in one run of bytes: a million of `Path`s would take half a gigabyte in every process."""

    def __init__(self, folders: Mapping[Path, Sequence[str]]) -> None:
        encoded_names = [os.fsencode(name) for names in folders.values() for name in names]
        self.folders = [str(folder) for folder in folders]
        self.first = np.cumsum([0, *(len(names) for names in folders.values())])  # image of each folder
        self.start = np.cumsum([0, *(len(name) for name in encoded_names)])  # of each name
        self.names = b"".join(encoded_names)

    def __len__(self) -> int:
        return len(self.start) - 1

    @overload
    def __getitem__(self, i: int) -> Path: ...
    @overload
    def __getitem__(self, i: slice) -> list[Path]: ...
    def __getitem__(self, i: int | slice) -> Path | list[Path]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        folder = self.folders[int(np.searchsorted(self.first, i, "right")) - 1]
        return Path(folder, os.fsdecode(self.names[self.start[i] : self.start[i + 1]]))
