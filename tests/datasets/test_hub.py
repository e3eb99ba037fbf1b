"""`hf:OWNER/NAME`, on Parquet files as the hub and the `datasets` library write them, and on the real CIFAR-10 subset."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.dataset import Loaded, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.splits import make_splits
from qatbench.bench.testing import DatasetContract

import datasets

REAL = Path(os.environ.get("QATBENCH_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
PETS, KINDS = ("cat", "dog", "fish"), ("photo", "pen drawing")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    """The user's own cache is not looked at."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def jpeg(i: int, size: tuple[int, int] = (20, 14)) -> bytes:
    """A small picture; no two are the same."""
    pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def table(numbers: range, **columns: Any) -> datasets.Dataset:
    """Rows with an image each; a column is a pair: values, and the type of the column."""
    content = {"image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in numbers]}
    features = {"image": datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}}
    return datasets.Dataset.from_dict(
        {**content, **{name: list(values) for name, (values, _) in columns.items()}},
        features=datasets.Features(features),
    )


def pets(numbers: range) -> datasets.Dataset:
    """Three classes and two domains, in turn."""
    kinds = [KINDS[i // 3 % 2] for i in numbers]
    labels = [i % 3 for i in numbers]
    return table(numbers, label=(labels, datasets.ClassLabel(names=list(PETS))), kind=(kinds, datasets.Value("string")))


def write_pets(folder: Path, train: int = 36, test: int = 12) -> None:
    """Two shards of training images and one of test images, in the hub's layout."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pets(range(train // 2)).to_parquet(folder / "data/train-00000-of-00002.parquet")
    pets(range(train // 2, train)).to_parquet(folder / "data/train-00001-of-00002.parquet")
    pets(range(train, train + test)).to_parquet(folder / "data/test-00000-of-00001-0a1b2c3d.parquet")


class TestHub(DatasetContract):
    dataset = "hf:me/pets"
    params: ClassVar = {"size": 14, "domain": "kind"}
    classes_of: ClassVar = {"pen_drawing": [8, 8, 8], "photo": [8, 8, 8]}

    def write(self, root: Path) -> None:
        write_pets(root / "me/pets")

    def spoil(self, root: Path) -> Path:
        path = root / "me/pets/data/train-00001-of-00002.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    (root / "me/pets").mkdir(parents=True)
    return root / "me/pets"


def opened(root: Path | None, where: Path, name: str = "hf:me/pets", **params) -> Loaded:
    return open_data(name, {"size": 8, **params}, root, where)


def refused(root: Path | None, where: Path, name: str = "hf:me/pets", **params) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, where, name, **params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_domains_classes_and_test_part(root, tmp_path):
    """Broken if an image gets another's label or domain, or a test image trains."""
    write_pets(root / "me/pets")
    loaded = opened(root, tmp_path / "c", size=14, margin=False, domain="kind")
    assert (loaded.names, loaded.classes) == (("pen_drawing", "photo"), PETS)
    for d, domain in enumerate(loaded.domains):
        numbers = [i for i in range(48) if i // 3 % 2 == 1 - d]
        assert domain.labels.tolist() == [i % 3 for i in numbers]
        assert [numbers[i] for i in domain.test.tolist()] == [i for i in numbers if i >= 36]
        for i, image in zip(numbers, domain.images, strict=True):
            whole = Image.open(io.BytesIO(jpeg(i))).resize((14, 14), Image.Resampling.BILINEAR)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(whole))
        assert torch.equal(make_splits(loaded, 0)[domain.name].test, domain.test)


def test_size_margin_and_fit(root, tmp_path):
    """Broken if crops cannot move, or the proportions are lost although they were to be kept."""
    write_pets(root / "me/pets")
    wide = opened(root, tmp_path / "c", size=14)
    exact = opened(root, tmp_path / "c", size=14, margin=False)
    centre = opened(root, tmp_path / "c", size=14, margin=False, fit="centre")
    assert (wide.domains[0].images.shape[2:], wide.size) == ((16, 16), (14, 14))
    assert (exact.domains[0].images.shape[2:], exact.size) == ((14, 14), (14, 14))
    middle = np.asarray(Image.open(io.BytesIO(jpeg(0))))[:, 3:17]
    assert np.array_equal(centre.domains[0].images[0].permute(1, 2, 0).numpy(), middle)


@pytest.mark.parametrize(
    ("values", "kind", "classes", "labels"),
    [
        (["b", "a", "b", "c"], datasets.Value("string"), ("a", "b", "c"), [1, 0, 1, 2]),
        ([30, 7, 30, 101], datasets.Value("int32"), ("7", "30", "101"), [1, 0, 1, 2]),
        ([True, False, True, True], datasets.Value("bool"), ("false", "true"), [1, 0, 1, 1]),
        ([1, 0, 1, 1], datasets.ClassLabel(names=["x", "y", "z"]), ("x", "y", "z"), [1, 0, 1, 1]),
    ],
)
def test_kinds_of_labels(folder, root, tmp_path, values, kind, classes, labels):
    """Broken if names, numbers that skip some, or names that no row has are counted in another way."""
    table(range(24), label=(values * 6, kind)).to_parquet(folder / "train.parquet")
    loaded = opened(root, tmp_path / "c")
    assert loaded.classes == classes
    assert loaded.names == ("pets",)
    assert loaded.domains[0].labels.tolist() == labels * 6
    assert loaded.domains[0].test is None


def test_file_without_metadata(folder, root, tmp_path):
    """Broken if only files that the `datasets` library wrote are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = pa.table({"picture": pa.array([jpeg(i) for i in range(12)], pa.binary()), "label": [0, 1] * 6})
    pq.write_table(plain, folder / "train.parquet", row_group_size=5)
    loaded = opened(root, tmp_path / "c", margin=False)
    assert loaded.classes == ("0", "1")
    assert len(loaded.domains[0].images.flatten(1).unique(dim=0)) == 12


def test_configurations(folder, root, tmp_path):
    """Broken if one configuration is taken for another, or the hub's own conversions are not read."""
    for config, start in (("small", 0), ("large", 24)):
        for split in ("train", "test"):
            (folder / config / split).mkdir(parents=True)
            pets(range(start, start + 24)).to_parquet(folder / config / split / "0000.parquet")
    assert "large, small" in refused(root, tmp_path / "c")
    assert "did you mean 'small'" in refused(root, tmp_path / "c", config="smal")
    small, large = (opened(root, tmp_path / "c", config=c) for c in ("small", "large"))
    assert len(small.domains[0].labels) == len(large.domains[0].labels) == 48
    assert small.hash != large.hash


def test_images_stay_on_disk(root, tmp_path, monkeypatch):
    """Broken if every process that decodes gets a copy of all files, or other images than when they are decoded at once."""
    write_pets(root / "me/pets", 600, 200)
    decoded = opened(root, tmp_path / "c")
    monkeypatch.setenv("QATBENCH_DECODED_GB", "0")
    images = opened(root, tmp_path / "c").domains[0].images
    size = sum(len(jpeg(i)) for i in range(800))
    packed = pickle.dumps(images)
    assert len(packed) < size / 10
    again = pickle.loads(packed)
    for i in (0, 599, 600, 799):
        assert np.array_equal(again[i], decoded.domains[0].images[i].permute(1, 2, 0).numpy())


def test_wrong_requests_are_told(root, tmp_path):
    """Broken if a user of a set with unusual columns gets a traceback, or is not told what there is."""
    write_pets(root / "me/pets")
    where = tmp_path / "c"
    assert "hf:OWNER/NAME" in refused(root, where, "hf:a/b/c")
    assert "hf:OWNER/NAME" in refused(root, where, "hf:../pets")
    assert "qatbench data prepare hf:me/dogs" in refused(root, where, "hf:me/dogs")
    assert "--data-root" in refused(None, where)
    assert "test, train" in refused(root, where, split="trian")
    assert "test, train" in refused(root, where, test_split="validation")
    assert "both 'test'" in refused(root, where, split="test")
    assert "image, label, kind" in refused(root, where, image="img")
    assert "not encoded images" in refused(root, where, image="label")
    assert "label, kind" in refused(root, where, label="class")
    assert "holds struct" in refused(root, where, label="image")
    assert "did you mean 'kind'" in refused(root, where, domain="kinds")


def test_files_that_do_not_fit_are_told(folder, root, tmp_path):
    """Broken if a set without images or classes, or with shards of two kinds, is trained on or gives a traceback."""
    where, named = tmp_path / "c", datasets.ClassLabel(names=["x", "y"])
    path = folder / "train-00000-of-00002.parquet"
    other = folder / "train-00001-of-00002.parquet"
    table(range(12), label=([0, 1] * 6, named)).to_parquet(path)
    assert f"{other} is missing" in refused(root, where)
    table(range(12), label=(["x", "y"] * 6, datasets.Value("string"))).to_parquet(other)
    assert f"of {other} is of another type" in refused(root, where)
    table(range(12), label=([0, 1] * 6, datasets.ClassLabel(names=["y", "x"]))).to_parquet(other)
    assert f"of {other} counts other classes" in refused(root, where)
    table(range(12), kind=([0, 1] * 6, named)).to_parquet(other)
    assert f"{other} has no column 'label'" in refused(root, where)
    other.unlink()
    path.unlink()
    only = folder / "train.parquet"
    table(range(12), age=([0.5, 1.0] * 6, datasets.Value("float32"))).to_parquet(only)
    assert "set label to one of age" in refused(root, where)
    assert "holds float" in refused(root, where, label="age")
    table(range(12), a=([0, 1] * 6, named), b=([0, 1] * 6, named)).to_parquet(only)
    assert "set label to one of a, b" in refused(root, where)
    arrays = {"image": np.zeros((4, 8, 8), np.uint8).tolist(), "label": [0, 1] * 2}
    datasets.Dataset.from_dict(arrays).to_parquet(only)
    assert "no column of encoded images" in refused(root, where)
    assert "not encoded images" in refused(root, where, image="image")


def test_hidden_and_wrong_labels_are_told(folder, root, tmp_path):
    """Broken if a test part whose labels are kept back counts as wrong answers, or a wrong label as a class."""
    where, named = tmp_path / "c", datasets.ClassLabel(names=["x", "y"])
    table(range(12), label=([0, 1] * 6, named)).to_parquet(folder / "train.parquet")
    for hidden, kind in (([-1] * 6, named), ([None] * 6, named)):
        table(range(6), label=(hidden, kind)).to_parquet(folder / "test.parquet")
        text = refused(root, where)
        assert "split 'test'" in text
        assert "test_split" in text
    assert opened(root, where, test_split=None).domains[0].test is None
    table(range(6), label=([0, 1, 0, -1, 1, 0], named)).to_parquet(folder / "test.parquet")
    assert f"{folder / 'test.parquet'}, row 3: label -1" in refused(root, where)
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "test.parquet")
    column = rows.schema.get_field_index("label")
    pq.write_table(rows.set_column(column, rows.schema.field(column), [[0, 1, 0, 0, 2, 0]]), folder / "test.parquet")
    assert f"{folder / 'test.parquet'}, row 4: label 2 is not one of 0..1" in refused(root, where)


def test_minus_one_as_a_class_is_told(folder, root, tmp_path):
    """Broken if labels -1, 0, 1 were told to be "not one of 0..1": one is not led to what to change."""
    rows = table(range(30), label=([-1, 0, 1] * 10, datasets.Value("int64")))
    rows.to_parquet(folder / "train.parquet")
    text = refused(root, tmp_path / "c")
    assert f"{folder / 'train.parquet'}, row 0: label -1 or none, as in 10 of 30 rows" in text
    assert "number the classes from 0" in text


def with_metadata(path: Path, change: Callable[[dict], None]) -> None:
    """The same file, with other words of the library about its columns."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path)
    about = json.loads(rows.schema.metadata[b"huggingface"])
    change(about["info"]["features"])
    pq.write_table(rows.replace_schema_metadata({b"huggingface": json.dumps(about).encode()}), path)


def test_metadata_that_cannot_be_used_is_told(folder, root, tmp_path):
    """Broken if a name that stands twice in the metadata were answered by "free some space"."""
    where, file = tmp_path / "c", folder / "train.parquet"
    table(range(12), label=([0, 1, 2] * 4, datasets.ClassLabel(names=["a", "b", "c"]))).to_parquet(file)
    with_metadata(file, lambda features: features["label"].update(names=["a", "a", "c"]))
    assert f"class name 'a' stands twice in the metadata of column 'label' of {file}" in refused(root, where)
    with_metadata(file, lambda features: features["label"].update(names=["a", "b", "c"]))
    with_metadata(file, lambda features: features.update(image={"_type": "Hologram"}))
    text = refused(root, where)
    assert str(file) in text
    assert "free some space" not in text


def test_bad_image_is_named_by_file_and_row(folder, root, tmp_path):
    """Broken if a user does not learn which image of which shard is damaged, or lacks its bytes."""
    write_pets(folder)
    path = folder / "data/train-00001-of-00002.parquet"
    rows = pets(range(18, 36)).cast_column("image", datasets.Image(decode=False))
    for content in (b"no image", None):
        changed = rows.to_list()
        changed[11]["image"] = {"bytes": content, "path": __file__}
        datasets.Dataset.from_list(changed, features=rows.features).to_parquet(path)
        assert f"{path}, row 11 " in refused(root, tmp_path / "c")


def test_cache_of_the_libraries(tmp_path, monkeypatch):
    """Broken if a set that the Hugging Face libraries have fetched has to be fetched again."""
    hub = tmp_path / "hub/datasets--me--pets"
    write_pets(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("a" * 40)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    assert len(opened(None, tmp_path / "c").domains[0].labels) == 48


class _FakeHub(http.server.BaseHTTPRequestHandler):
    """What of the hub's interface a download needs; `files`: path -> content."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    sha = "b" * 40

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/me/pets/tree/"):
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in self.files.items()
            ]
            return self.answer(json.dumps(entries).encode(), "application/json")
        if path.startswith("/api/datasets/me/pets"):
            siblings = [{"rfilename": p} for p in self.files]
            info = {"id": "me/pets", "sha": self.sha, "siblings": siblings, "tags": [], "private": False}
            return self.answer(json.dumps(info).encode(), "application/json")
        name = path.removeprefix(f"/datasets/me/pets/resolve/{self.sha}/")
        if name in self.files:
            return self.answer(self.files[name], "application/octet-stream")
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        for key, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("ETag", f'"{hashlib.sha1(content).hexdigest()}"'),
            ("X-Repo-Commit", self.sha),
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


STEPS = """
import sys, urllib.request
from pathlib import Path
from qatbench.bench.dataset import open_data
from qatbench.bench.errors import UserError
from qatbench.bench.registry import find
for i, (name, online) in enumerate([("pets", False), ("pets", True), ("dogs", True), ("pets", False)]):
    find("datasets", "hf").online = online
    try:
        loaded = open_data(f"hf:me/{name}", {"size": 8}, None, Path(sys.argv[2]) / str(i))
        print(len(loaded.domains[0].labels))
    except UserError as error:
        print(error)
    urllib.request.urlopen(sys.argv[1] + "/api/datasets/me/pets/mark").read()
"""


@pytest.mark.slow
def test_network_is_asked_only_when_allowed(tmp_path):
    """Broken if a run fetches by itself, if `data prepare` cannot, or if what was fetched is not found afterwards."""
    write_pets(tmp_path / "made")
    made = {str(p.relative_to(tmp_path / "made")): p.read_bytes() for p in (tmp_path / "made").rglob("*.parquet")}
    handler = type("Hub", (_FakeHub,), {"files": made, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    unset = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HTTP_PROXY", "http_proxy", "QATBENCH_DATA")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", STEPS, address, str(tmp_path)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, third, fourth = done.stdout.splitlines()
    assert "qatbench data prepare hf:me/pets" in first
    assert "cannot be had from the hub" in third
    assert second == fourth == "48"
    marks = [i for i, path in enumerate(handler.asked) if path.endswith("/mark")]
    assert marks[0] == 0, "asked although it was not allowed to"
    assert marks[3] == marks[2] + 1, "asked for what is here"
    assert sum("/resolve/" in path for path in handler.asked[: marks[1]]) >= 3


@pytest.mark.skipif(not (REAL / "cifar10/plain_text").is_dir(), reason=f"no CIFAR-10 in {REAL}; set QATBENCH_DATA")
@pytest.mark.slow
def test_real_cifar10_is_the_same_by_both_ways(tmp_path):
    """Broken if the hub's files give other images, labels or test images than the adapter of CIFAR-10."""
    ours = open_data("cifar10", {}, REAL, tmp_path / "c")
    theirs = open_data("hf:uoft-cs/cifar10", {"size": 32, "margin": False}, REAL, tmp_path / "c")
    assert theirs.classes == ours.classes
    assert theirs.hash == ours.hash
    counts = torch.bincount(theirs.domains[0].labels[:-2000]).tolist()
    assert counts == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
    split = make_splits(theirs, 0)["cifar10"]
    assert torch.bincount(theirs.domains[0].labels[split.test]).tolist() == [200] * 10
