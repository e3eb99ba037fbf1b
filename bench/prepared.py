"""The prepared folder of a data set: images decoded once, as uint8 arrays that every process maps; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from .dataset import DataSet, Domain, listing
from .disk import Damaged, clear_temporaries, file_digest, read_json, sync_folder, temporary_name, write_json
from .errors import UserError
from .images import Encoded, refuse_dark

FORMAT = 3  # of the folder
CHUNK = 64  # images decoded between two writes
DECODED_GB = "QATBENCH_DECODED_GB"  # encoded sets that are larger once decoded are streamed
log = logging.getLogger("qatbench")
_KINDS = ("images", "labels", "test", "group")

Prepared = tuple[list[Domain], str, tuple[str, ...]]
"""Domains, the hash of their content, the names of the classes."""


def prepare(dataset: DataSet, cache: Path) -> Prepared:
    """The domains of a data set, from its prepared folder, which is made if it is not there.

    Raises:
        UserError: The files are not what they should be, or the folder cannot be written.
    """
    folder = prepared_folder(dataset, cache)
    try:
        prepared = _read(folder, dataset)  # without the lock, so that a finished cache may be read-only
    except Damaged:
        prepared = None  # it may be in the making: looked at again under the lock
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
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes <= 1e9:
        raise UserError(f"{DECODED_GB}={text!r} is not a number of gigabytes, e.g. 16")
    return int(gigabytes * 1e9)


def _prepare(dataset: DataSet, folder: Path) -> Prepared:
    """Load and write `folder`, under a lock; whole or not at all."""
    mend = "free some space there or choose another store"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot prepare data in {folder.parent}: {error.strerror or error}; {mend}") from None
    unfinished = temporary_name(folder)
    try:
        try:
            prepared = _read(folder, dataset)  # another process may have prepared it while this one waited
            if prepared is not None:
                return prepared
        except Damaged as bad:
            log.warning("%s; the data is prepared again", bad)
        dataset.verify()
        domains = dataset.load()
        _check(dataset, domains)
        refuse_dark([d.images for d in domains if isinstance(d.images, Encoded)], dataset.title)
        try:
            clear_temporaries(folder.parent, of=folder.name)
            _write(unfinished, domains, dataset)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, else it had been read
            os.rename(unfinished, folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise UserError(f"cannot write prepared data to {folder}: {error.strerror or error}; {mend}") from None
        try:
            prepared = _read(folder, dataset)
        except Damaged as bad:
            raise UserError(f"{bad}, right after it was written; check that disk or choose another store") from None
        assert prepared is not None
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
            files[path.name] = {"sha256": sha, "file": file_digest(path)}
    # The pixels of what is streamed are never all seen: the names and sizes of the files stand for them.
    streamed = listing(dataset.sources(), times=False) if streams else None
    meta = {
        "format": FORMAT,
        "data": dataset.title,
        "domains": [d.name for d in domains],
        "classes": list(dataset.classes),
        "files": files,
        "streamed": streamed,
        "hash": _hash(dataset.classes, files, streamed),
    }
    write_json(folder / "meta.json", meta)


def _hash(classes: Iterable[str], files: dict[str, dict[str, Any]], streamed: str | None) -> str:
    """What stands for the data in a run's id: class names, and the content of every array."""
    content = [[name, f["sha256"]] for name, f in files.items()]
    return _sha(json.dumps([list(classes), [*content, *([["encoded", streamed]] if streamed else [])]]).encode())


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
    """The prepared domains; None if there are none.

    Raises:
        Damaged: What is there is not what was written; the message names the file.
    """
    if not folder.exists():
        return None
    meta = _read_meta(folder)
    arrays = {name: _read_array(folder / name, stamp["file"]) for name, stamp in meta["files"].items()}
    parts = {d: {k: arrays.get(f"{d}.{k}.npy") for k in _KINDS} for d in meta["domains"]}
    streamed = {d.name: d.images for d in dataset.load()} if meta["streamed"] else {}
    domains = []
    for d, arrays_of in parts.items():
        tensors: dict[str, Any] = {k: torch.from_numpy(a) for k, a in arrays_of.items() if a is not None}
        tensors["images"] = tensors["images"].permute(0, 3, 1, 2) if "images" in tensors else streamed[d]
        domains.append(Domain(d, **tensors))
    return domains, meta["hash"], tuple(meta["classes"])


def _read_meta(folder: Path) -> dict[str, Any]:
    """The folder's description."""
    path = folder / "meta.json"
    try:
        meta = read_json(path)
        if meta["hash"] != _hash(meta["classes"], meta["files"], meta["streamed"]):
            raise Damaged("does not fit its own hash")
        meta["domains"] = [str(name) for name in meta["domains"]]
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Damaged as bad:
        raise Damaged(f"{path} {bad}") from None
    except (KeyError, TypeError, AttributeError):
        raise Damaged(f"{path} is no description of prepared data") from None
    return meta


def _read_array(path: Path, digest: str, again: bool = False) -> np.ndarray:
    try:
        if file_digest(path, again) != digest:
            raise Damaged(f"{path} has changed since it was written")
        # "c" maps as "r" does, but the array counts as writable (writes would stay in this process), as torch wants it.
        return np.load(path, mmap_mode="c" if path.name.endswith(".images.npy") else None)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
        raise Damaged(f"{path} {reason}") from None
    except (ValueError, EOFError):
        raise Damaged(f"{path} is no array") from None


def check_prepared(folder: Path) -> str | None:
    """What is wrong with a prepared folder, reading every byte of it; None if nothing is."""
    try:
        for name, stamp in _read_meta(folder)["files"].items():
            _read_array(folder / name, stamp["file"], again=True)
    except Damaged as bad:
        return str(bad).removeprefix(f"{folder}{os.sep}")
    return None


def _sha(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
