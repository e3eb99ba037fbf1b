"""From files to arrays: what a data set plugin is, and how its images are prepared once and mapped into memory afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .errors import UserError, nearest
from .spec import Frozen, validated

FORMAT = 1  # of the prepared folder


@dataclass(frozen=True)
class Domain:
    """The images of one source."""

    name: str
    images: Tensor  # uint8 [N, C, H, W]; stored with the channels last
    labels: Tensor  # int64 [N]
    test: Tensor | None = None  # int64: the official test part, if there is one
    group: Tensor | None = None  # int64 [N]: images of one group, in any domain, stay in one part of the split


class DataSet:
    """A plugin: domains of labelled images of one size, read by `load` from `root` or from installed packages."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # goes up by hand when `load` gives other images
    domains: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    image: ClassVar[tuple[int, int, int]]
    augment: ClassVar[str] = "none"  # what "default" means for these images
    source: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    generated: ClassVar[Mapping[str, str]] = {}  # domain -> how its images were made, if they were

    class Params(Frozen):
        """What a user can ask for; a data set with more to ask subclasses this."""

        domains: tuple[str, ...] = Field((), description="the domains to use (empty: all)")
        limit: int | None = Field(None, ge=1, description="at most this many training images a domain, val included")

    def __init__(self, params: Params | None = None, root: Path | None = None) -> None:
        self.params = params or self.Params.model_validate({})
        self.root = root
        for name in self.params.domains:
            if name not in self.domains:
                raise UserError(f"data set {self.name!r} has no domain {name!r}{nearest(name, self.domains)}")
        self.selected = tuple(d for d in self.domains if d in self.params.domains or not self.params.domains)

    def fingerprint(self) -> str:
        """A cheap string that changes when the sources do."""
        raise NotImplementedError

    def load(self) -> list[Domain]:
        """The domains named in `selected`, in that order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Loaded:
    """A prepared data set: its images are mapped from disk, not copied."""

    name: str
    domains: list[Domain]
    hash: str  # sha256 over pixels, labels, official splits and groups
    classes: tuple[str, ...]
    augment: str = "none"
    limit: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # version, source, licence, citation, generated

    def __getitem__(self, domain: str) -> Domain:
        return next(d for d in self.domains if d.name == domain)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(d.name for d in self.domains)


def open_data(
    data: str | type[DataSet], params: Mapping[str, Any] | DataSet.Params | None, root: Path | None, cache: Path
) -> Loaded:
    """Open a data set, preparing it in `cache` if that has not been done; of two processes one prepares and one waits."""
    cls = _find(data) if isinstance(data, str) else data
    if not isinstance(params, DataSet.Params):
        params = validated(cls.Params, dict(params or {}), f"data set {cls.name!r}")
    dataset = cls(params, Path(root) if root is not None else None)
    asked = params.model_dump(mode="json", exclude={"limit", "domains"}) | {"domains": dataset.selected}
    key = _sha(json.dumps([FORMAT, cls.name, cls.version, asked, dataset.fingerprint()], sort_keys=True).encode())
    folder = Path(cache) / f"{cls.name}-{key[:16]}"
    prepared = _read(folder)  # without the lock, so that a finished cache may be read-only
    if prepared is None:
        prepared = _prepare(dataset, folder)
    domains, digest = prepared
    about = {k: getattr(cls, k) for k in ("version", "source", "licence", "citation")}
    about["generated"] = {d: how for d, how in cls.generated.items() if d in dataset.selected}
    return Loaded(cls.name, domains, digest, cls.classes, cls.augment, params.limit, about)


def _find(name: str) -> type[DataSet]:
    from .registry import find  # it imports the plugins, which import this module

    return find("datasets", name)


def _prepare(dataset: DataSet, folder: Path) -> tuple[list[Domain], str]:
    """Load and write `folder`, under a lock; whole or not at all."""
    mend = "free some space there or choose another store"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot prepare data in {folder.parent}: {error.strerror or error}; {mend}") from None
    unfinished = folder.with_suffix(".tmp")
    try:
        prepared = _read(folder)  # another process may have prepared it while this one waited
        if prepared is not None:
            return prepared
        domains = dataset.load()
        _check(dataset, domains)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # the lock is ours: its writer died
            _write(unfinished, domains, dataset.classes)
            shutil.rmtree(folder, ignore_errors=True)  # corrupt, else it had been read
            os.rename(unfinished, folder)
        except OSError as error:
            raise UserError(f"cannot write prepared data to {folder}: {error.strerror or error}; {mend}") from None
        prepared = _read(folder)
        if prepared is None:
            raise UserError(f"prepared data in {folder} cannot be read back; check that disk or choose another store")
        return prepared
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        lock.release()


def _check(dataset: DataSet, domains: list[Domain]) -> None:
    """Refuse what a plugin's `load` must not give."""
    where = f"data set {dataset.name!r}"
    if tuple(d.name for d in domains) != dataset.selected:
        raise UserError(f"{where}: load() gave domains {[d.name for d in domains]}, not {list(dataset.selected)}")
    for d in domains:
        n = len(d.labels)
        if d.images.dtype != torch.uint8 or tuple(d.images.shape) != (n, *dataset.image):
            raise UserError(
                f"{where}: images of {d.name!r} are {d.images.dtype} {tuple(d.images.shape)}; "
                f"load() must give uint8 {(n, *dataset.image)}"
            )
        if n == 0 or int(d.labels.min()) < 0 or int(d.labels.max()) >= len(dataset.classes):
            raise UserError(f"{where}: labels of {d.name!r} must be 0..{len(dataset.classes) - 1}, and at least one")
        if d.test is not None and (len(d.test) == 0 or int(d.test.min()) < 0 or int(d.test.max()) >= n):
            raise UserError(f"{where}: the test part of {d.name!r} must be indices 0..{n - 1}, and at least one")
        if d.group is not None and len(d.group) != n:
            raise UserError(f"{where}: {d.name!r} has {n} images but {len(d.group)} groups")


def _arrays(domain: Domain) -> dict[str, np.ndarray]:
    tensors = {
        "images": domain.images.permute(
            0, 2, 3, 1
        ),  # channels last: so the networks want them, and crops copy long rows
        "labels": domain.labels,
        "test": domain.test,
        "group": domain.group,
    }
    return {k: t.detach().cpu().contiguous().numpy() for k, t in tensors.items() if t is not None}


def _write(folder: Path, domains: list[Domain], classes: tuple[str, ...]) -> None:
    folder.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for domain in domains:
        for kind, array in _arrays(domain).items():
            path = folder / f"{domain.name}.{kind}.npy"
            with open(path, "wb") as out:  # not np.save: it can lose the error of a full disk
                np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
                out.write(array.data.cast("B"))
                out.flush()
                os.fsync(out.fileno())
            files[path.name] = {"sha256": _sha(array.data.cast("B")), **_stamp(path)}
    meta = {"format": FORMAT, "domains": [d.name for d in domains], "files": files, "hash": _hash(classes, files)}
    with open(folder / "meta.json", "w") as out:
        json.dump(meta, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def _read(folder: Path) -> tuple[list[Domain], str] | None:
    """The prepared domains and their hash; None if there are none, or if what is there is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        arrays = {name: _read_array(folder / name, stamp) for name, stamp in meta["files"].items()}
        domains = []
        for name in meta["domains"]:
            parts = {k: arrays.get(f"{name}.{k}.npy") for k in ("images", "labels", "test", "group")}
            tensors = {k: torch.from_numpy(a) for k, a in parts.items() if a is not None}
            tensors["images"] = tensors["images"].permute(0, 3, 1, 2)
            domains.append(Domain(name, **tensors))
        return domains, str(meta["hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _read_array(path: Path, stamp: dict[str, Any]) -> np.ndarray:
    # "c" maps as "r" does, but the array counts as writable (writes would stay in this process), as torch wants it.
    array = np.load(path, mmap_mode="c" if path.name.endswith(".images.npy") else None)
    untouched = _stamp(path) == {k: stamp[k] for k in ("size", "mtime_ns")}
    if not untouched and _sha(np.ascontiguousarray(array).data.cast("B")) != stamp["sha256"]:
        raise ValueError(f"{path} has changed since it was written")
    return array


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(classes: tuple[str, ...], files: dict[str, dict[str, Any]]) -> str:
    return _sha(json.dumps([list(classes), [[name, f["sha256"]] for name, f in files.items()]]).encode())
