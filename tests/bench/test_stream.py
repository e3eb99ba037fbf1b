"""Images that do not fit in memory: decoded by worker processes, with the same pixels and the same batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qatbench.bench.data import DataModule, DataSet, Domain, Loaded, open_data
from qatbench.bench.errors import UserError
from qatbench.bench.images import Encoded
from qatbench.bench.stream import gather, gather_each


class Photos(DataSet):
    """60 PNG files in each of two domains."""

    name = "photos"
    domains = ("one", "two")
    classes = ("a", "b", "c")
    image = (3, 12, 12)
    crop = (8, 8)
    augment = "crop-flip"

    def sources(self):
        return [self.find(name, name) for name in self.selected]

    def load(self) -> list[Domain]:
        folders = zip(self.selected, self.sources(), strict=True)
        files = {name: sorted(folder.glob("*.png")) for name, folder in folders}
        return [Domain(n, Encoded(f, (12, 12)), torch.arange(len(f)) % 3) for n, f in files.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in Photos.domains:
        (root / name).mkdir()
        for i in range(60):
            Image.fromarray(rng.integers(0, 256, (9 + i % 9, 16, 3), np.uint8)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def both(root, tmp_path_factory) -> tuple[Loaded, Loaded]:
    """The same files, mapped and streamed."""
    cache = tmp_path_factory.mktemp("cache")
    mapped = open_data(Photos, {}, root, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QATBENCH_DECODED_GB", "0.00005")
        return mapped, open_data(Photos, {}, root, cache)


def test_what_exceeds_the_budget_stays_encoded(both, root, tmp_path, monkeypatch):
    """Broken if ImageNet is decoded onto the disk, or a set that fits is decoded again in every epoch."""
    mapped, streamed = both
    assert all(isinstance(d.images, torch.Tensor) for d in mapped.domains)
    assert all(isinstance(d.images, Encoded) for d in streamed.domains)
    assert [d.labels.tolist() for d in mapped.domains] == [d.labels.tolist() for d in streamed.domains]
    monkeypatch.setenv("QATBENCH_DECODED_GB", "0.00005")
    assert open_data(Photos, {}, root, tmp_path).hash == streamed.hash
    (root / "two" / "059.png").rename(tmp_path / "aside.png")
    changed = open_data(Photos, {}, root, tmp_path).hash
    (tmp_path / "aside.png").rename(root / "two" / "059.png")
    assert changed != streamed.hash


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("protocol", ["mdl", "lodo:two"])
def test_streamed_batches_are_those_of_the_mapped_images(both, workers, protocol, monkeypatch):
    """Broken if a set that is too large for memory is trained in another order, or with other pixels."""
    monkeypatch.setenv("QATBENCH_DECODERS", workers)
    modules = [DataModule(loaded, protocol, 1, 20, views=2) for loaded in both]
    one, two = modules
    assert torch.equal(one.mean, two.mean)  # fewer images than are sampled
    for a, b in zip(one.train_dataloader(), two.train_dataloader(), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.views[0], b.views[0])
        assert a.y.tolist() == b.y.tolist()
    for data in modules:
        data.training_ended = True
    pairs = [
        *zip(one.val_dataloader(), two.val_dataloader(), strict=True),
        *zip(one.open_test(), two.open_test(), strict=True),
    ]
    for loaders in pairs:
        for a, b in zip(*loaders, strict=True):
            assert torch.equal(a.x, b.x)
            assert a.y.tolist() == b.y.tolist()
    assert torch.equal(one.probe(6).x, two.probe(6).x)


def test_decoding_ahead_leaves_the_random_numbers_alone(both):
    """Broken if a streamed set gives other initial weights or dropout masks than a mapped one."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(gather_each([both[1]["one"].images], torch.arange(6).view(3, 2, 1), workers=2))
    assert torch.equal(before, torch.get_rng_state())


def test_gather_takes_the_rows_that_are_asked_for(both):
    """Broken if rows are sorted, or repeated ones dropped."""
    mapped, streamed = (loaded["two"].images for loaded in both)
    rows = torch.tensor([5, 1, 1, 40])
    assert torch.equal(gather(streamed, rows), mapped.permute(0, 2, 3, 1)[rows])


def test_a_bad_image_is_named_from_the_worker_process(root, tmp_path, monkeypatch):
    """Broken if a damaged file in a streamed set ends the run with a worker's traceback instead of its name."""
    bad = tmp_path / "root"
    for name in Photos.domains:
        (bad / name).mkdir(parents=True)
        for path in (root / name).glob("*.png"):
            (bad / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("QATBENCH_DECODED_GB", "0")
    loaded = open_data(Photos, {}, bad, tmp_path / "cache")
    for path in (bad / "one").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"^\S+one/\d+\.png [^\n]*$"):
        list(gather_each([loaded["one"].images], torch.arange(6).view(3, 2, 1), workers=2))


def test_a_wrong_environment_is_one_line(both, root, tmp_path, monkeypatch):
    """Broken if a misspelt number in the environment ends in a traceback."""
    monkeypatch.setenv("QATBENCH_DECODERS", "many")
    with pytest.raises(UserError, match="QATBENCH_DECODERS='many'"):
        gather_each([both[1]["one"].images], torch.arange(6).view(3, 2, 1))
    monkeypatch.setenv("QATBENCH_DECODED_GB", "much")
    with pytest.raises(UserError, match="QATBENCH_DECODED_GB='much'"):
        open_data(Photos, {}, root, tmp_path)


def test_a_disk_that_fills_up_while_decoding_is_one_line(root, tmp_path):
    """Broken if a full disk kills the process, or leaves half an array that is taken for whole."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_stream import Photos, UserError, open_data
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a write beyond it fails as on a full disk
try:
    open_data(Photos, {{}}, Path({str(root)!r}), Path({str(tmp_path)!r}))
except UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot write prepared data" in out
    assert "free some space" in out
    assert out.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(open_data(Photos, {}, root, tmp_path)["one"].labels) == 60
