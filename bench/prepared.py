"""The prepared folder of a data set: images decoded once, as uint8 arrays that every process maps; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from .dataset import DataSet, Domain, listing
from .errors import UserError
from .images import Encoded

FORMAT = 2  # of the folder
CHUNK = 64  # images decoded between two writes
DECODED_GB = "QATBENCH_DECODED_GB"  # encoded sets that are larger once decoded are streamed
_KINDS = ("images", "labels", "test", "group")

Prepared = tuple[list[Domain], str, tuple[str, ...]]
"""Domains, the hash of their content, the names of the classes."""


def prepare(dataset: DataSet, cache: Path) -> Prepared:
    """The domains of a data set, from its prepared folder, which is made if it is not there.

    Raises:
        UserError: The files are not what they should be, or the folder cannot be written.
    """
    folder = prepared_folder(dataset, cache)
    prepared = _read(folder, dataset)  # without the lock, so that a finished cache may be read-only
    return prepared if prepared is not None else _prepare(dataset, folder)


def prepared_folder(dataset: DataSet, cache: Path) -> Path:
    """Where the images are, or will be: one folder for everything that settles them."""
    stem = dataset.stored_as or dataset.name
    asked = dataset.params.model_dump(mode="json", exclude=set(DataSet.Params.model_fields))
    settled = [FORMAT, stem, dataset.variant, dataset.version, asked, dataset.selected, budget(), dataset.fingerprint()]
    return cache / f"{stem}-{_sha(json.dumps(settled, sort_keys=True).encode())[:16]}"


def budget() -> int:
    """Bytes up to which an encoded data set is decoded into one array on disk."""
    text = os.environ.get(DECODED_GB, "16")
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise UserError(f"{DECODED_GB}={text!r} is not a number of gigabytes, e.g. 16") from None


def _prepare(dataset: DataSet, folder: Path) -> Prepared:
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
        prepared = _read(folder, dataset)  # another process may have prepared it while this one waited
        if prepared is not None:
            return prepared
        dataset.verify()
        domains = dataset.load()
        _check(dataset, domains)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # the lock is ours: its writer died
            _write(unfinished, domains, dataset)
            shutil.rmtree(folder, ignore_errors=True)  # corrupt, else it had been read
            os.rename(unfinished, folder)
        except OSError as error:
            raise UserError(f"cannot write prepared data to {folder}: {error.strerror or error}; {mend}") from None
        prepared = _read(folder, dataset)
        if prepared is None:
            raise UserError(f"prepared data in {folder} cannot be read back; check that disk or choose another store")
        return prepared
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        lock.release()


def _check(dataset: DataSet, domains: list[Domain]) -> None:
    """Refuse what a plugin's `load` must not give."""
    where = f"data set {dataset.title!r}"
    if tuple(d.name for d in domains) != dataset.selected:
        raise UserError(f"{where}: load() gave domains {[d.name for d in domains]}, not {list(dataset.selected)}")
    for d in domains:
        n = len(d.labels)
        kind = torch.uint8 if isinstance(d.images, Encoded) else d.images.dtype  # that is what they are decoded to
        if kind != torch.uint8 or tuple(d.images.shape) != (n, *dataset.image):
            raise UserError(
                f"{where}: images of {d.name!r} are {kind} {tuple(d.images.shape)}; load() must give uint8 {(n, *dataset.image)}"
            )
        if d.labels.dtype != torch.int64 or (d.group is not None and d.group.dtype != torch.int64):
            raise UserError(f"{where}: labels and groups of {d.name!r} must be int64")
        if n == 0 or int(d.labels.min()) < 0 or int(d.labels.max()) >= len(dataset.classes):
            raise UserError(f"{where}: labels of {d.name!r} must be 0..{len(dataset.classes) - 1}, and at least one")
        if d.test is not None and (len(d.test) == 0 or int(d.test.min()) < 0 or int(d.test.max()) >= n):
            raise UserError(f"{where}: the test part of {d.name!r} must be indices 0..{n - 1}, and at least one")
        if d.test is not None and not torch.equal(d.test, d.test.unique()):
            raise UserError(f"{where}: the test part of {d.name!r} must be int64, sorted, and name no image twice")
        if d.group is not None and len(d.group) != n:
            raise UserError(f"{where}: {d.name!r} has {n} images but {len(d.group)} groups")


def _write(folder: Path, domains: list[Domain], dataset: DataSet) -> None:
    folder.mkdir()
    encoded = sum(d.images.nbytes for d in domains if isinstance(d.images, Encoded))
    streams = encoded > budget()
    files: dict[str, dict[str, Any]] = {}
    for domain in domains:
        for kind in _KINDS:
            value = getattr(domain, kind)
            if value is None or (streams and isinstance(value, Encoded)):
                continue
            path = folder / f"{domain.name}.{kind}.npy"
            sha = _write_encoded(path, value) if isinstance(value, Encoded) else _write_array(path, _array(value, kind))
            files[path.name] = {"sha256": sha, **_stamp(path)}
    content = [[name, f["sha256"]] for name, f in files.items()]
    if streams:  # their pixels are never all seen: the names and sizes of the files stand for them
        content.append(["encoded", listing(dataset.sources(), times=False)])
    digest = _sha(json.dumps([list(dataset.classes), content]).encode())
    meta = {
        "format": FORMAT,
        "data": dataset.title,
        "domains": [d.name for d in domains],
        "classes": list(dataset.classes),
        "files": files,
        "hash": digest,
    }
    with open(folder / "meta.json", "w") as out:
        json.dump(meta, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def _array(value: Tensor, kind: str) -> np.ndarray:
    # Channels last: so the networks want them, and crops copy long rows.
    tensor = value.permute(0, 2, 3, 1) if kind == "images" else value
    return tensor.detach().cpu().contiguous().numpy()


def _write_array(path: Path, array: np.ndarray) -> str:
    with open(path, "wb") as out:  # not np.save: it can lose the error of a full disk
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
        out.write(array.data.cast("B"))
        out.flush()
        os.fsync(out.fileno())
    return _sha(array.data.cast("B"))


def _write_encoded(path: Path, images: Encoded) -> str:
    """Decode and write a few images at a time: not through a map, in which a full disk kills the process."""
    n, channels, height, width = images.shape
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, n, CHUNK):
            part = np.empty((min(CHUNK, n - start), height, width, channels), np.uint8)
            images.decode_into(part, start)
            digest.update(part.data.cast("B"))
            out.write(part.data.cast("B"))
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _read(folder: Path, dataset: DataSet) -> Prepared | None:
    """The prepared domains; None if there are none, or if what is there is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        arrays = {name: _read_array(folder / name, stamp) for name, stamp in meta["files"].items()}
        names, digest, classes = list(meta["domains"]), str(meta["hash"]), tuple(meta["classes"])
        parts = {d: {k: arrays.get(f"{d}.{k}.npy") for k in _KINDS} for d in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    streamed = {d.name: d.images for d in dataset.load()} if any(parts[d]["images"] is None for d in names) else {}
    domains = []
    for d in names:
        tensors: dict[str, Any] = {k: torch.from_numpy(a) for k, a in parts[d].items() if a is not None}
        tensors["images"] = tensors["images"].permute(0, 3, 1, 2) if "images" in tensors else streamed[d]
        domains.append(Domain(d, **tensors))
    return domains, digest, classes


def _read_array(path: Path, stamp: dict[str, Any]) -> np.ndarray:
    # "c" maps as "r" does, but the array counts as writable (writes would stay in this process), as torch wants it.
    array = np.load(path, mmap_mode="c" if path.name.endswith(".images.npy") else None)
    untouched = _stamp(path) == {k: stamp[k] for k in ("size", "mtime_ns")}
    if not untouched and _sha(np.ascontiguousarray(array).data.cast("B")) != stamp["sha256"]:
        raise ValueError(f"{path} has changed since it was written")
    return array


def check_prepared(folder: Path) -> str | None:
    """What is wrong with a prepared folder, reading every byte of it; None if nothing is."""
    try:
        files = json.loads((folder / "meta.json").read_bytes())["files"]
        for name, stamp in files.items():
            array = np.load(folder / name, mmap_mode="r")
            if _sha(np.ascontiguousarray(array).data.cast("B")) != stamp["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        return f"cannot be read ({' '.join(str(error).split())[:100]})"
    return None


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
