"""What is here, what can be fetched, and whether it is what was published: with real files and a real HTTP server."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from pictures import write_classes
from qatbench.bench import registry
from qatbench.bench.catalogue import catalogue, check, fetch_missing
from qatbench.bench.data import find_data, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.fetch import Remote
from qatbench.bench.folders import Folders


class Pets(Folders):
    """Cats and dogs, indoors and outdoors."""

    name = "pets"
    domains = ("indoors", "outdoors")
    classes = ("cat", "dog")
    counts: ClassVar = {"indoors": 24, "outdoors": 24}
    folders: ClassVar = {d: (f"pets/{d}",) for d in domains}
    remotes: ClassVar = {}


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """Serves an archive of each domain; `Pets.remotes` has their addresses and hashes."""
    public = tmp_path / "public"
    public.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(public), **kwargs)

        def log_message(self, format: str, *args: object) -> None:
            pass

    remotes = {}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    for domain in Pets.domains:
        write_classes(tmp_path / "made" / domain, {"cat": 12, "dog": 12})
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.add(tmp_path / "made" / domain, arcname=".")
        (public / f"{domain}.tgz").write_bytes(packed.getvalue())
        url = f"http://127.0.0.1:{httpd.server_port}/{domain}.tgz"
        sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
        remotes[domain] = (Remote(f"pets/{domain}.tgz", (url,), sha256, unpack=f"pets/{domain}"),)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Pets.remotes = remotes
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture
def listed(monkeypatch):
    """What the catalogue says of `Pets`."""
    entry = registry.Plugin("pets", "datasets", "here", Pets)
    monkeypatch.setattr("qatbench.bench.catalogue.plugins", lambda kind: [entry])
    return lambda root, cache: catalogue(root, cache)[0]


def test_a_set_is_fetched_checked_unpacked_and_opened(server, listed, tmp_path):
    """Broken if `data prepare` fetches what is here, misses what is not, or leaves something that does not open."""
    cache = tmp_path / "cache"
    assert listed(None, cache).domains == dict.fromkeys(Pets.domains, "to fetch, untried")
    one = find_data(Pets, {"size": 8, "domains": ["outdoors"]}, None, cache)
    assert [path.name for path in fetch_missing(one, show=False)] == ["outdoors.tgz"]
    assert listed(None, cache).domains == {"indoors": "to fetch, untried", "outdoors": "here"}
    both = find_data(Pets, {"size": 8}, None, cache)
    assert [path.name for path in fetch_missing(both, show=False)] == ["indoors.tgz"]
    assert fetch_missing(both, show=False) == []
    loaded = open_data(Pets, {"size": 8}, None, cache)
    assert [len(d.labels) for d in loaded.domains] == [24, 24]
    assert not listed(None, cache).prepared, "with other settings than the default"


def test_files_go_to_a_data_root_that_may_be_written(server, tmp_path):
    """Broken if a user's data root stays empty, and everything is fetched again for the next store."""
    root = tmp_path / "root"
    root.mkdir()
    fetch_missing(find_data(Pets, {"size": 8}, root, tmp_path / "cache"), show=False)
    assert {p.name for p in (root / "pets").iterdir() if p.is_dir()} == set(Pets.domains)
    assert open_data(Pets, {"size": 8}, root, tmp_path / "cache").names == Pets.domains
    assert not (tmp_path / "cache" / "downloads").exists()


def test_an_archive_in_the_data_root_is_enough(server, listed, tmp_path):
    """Broken if a user must unpack what he has fetched by hand, or listing unpacks gigabytes."""
    root = tmp_path / "root"
    root.mkdir()
    for domain in Pets.domains:
        (root / f"{domain}.tgz").write_bytes((tmp_path / "public" / f"{domain}.tgz").read_bytes())
    cache = tmp_path / "cache"
    assert listed(root, cache).domains == dict.fromkeys(Pets.domains, "here")
    assert not cache.exists()
    assert open_data(Pets, {"size": 8}, root, cache).names == Pets.domains


def test_an_archive_that_is_not_the_published_one_is_refused(server, tmp_path):
    """Broken if other images than the published ones train under a published name."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "indoors.tgz").write_bytes((tmp_path / "public" / "outdoors.tgz").read_bytes())
    with pytest.raises(UserError, match=r"indoors\.tgz is not the file that was published"):
        open_data(Pets, {"size": 8, "domains": ["indoors"]}, root, tmp_path / "cache")


def test_what_cannot_be_had_is_one_line(server, tmp_path):
    """Broken if a dead address ends in a traceback, or leaves half a file that is taken for whole."""
    dead = dataclasses.replace(Pets.remotes["indoors"][0], urls=(f"{server}/nowhere.tgz",), note="ask the owner")
    Pets.remotes = {**Pets.remotes, "indoors": (dead,)}
    dataset = find_data(Pets, {"size": 8}, None, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^cannot fetch indoors\.tgz .*404.*ask the owner[^\n]*$"):
        fetch_missing(dataset, show=False)
    with pytest.raises(UserError, match=r"qatbench data prepare pets .*ask the owner"):
        open_data(Pets, {"size": 8}, None, tmp_path / "cache")


def test_check_tells_what_is_right_wrong_and_unknown(server, tmp_path, monkeypatch):
    """Broken if a damaged file passes, or one whose hash nobody published counts as checked."""
    monkeypatch.setattr("qatbench.bench.catalogue.find_data", lambda name, *rest: find_data(Pets, *rest))
    cache, params = tmp_path / "cache", {"size": 8}
    assert [right for right, _ in check("pets", params, None, cache)] == [False, False]
    fetch_missing(find_data(Pets, params, None, cache), show=False)
    open_data(Pets, params, None, cache)
    assert [right for right, _ in check("pets", params, None, cache)] == [True, True, True]
    (cache / "downloads/pets/indoors.tgz").write_bytes(b"damaged")
    images = next(cache.glob("pets-*/outdoors.images.npy"))
    raw = bytearray(images.read_bytes())
    raw[-1] ^= 1
    images.write_bytes(raw)
    found = list(check("pets", params, None, cache))
    assert [right for right, _ in found] == [False, True, False]
    assert "outdoors.images.npy has changed" in found[2][1]


def test_every_built_in_set_is_listed_without_touching_its_files(tmp_path):
    """Broken if one adapter's error hides the others, or listing asks for files that are not there."""
    entries = {e.name: e for e in catalogue(None, tmp_path)}
    assert {"digits", "imagenet", "imagefolder:FOLDER", "hf:OWNER/NAME"} <= set(entries)
    assert all(e.error is None for e in entries.values())
    assert set((entries["optdigits"].domains or {}).values()) == {"made"}
    assert entries["pacs"].domains is not None
    assert set(entries["pacs"].domains.values()) == {"by hand"}
    assert entries["digits"].images == 746_587
    assert not list(Path(tmp_path).iterdir())
