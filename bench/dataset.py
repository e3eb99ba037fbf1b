"""From files to arrays: what a data set plugin is, where its files are looked for, and what the harness gets of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from .archive import extract
from .errors import UserError, nearest
from .fetch import Remote, verify
from .hooks import Check, guard
from .images import Encoded
from .spec import Frozen, validated


@dataclass(frozen=True)
class Domain:
    """The images of one source."""

    name: str
    images: Tensor | Encoded  # uint8 [N, C, H, W], stored with the channels last; or files that are still to be decoded
    labels: Tensor  # int64 [N]
    test: Tensor | None = None  # int64: the official test part, if there is one
    group: Tensor | None = None  # int64 [N]: images of one group, in any domain, stay in one part of the split


def _wrong_domains(dataset: DataSet, result: Any) -> str | None:
    """What `load` should have given."""
    if not isinstance(result, list | tuple) or not all(isinstance(d, Domain) for d in result):
        return "a list of Domain"
    for d in result:
        rows = [d.labels, *(values for values in (d.test, d.group) if values is not None)]
        if not isinstance(d.images, Tensor | Encoded) or not all(isinstance(r, Tensor) and r.ndim == 1 for r in rows):
            return "Domains of images [N, C, H, W], labels [N], and test and group [N] or None, all of them tensors"
    return None if _names(getattr(dataset, "classes", ())) else "classes set by then, a tuple of names"


_HOOKS: dict[str, Check] = {
    "look": lambda dataset, result: None,
    "sources": lambda dataset, result: None if isinstance(result, Iterable) else "a list of paths",
    "load": _wrong_domains,
    "fingerprint": lambda dataset, result: None if isinstance(result, str) else "a str",
}
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]+")  # it becomes a part of metrics' and files' names


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(name, str) for name in value)


def _wrong_facts(dataset: DataSet) -> str | None:
    """What is wrong with the facts that a data set states; None if nothing is."""
    domains, image = getattr(dataset, "domains", ()), getattr(dataset, "image", ())
    if not _names(domains) or len({*domains}) < len(domains) or not all(_DOMAIN.fullmatch(d) for d in domains):
        return f"domains are {reprlib.repr(domains)}; give distinct names of letters, digits, _, . and -"
    given = [image, dataset.crop or ()]
    sizes = [size for part in given for size in part] if all(isinstance(part, list | tuple) for part in given) else []
    if len(sizes) not in (3, 5) or not all(type(size) is int and size > 0 for size in sizes):
        return f"image is {reprlib.repr(image)}, crop {reprlib.repr(dataset.crop)}; give (C, H, W), and (H, W) or None"
    if not _names(getattr(dataset, "classes", ("may be set by load",))):
        return f"classes are {reprlib.repr(dataset.classes)}; give a tuple of names"
    return None


class DataSet:
    """A plugin: domains of labelled images of one size.

    Its facts are class attributes. A plugin writes `load`, and `sources`, the files that `load` reads. What depends on a
    setting or on the files themselves (the size, the classes, the domains) is set on `self`, in `look`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # goes up by hand when `load` gives other images
    domains: tuple[str, ...]
    default_domains: ClassVar[tuple[str, ...]] = ()  # what one gets without asking; empty: all
    classes: tuple[str, ...]
    image: tuple[int, int, int]  # channels, height and width as they are stored
    crop: tuple[int, int] | None = None  # height and width that the network sees; None: all
    augment: ClassVar[str] = "none"  # what "default" means for these images
    superclasses: tuple[str, ...] = ()  # a second task, learned by a second head
    superclass: tuple[int, ...] = ()  # class -> superclass
    takes: ClassVar[str] = ""  # what follows the colon in `--data name:...`, e.g. FOLDER
    online: ClassVar[bool] = False  # `data prepare` sets it: what is not here may be fetched while looking
    stored_as: ClassVar[str] = ""  # the data set whose prepared images these are, if they are another's
    source: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    generated: ClassVar[Mapping[str, str]] = {}  # domain -> how its images were made, if they were
    counts: ClassVar[Mapping[str, int]] = {}  # domain -> images, as published
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {}  # domain -> its files, as published
    complete: ClassVar[tuple[Remote, ...]] = ()  # archives of all domains, which are taken if they are here

    class Params(Frozen):
        """What a user can ask for; a data set with more to ask subclasses this."""

        domains: tuple[str, ...] = Field((), description="the domains to use (empty: the data set's default)")
        limit: int | None = Field(None, ge=1, description="at most this many training images a domain, val included")
        val: float = Field(
            0.1, ge=0, le=0.5, description="share that validates, of what is no official test part; 0: none"
        )
        balance: bool = Field(False, description="as many training images of each class as the smallest class has")
        imbalance: float | None = Field(
            None, ge=1, description="make it long-tailed: the largest class over the smallest"
        )
        lt_list: Literal["ldam", "climbq"] = Field(
            "ldam", description="images of each class: ldam keeps every class; climbq truncates again and again"
        )

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        guard(cls, DataSet, _HOOKS)

    def __init__(
        self, params: Params | None = None, root: Path | None = None, downloads: Path | None = None, variant: str = ""
    ) -> None:
        self.params = params or self.Params.model_validate({})
        self.root, self.downloads, self.variant = root, downloads, variant
        self.unpacks = downloads is not None  # an archive, if only that is there
        if bool(variant) != bool(self.takes):
            form = f"{self.name}:{self.takes}" if self.takes else self.name
            raise UserError(f"data set {self.title!r} is written {form!r}")
        self.look()
        if (wrong := _wrong_facts(self)) is not None:
            raise UserError(f"data set {self.title!r}: {wrong}")
        for name in self.params.domains:
            if name not in self.domains:
                raise UserError(f"data set {self.title!r} has no domain {name!r}{nearest(name, self.domains)}")
        asked = self.params.domains or self.default_domains or self.domains
        self.selected = tuple(d for d in self.domains if d in asked)

    @property
    def title(self) -> str:
        """The name that splits and weights are drawn for; with what follows the colon, if anything does."""
        return f"{self.name}:{self.variant}" if self.variant else self.name

    def look(self) -> None:
        """Set what depends on the settings or on the files; called before the domains are checked."""

    def sources(self) -> Iterable[Path]:
        """The files and folders that `load` reads; none: it reads installed packages."""
        return ()

    def load(self) -> list[Domain]:
        """The domains named in `selected`, in that order."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A cheap string that changes when the sources do: names, sizes and times of the files."""
        return listing(self.sources(), times=True)

    def find(self, domain: str, *paths: str) -> Path:
        """Where a file or folder of a domain is: under the data root, among the downloads, or in an archive, which is unpacked.

        Args:
            domain: The domain.
            *paths: Where it may lie, relative to either; the usual place first.

        Raises:
            UserError: It is nowhere, or its archive is not as published.
        """
        found = self._here(paths)
        if not found and self.unpacks and self.downloads is not None:
            for remote in (*self.complete, *self.remotes.get(domain, ())):
                for archive in self.archives(remote) if remote.unpack else ():
                    verify(archive, remote)
                    extract(archive, self.downloads / str(remote.unpack))
            found = self._here(paths)
        if not found:
            raise self.missing(paths[0], domain)
        return found[0]

    def _here(self, paths: Iterable[str]) -> list[Path]:
        # Not Path.exists, which raises where a folder may not be searched.
        return [place / path for place in self.places for path in paths if os.path.exists(place / path)]

    def only(self, domain: str) -> DataSet:
        """The same data set with one domain."""
        params = self.params.model_copy(update={"domains": (domain,)})
        one = type(self)(params, self.root, self.downloads, self.variant)
        one.unpacks = self.unpacks
        return one

    @property
    def places(self) -> tuple[Path, ...]:
        """Where files are looked for."""
        return tuple(place for place in (self.root, self.downloads) if place is not None)

    def missing(self, path: str, domain: str) -> UserError:
        """What to say of a file or folder that is not there, and how to get it."""
        remotes = self.remotes.get(domain, ())
        fetch = (
            f"fetch it (qatbench data prepare {self.title} --set domains=[{domain}])"
            if any(r.urls for r in remotes)
            else ""
        )
        note = next((f" ({r.note})" for r in remotes if r.note), "")
        if self.root is None:
            ways = [fetch, "give --data-root DIR or set QATBENCH_DATA to the folder that holds it"]
            return UserError(f"{path} of data set {self.title!r} is not here: {', or '.join(filter(None, ways))}{note}")
        if not self.root.is_dir():
            what = "is not a directory" if self.root.exists() else "does not exist"
            return UserError(
                f"data root {self.root} {what}; give --data-root DIR or set QATBENCH_DATA to the folder that holds {path}"
            )
        leave = f"leave {domain!r} out of `domains`" if len(self.domains) > 1 else ""
        ways = [f"put the files of {domain!r} there", fetch, leave]
        return UserError(f"{self.root / path} is missing: {', or '.join(filter(None, ways))}{note}")

    def verify(self) -> None:
        """Hold every file that is here and whose hash or size was published against it.

        Raises:
            UserError: One is another file.
        """
        for domain in self.selected:
            for remote in self.remotes.get(domain, ()):
                for path in self.archives(remote):
                    verify(path, remote)

    def archives(self, remote: Remote) -> list[Path]:
        """The published file, where it is: at its own path, or simply in the data root."""
        names = dict.fromkeys((remote.path, Path(remote.path).name))
        return [place / name for place in self.places for name in names if (place / name).is_file()][:1]


@dataclass(frozen=True)
class Loaded:
    """A prepared data set: its images are mapped from disk, not copied; if they are too many for that, still encoded."""

    name: str
    domains: list[Domain]
    hash: str  # sha256 over pixels, labels, official splits and groups
    classes: tuple[str, ...]
    augment: str = "none"
    params: DataSet.Params = field(default_factory=lambda: DataSet.Params.model_validate({}))
    crop: tuple[int, int] | None = None
    superclasses: tuple[str, ...] = ()
    superclass: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)  # version, source, licence, citation, generated

    def __getitem__(self, domain: str) -> Domain:
        return next(d for d in self.domains if d.name == domain)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(d.name for d in self.domains)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the network sees."""
        height, width = self.domains[0].images.shape[2:]
        return self.crop or (height, width)

    @property
    def data_params(self) -> dict[str, Any]:
        """The settings in normal form: two ways to ask for the same are one."""
        values = self.params.model_dump(mode="json") | {"domains": list(self.names)}
        return values if self.params.imbalance is not None else values | {"lt_list": "ldam"}


def find_data(
    data: str | type[DataSet], params: Mapping[str, Any] | DataSet.Params | None, root: Path | None, cache: Path
) -> DataSet:
    """The data set of that name (`digits`, `imagefolder:pets`) with these settings; its images are not opened.

    Raises:
        UserError: The name or a setting is unknown or out of range.
    """
    cls, _, variant = (data, "", "") if isinstance(data, type) else _find(data)
    if not isinstance(params, DataSet.Params):
        params = validated(cls.Params, dict(params or {}), f"data_params of {cls.name}")
    return cls(params, Path(root) if root is not None else None, Path(cache) / "downloads", variant)


def _find(name: str) -> tuple[type[DataSet], str, str]:
    from .registry import find  # it imports the plugins, which import this module

    return find("datasets", name), *name.partition(":")[1:]


def open_data(
    data: str | type[DataSet], params: Mapping[str, Any] | DataSet.Params | None, root: Path | None, cache: Path
) -> Loaded:
    """Open a data set, preparing it in `cache` if that has not been done; of two processes one prepares and one waits."""
    from .prepared import prepare  # it needs Domain and DataSet

    dataset = find_data(data, params, root, cache)
    domains, digest, classes = prepare(dataset, Path(cache))
    about = {k: getattr(dataset, k) for k in ("version", "source", "licence", "citation")}
    about["generated"] = {d: how for d, how in dataset.generated.items() if d in dataset.selected}
    return Loaded(
        dataset.title, domains, digest, classes, dataset.augment, dataset.params, dataset.crop,
        dataset.superclasses, dataset.superclass, about,
    )  # fmt: skip


def walk(folder: Path, _above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, os.stat_result]]:
    """Every file under a folder, by its relative name, sorted; a file stands for itself.

    Raises:
        UserError: Something there may not be read, or a link leads back.
    """
    try:
        here = folder.stat()
        if not folder.is_dir():
            yield folder.name, here
            return
        identity = here.st_dev, here.st_ino
        if identity in _above:
            raise UserError(f"{folder} leads back to a folder that it lies in; remove that link")
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.is_dir():
                below = walk(Path(entry.path), _above | {identity})
                yield from ((f"{entry.name}/{path}", stat) for path, stat in below)
            else:
                yield entry.name, entry.stat()
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot read {where}: {error.strerror}; check permissions and links") from None


def listing(sources: Iterable[Path], times: bool) -> str:
    """Hash of the names and sizes of files, and of their times: then it also moves with a change that keeps the size."""
    digest = hashlib.sha256()
    for source in sources:
        for name, stat in walk(source):
            line = [source.name, name, stat.st_size, *([stat.st_mtime_ns] if times else [])]
            digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()
