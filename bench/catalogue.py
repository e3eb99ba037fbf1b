"""What data sets there are, which of their files are here, and how the rest is fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .archive import extract
from .dataset import DataSet, find_data
from .errors import RunFailed, UserError
from .fetch import fetch, verify
from .prepared import check_prepared, prepared_folder
from .registry import plugins


@dataclass(frozen=True)
class Entry:
    """One data set, and where it stands here.

    Attributes:
        name: As on the command line, e.g. ``digits`` or ``imagefolder:FOLDER``.
        what: Its docstring's first line.
        images: As published, of all domains; None if that is not known beforehand.
        domains: Domain -> ``here``, ``to fetch`` (``untried``: from an address that nobody tried where it was written down),
            ``by hand`` (it has to be asked for) or ``made`` (from installed packages).
        prepared: Whether its images, with default settings, are decoded and mapped already.
        error: Why it is unavailable.
    """

    name: str
    what: str
    images: int | None = None
    domains: dict[str, str] | None = None
    prepared: bool = False
    error: str | None = None


def catalogue(root: Path | None, cache: Path) -> list[Entry]:
    """Every data set that is known."""
    return [_entry(plugin.name, plugin.cls, plugin.error, root, cache) for plugin in plugins("datasets")]


def _entry(name: str, cls: type[DataSet] | None, error: str | None, root: Path | None, cache: Path) -> Entry:
    if cls is None:
        return Entry(name, "", error=error)
    what = (cls.__doc__ or "").strip().split("\n")[0]
    if cls.takes:
        return Entry(f"{name}:{cls.takes}", what)
    try:
        dataset = find_data(cls, {}, root, cache)
        dataset.unpacks = False  # looking costs nothing
        states = {d: _state(dataset, d) for d in dataset.domains}
    except (UserError, RunFailed) as wrong:  # a plugin; the others are listed
        return Entry(name, what, error=str(wrong))
    try:
        prepared = (prepared_folder(dataset, cache) / "meta.json").exists()
    except UserError:
        prepared = False
    return Entry(name, what, sum(cls.counts.values()) or None, states, prepared)


def _state(dataset: DataSet, domain: str) -> str:
    remotes = dataset.remotes.get(domain, ())
    if remotes and all(dataset.archives(remote) for remote in remotes):
        return "here"
    if _has(dataset, domain):
        return "here" if list(dataset.only(domain).sources()) else "made"
    if not remotes or not all(r.urls for r in remotes):
        return "by hand"
    return "to fetch" if all(r.tried for r in remotes) else "to fetch, untried"


def _has(dataset: DataSet, domain: str) -> bool:
    """Whether the files of a domain are here."""
    try:
        list(dataset.only(domain).sources())
    except UserError:
        return False
    return True


def fetch_missing(dataset: DataSet, show: bool = True) -> list[Path]:
    """Fetch what is missing of the domains asked for, into the data root if it can be written, else among the downloads.

    Raises:
        UserError: There is no address, none of them answers, or what came is not what was published.
    """
    assert dataset.downloads is not None
    writable = dataset.root is not None and dataset.root.is_dir() and os.access(dataset.root, os.W_OK)
    place = dataset.root if writable and dataset.root is not None else dataset.downloads
    fetched = []
    for domain in dataset.selected:
        if _has(dataset, domain):
            continue
        for remote in dataset.remotes.get(domain, ()):
            if any((p / remote.path).exists() for p in dataset.places):
                continue
            path = fetch(remote, place, show=show)
            if remote.unpack:
                extract(path, place / remote.unpack)
            fetched.append(path)
    return fetched


def check(name: str, params: dict, root: Path | None, cache: Path) -> Iterator[tuple[bool | None, str]]:
    """Hold the files of a data set against what was published, and its prepared images against their own hashes.

    Yields:
        (right, wrong or None: nothing to hold it against; what was looked at).
    """
    dataset = find_data(name, params, root, cache)
    for domain in dataset.selected:
        if not _has(dataset, domain):
            yield False, f"{domain}: not here"
            continue
        found = False
        for remote in dataset.remotes.get(domain, ()):
            for path in dataset.archives(remote):
                found = True
                if not (remote.hashes or remote.accept or remote.size):
                    yield None, f"{path}: no hash was published"
                    continue
                try:
                    verify(path, remote)
                    yield True, str(path)
                except UserError as error:
                    yield False, str(error)
        if not found:
            yield None, f"{domain}: files without a published hash"
    for folder in _folders(dataset, cache):
        wrong = check_prepared(folder)
        yield not wrong, f"{folder}: {wrong}; delete that folder, it is made again" if wrong else f"{folder} (prepared)"


def _folders(dataset: DataSet, cache: Path) -> list[Path]:
    stem = dataset.stored_as or dataset.name
    found = []
    for meta in sorted(cache.glob(f"{stem}-*/meta.json")):
        try:
            if json.loads(meta.read_bytes()).get("data") == dataset.title:
                found.append(meta.parent)
        except (OSError, ValueError, AttributeError):
            found.append(meta.parent)
    return found
