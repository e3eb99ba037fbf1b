"""A user's own folder of images, and ImageNet's folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ..bench.dataset import DataSet, Domain
from ..bench.errors import UserError
from ..bench.fetch import Remote
from ..bench.folders import (
    EXTENSIONS,
    Folders,
    Names,
    check_lookalikes,
    classes_in,
    encoded,
    images_in,
    nfc,
    same_classes,
    square,
)
from ..bench.paths import usable

_USABLE = re.compile(r"[A-Za-z0-9_.-]+")  # as the name of a domain: it becomes part of metric and file names
_WORDS = {  # part -> what its folder is called
    "train": "train|training|trn",
    "val": "val|valid|validation|validate|dev|development|eval|evaluation",
    "test": "test|testing|tst",
}
_FILLING = r"(?:the|my|data|set|split|part|images?|imgs?|pictures?|photos?|[\W\d_])*"
_PARTS = {part: re.compile(f"{_FILLING}(?:{words}){_FILLING}", re.IGNORECASE) for part, words in _WORDS.items()}
_AMBIGUOUS = re.compile(r"(train|training|val|validation|test|testing)", re.IGNORECASE)  # among a name's words
_LAYOUTS = "CLASS/IMAGE, DOMAIN/CLASS/IMAGE or train|val|test/CLASS/IMAGE"
_ONLY = "images"  # the domain, where there is one only


class ImageFolder(DataSet):
    """A folder of your own: CLASS/IMAGE, DOMAIN/CLASS/IMAGE, or train|val|test/CLASS/IMAGE.

    FOLDER is relative to the data root, or absolute. Which layout it has, the depth of its images and the names at its top
    say; `Training`, `Test set`, `dev` or `val_images` are parts, too. `test` is the official test part; without it, `val` is.
    Where there are both, the images of `val` are training material: every run cuts its own validation part from that.

    Splits are drawn for the folder's own name, so that they stay what they are when it is moved.
    """

    name = "imagefolder"
    takes = "FOLDER"
    augment = "crop-flip"
    source = f"{_LAYOUTS} in a folder of your own"
    licence = "your own"
    citation = "your own"

    class Params(Folders.Params):
        """The size of the images, and how they are brought to it."""

        fit: Literal["stretch", "centre"] = Field(
            "stretch", description="stretch: to a square; centre: keep the proportions, cut out the centre"
        )

    params: Params

    @property
    def title(self) -> str:
        """`imagefolder:NAME`, wherever the folder is."""
        return f"{self.name}:{os.path.basename(os.path.abspath(self._path()))}" if self.variant else self.name

    def look(self) -> None:
        """List the folder: its layout settles domains and classes."""
        self.crop, self.image = square(self.params.size)
        self.base = self._base()
        self.tops = _by_top(self.base, images_in(self.base))
        part = _parts_of(self.base, self.tops)
        if part or "" in self.tops:
            self.domains, self.classes = (_ONLY,), _classes_of_parts(self.base, self.tops, part)
            self.tests = [top for top in part if part[top] == ("test" if "test" in part.values() else "val")]
            self.members = {_ONLY: list(self.tops)}
        else:
            self.domains, self.tests = tuple(self.tops), []
            self.classes = same_classes({self.base / top: names for top, names in self.tops.items()})
            self.members = {top: [top] for top in self.tops}
        for domain in self.domains:
            if not _USABLE.fullmatch(domain):
                raise UserError(
                    f"{self.base / domain}: a domain's name has letters, digits, _, . and - only; rename the folder"
                )
        if len(self.classes) < 2:
            raise UserError(f"{self.base} has one class folder only; put in two or more: {_LAYOUTS}")

    def sources(self) -> list[Path]:
        """The folder."""
        return [self.base]

    def load(self) -> list[Domain]:
        """The domains asked for."""
        return [self._domain(d) for d in self.selected]

    def _domain(self, name: str) -> Domain:
        tops = self.members[name]
        parts = [(self.base / top, self.tops[top]) for top in tops]
        images, labels = encoded(parts, self.classes, self.image[1:], self.params.fit)
        tested = torch.tensor([top in self.tests for top in tops])
        counts = torch.tensor([sum(map(len, self.tops[top].values())) for top in tops])
        test = tested.repeat_interleave(counts).nonzero().flatten()
        return Domain(name, images, labels, test if self.tests else None)

    def _path(self) -> Path:
        return usable((self.root or Path()) / usable(self.variant, "folder"), "folder")

    def _base(self) -> Path:
        path = self._path()
        if not path.is_absolute() and self.root is None:
            raise UserError(
                f"the folder of {self.name}:{self.variant} is not here: give --data-root DIR or set QATBENCH_DATA to the "
                "folder that holds it, or write an absolute path"
            )
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; give imagefolder:FOLDER a folder below the data root, or an absolute path")
        return path


def _by_top(base: Path, images: Mapping[tuple[str, ...], list[str]]) -> dict[str, dict[str, list[str]]]:
    """Folder at the top -> class -> images; the top is "" if class folders lie there.

    Raises:
        UserError: There are no images, one is not as deep as the others, or a folder is empty.
    """
    depths = Counter({depth: 0 for depth in (1, 2)})
    for parts, names in images.items():
        depths[len(parts)] += len(names)
    if not depths.total():
        raise UserError(f"{base} holds no images ({' '.join(EXTENSIONS)}); expected {_LAYOUTS}")
    depth = max((1, 2), key=lambda d: depths[d])
    tops: dict[str, dict[str, list[str]]] = {}
    for parts, names in images.items():
        path = base.joinpath(*parts)
        if names and len(parts) != depth:
            most = f", and most of the others {depth}" if depths[depth] else ""
            raise UserError(
                f"{path / names[0]} lies {len(parts)} folders deep{most}; expected {_LAYOUTS}, one of them throughout"
            )
        if not names:
            raise UserError(f"{path} holds no images; put those of that class there, or remove the folder")
        tops.setdefault("/".join(parts[:-1]), {})[parts[-1]] = names
    return tops


def _parts_of(base: Path, tops: Iterable[str]) -> dict[str, str]:
    """Which folders at the top are parts of a split: ``Training``, ``Test set``, ``val_images`` and the like.

    Raises:
        UserError: Two are the same part, or a name may be that of a part or of a domain.
    """
    found: dict[str, str] = {}
    for top in tops:
        part = next((part for part, pattern in _PARTS.items() if pattern.fullmatch(top)), None)
        if part is None and any(_AMBIGUOUS.fullmatch(word) for word in re.findall(r"[^\W\d_]+", top)):
            raise UserError(
                f"{base / top} may be a part of a split or a domain; name it train, val or test, or else without that word"
            )
        if part in found.values():
            other = next(name for name in found if found[name] == part)
            raise UserError(
                f"{base} has {other!r} and {top!r}, both of which are its {part} part; put their images together, or rename one"
            )
        if part is not None:
            found[top] = part
    return found


def _classes_of_parts(base: Path, tops: Mapping[str, Names], part: Mapping[str, str]) -> tuple[str, ...]:
    """The classes of the training part, which the others may not go beyond."""
    other = [top for top in tops if part and top not in part]
    if other:
        first = next(iter(part))
        raise UserError(
            f"{base} has {first!r}, a part of a split, beside {other[0]!r}; leave train, val and test there, or rename {first!r}"
        )
    train = [top for top in tops if part.get(top, "train") == "train"]
    if not train:
        raise UserError(f"{base} has {' and '.join(part)}, but no train; add it, or rename them if they are domains")
    for top in tops:
        check_lookalikes(base / top, tops[top])
    classes = tuple(sorted({nfc(name) for top in train for name in tops[top]}))
    for top in tops:
        for name in sorted({nfc(name) for name in tops[top]} - set(classes)):
            raise UserError(
                f"class {name!r} is in {base / top}, but not in {base / train[0]}; add it there, or remove it"
            )
    return classes


class ImageNet(DataSet):
    """ImageNet, the thousand classes of ILSVRC 2012: train/WNID/*.JPEG and val/WNID/*.JPEG.

    Images are kept as 256x256: shorter side 256, centre cut out. Random-resized crops come from that square, where usually
    they come from the whole image. `val` is the official test part.
    """

    name = "imagenet"
    domains = ("imagenet",)
    augment = "resized-crop-flip"
    source = "imagenet/train/WNID/*.JPEG and imagenet/val/WNID/*.JPEG under the data root"
    licence = "image-net.org's terms of access"
    citation = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015"
    counts: ClassVar[Mapping[str, int]] = {"imagenet": 1_281_167 + 50_000}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "imagenet": (
            Remote("imagenet", note="get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar at image-net.org"),
        )
    }
    class_count: ClassVar[int] = 1000

    Params = Folders.Params
    params: Folders.Params

    def look(self) -> None:
        """Set the sizes."""
        self.crop, self.image = square(self.params.size)

    def sources(self) -> list[Path]:
        """The folders of the two parts."""
        return [self.find("imagenet", f"imagenet/{part}") for part in ("train", "val")]

    def fingerprint(self) -> str:
        """Names and times of the class folders; asking for those of 1.3 million files would take longer than an epoch's start."""
        try:
            folders = [
                (source.name, e.name, e.stat().st_mtime_ns)
                for source in self.sources()
                for e in os.scandir(source)
                if e.is_dir()
            ]
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; check permissions and links") from None
        return hashlib.sha256(json.dumps(sorted(folders)).encode()).hexdigest()

    def load(self) -> list[Domain]:
        """List the images."""
        train, val = self.sources()
        found = {train: classes_in(train), val: self._val(val)}
        self.classes = same_classes(found)
        if len(self.classes) != self.class_count:
            raise UserError(
                f"{train} has {len(self.classes)} class folders, but ImageNet has {self.class_count}; unpack it again, "
                f"or, if it is a subset, use imagefolder:{train.parent}"
            )
        images, labels = encoded(found.items(), self.classes, self.image[1:], "centre")
        return [Domain("imagenet", images, labels, torch.arange(sum(map(len, found[train].values())), len(labels)))]

    @staticmethod
    def _val(folder: Path) -> dict[str, list[str]]:
        if list(images_in(folder)) == [()]:
            raise UserError(
                f"{folder} is not sorted into class folders; do it with the script valprep.sh of soumith/imagenetloader.torch"
            )
        return classes_in(folder)
