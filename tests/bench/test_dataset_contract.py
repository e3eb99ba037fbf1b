"""The contract for data sets, held against data sets that keep it and against ones that break it in one place each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from qatbench.bench import dataset_contract, registry
from qatbench.bench.data import DataModule, make_splits
from qatbench.bench.errors import UserError
from qatbench.bench.scaffold import check_file

PICTURES = '''
import random
import torch
from qatbench import DataSet
from qatbench.bench.data import Domain
from qatbench.bench.errors import UserError
from qatbench.bench.fetch import Remote
from qatbench.bench.images import Encoded


class Pictures(DataSet):
    """Letters in ink and in chalk, some of them by the same hand."""

    name = "pictures"
    domains = ("ink", "chalk")
    classes = ("a", "b", "c")
    image = (3, 8, 8)
    augment = "crop-flip"
    source = "https://pictures.example"
    licence = "CC0"
    citation = "A. Nobody, 1999"
    counts = {"ink": 1000}
    remotes = {"ink": (Remote("pictures/ink.zip", ("https://a.example/ink.zip",), "0" * 64, unpack="pictures/ink"),)}

    def sources(self):
        return [self.find(name, f"pictures/{name}") for name in self.selected]

    def load(self):
        return [self._domain(name) for name in self.selected]

    def _domain(self, name):
        folder = self.find(name, f"pictures/{name}")
        files = sorted(folder.glob("*.png"))
        if not files:
            raise UserError(f"{folder} has no PNG files; put those of {name!r} there")
        labels = torch.tensor(["abc".index(f.stem[0]) for f in files])
        group = 100 * labels + torch.tensor([int(f.stem[2:]) // 2 for f in files])
        return Domain(name, Encoded(files, (8, 8)), labels, group=group)
'''

PICTURES_SUITE = """
import numpy as np
from PIL import Image
from qatbench.bench.testing import DatasetContract


class TestPictures(DatasetContract):
    dataset, plugin = "pictures", {plugin!r}
    classes_of = {{"ink": [12, 10, 8], "chalk": [8, 8, 8]}}

    def write(self, root):
        rng = np.random.default_rng(0)
        for domain, counts in self.classes_of.items():
            folder = root / "pictures" / domain
            folder.mkdir(parents=True)
            for letter, count in zip("abc", counts):
                for i in range(count):
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{{letter}}-{{i:02}}.png")

    def spoil(self, root):
        path = root / "pictures" / "ink" / "b-03.png"
        path.write_bytes(path.read_bytes()[:50])
        return path
"""

ARRAYS = '''
import numpy as np
import torch
from qatbench import DataSet
from qatbench.bench.data import Domain
from qatbench.bench.errors import UserError


class Arrays(DataSet):
    """One file, in which the last images are for testing."""

    name = "arrays"
    domains = ("main",)
    classes = ("even", "odd")
    image = (1, 10, 9)
    crop = (8, 8)
    source, licence, citation = "nowhere", "CC0", "A. Nobody, 1999"

    def sources(self):
        return [self.find("main", "arrays.npz")]

    def load(self):
        path = self.find("main", "arrays.npz")
        try:
            with np.load(path) as file:
                images, labels = (torch.from_numpy(file[k]) for k in ("images", "labels"))
        except Exception as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}); fetch it again") from None
        return [Domain("main", images[:, None], labels, torch.arange(30, 40))]
'''

ARRAYS_SUITE = """
import numpy as np
from qatbench.bench.testing import DatasetContract


class TestArrays(DatasetContract):
    dataset, plugin = "arrays", {plugin!r}
    classes_of = {{"main": [20, 20]}}

    def write(self, root):
        images = np.random.default_rng(0).integers(0, 256, (40, 10, 9), np.uint8)
        np.savez(root / "arrays.npz", images=images, labels=np.arange(40) % 2)

    def spoil(self, root):
        path = root / "arrays.npz"
        path.write_bytes(path.read_bytes()[:200])
        return path
"""

SOURCES = {"pictures": (PICTURES, PICTURES_SUITE), "arrays": (ARRAYS, ARRAYS_SUITE)}
FAST = ("-m", "not slow", "-k", "not real_run")


class Outcomes:
    """Takes note of what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_")
            self.of[report.outcome].add(name)


Suite = Callable[..., Outcomes]


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    """``suite("arrays", (old, new), *options)``: the contract on a data set in whose source `old` is replaced by `new`."""
    before = dict(registry._files)

    def call(name: str, change: tuple[str, str] | None = None, *options: str) -> Outcomes:
        source, test = SOURCES[name]
        if change is not None:
            assert change[0] in source
            source = source.replace(*change)
        plugin = tmp_path / f"{name}.py"
        plugin.write_text(source)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
        file = tmp_path / f"test_{tmp_path.name}.py"  # of one name, pytest would take up the module of the test before
        file.write_text(test.format(plugin=str(plugin)))
        outcomes = Outcomes()
        settings = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(tmp_path)]
        basetemp = ["--basetemp", str(tmp_path / "temp")]
        pytest.main([*settings, *basetemp, *options, str(file)], plugins=[outcomes])
        return outcomes

    yield call
    registry._files.clear()
    registry._files.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_sound_data_set_passes(suite: Suite, name: str) -> None:
    """The contract would ask for what no data set can give."""
    outcomes = suite(name).of
    assert outcomes["failed"] == set()
    assert outcomes["skipped"] == ({"streamed_batches_are_the_same"} if name == "arrays" else set())
    assert len(outcomes["passed"]) >= 35


AND_MORE = "and what needs it"  # nothing can be shown of splits or batches if there are none

BROKEN = {
    "no licence": ("pictures", ('licence = "CC0"', 'licence = " "'), {"facts_are_there"}),
    "no docstring": ("arrays", ('"""One file, in which the last images are for testing."""', ""), {"facts_are_there"}),
    "default domain": (
        "pictures", ('    counts = ', '    default_domains = ("pen",)\n    counts = '), {"facts_name_what_there_is"},
    ),
    "count of no domain": ("pictures", ('{"ink": 1000}', '{"pen": 1000}'), {"facts_name_what_there_is"}),
    "path leaves": ("pictures", ('"pictures/ink.zip"', '"../ink.zip"'), {"remotes_are_well_formed"}),
    "absolute path": ("pictures", ('unpack="pictures/ink"', 'unpack="/ink"'), {"remotes_are_well_formed"}),
    "no address": ("pictures", ('"https://a.example/ink.zip"', '"a.example/ink.zip"'), {"remotes_are_well_formed"}),
    "no way to get it": ("pictures", ('("https://a.example/ink.zip",)', "()"), {"remotes_are_well_formed"}),
    "short hash": ("pictures", ('"0" * 64', '"0" * 40'), {"remotes_are_well_formed"}),
    "asks for files when listed": (
        "pictures",
        ("    def sources", '    def look(self):\n        self.find("ink", "pictures")\n\n    def sources'),
        {"is_listed_without_its_files"},
    ),
    "float images": ("arrays", ("images[:, None]", "images[:, None].float()"), {"images", AND_MORE}),
    "wrong size": ("arrays", ("(1, 10, 9)", "(1, 9, 10)"), {"images", AND_MORE}),
    "black images": ("arrays", ("images[:, None]", "0 * images[:, None]"), {"images"}),
    "one image": ("arrays", ("images[:, None]", "images[:1, None].expand(40, -1, -1, -1)"), {"images"}),
    "cannot be sent to a worker": (
        "pictures",
        ("Encoded(files,", "Encoded(type('Files', (list,), {})(files),"),
        {"images"} | ({"streamed_batches_are_the_same"} if sys.platform == "darwin" else set()),  # it forks elsewhere
    ),
    "labels of the wrong type": ("arrays", ("images[:, None], labels", "images[:, None], labels.int()"), {"labels", AND_MORE}),
    "labels in the wrong order": ("pictures", ('"abc".index', '"bca".index'), {"labels"}),
    "two classes of one name": ("arrays", ('"even", "odd"', '"odd", "odd"'), {"classes"}),
    "a superclass without a class": (
        "arrays",
        ("    crop = (8, 8)", '    crop = (8, 8)\n    superclasses = ("all", "none")\n    superclass = (0, 0)'),
        {"classes"},
    ),
    "test part not sorted": (
        "arrays",
        ("torch.arange(30, 40)", "torch.arange(30, 40).flip(0)"),
        {"official_test_and_groups", AND_MORE},
    ),
    "all images for testing": (
        "arrays", ("torch.arange(30, 40)", "torch.arange(40)"), {"official_test_and_groups", AND_MORE},
    ),
    "too few groups": ("pictures", ("group=group", "group=group[1:]"), {"official_test_and_groups", AND_MORE}),
    "domains as asked": (
        "pictures", ("for name in self.selected]\n\n    def _dom", "for name in self.params.domains]\n\n    def _dom"),
        {"domains_are_in_order"},
    ),
    "labels out of step when alone": (
        "pictures",
        ("        group = ", "        labels = labels if len(self.selected) > 1 else labels.flip(0)\n        group = "),
        {"a_subset_of_domains_is_the_same"},
    ),
    "other images each time": (
        "pictures",
        ("        labels = ", "        random.shuffle(files)\n        labels = "),
        {
            "a_subset_of_domains_is_the_same", "prepared_twice_is_the_same", "prepared_is_what_was_loaded",
            "data_root_may_be_read_only", "streamed_batches_are_the_same",
        },
    ),
    "fingerprint never changes": (
        "pictures", ("    def load", "    def fingerprint(self):\n        return '1'\n\n    def load"),
        {"changed_file_is_noticed"},
    ),
    "fingerprint always changes": (
        "pictures",
        ("    def load", "    def fingerprint(self):\n        return str(random.random())\n\n    def load"),
        {"changed_file_is_noticed", "opened_again_without_loading", "prepared_folder_may_be_read_only"},
    ),
    "writes beside the files": (
        "pictures", ("        labels = ", '        (folder / "index.txt").touch()\n        labels = '),
        {"data_root_may_be_read_only", "opened_again_without_loading", "prepared_folder_may_be_read_only"},
    ),
    "traceback for a damaged file": ("arrays", ("except Exception", "except FileNotFoundError"), {
        "spoilt_file_is_told", "file_in_place_of_a_folder_is_told",
    }),
    "does not say which file": ("arrays", ("{path} cannot", "a file cannot"), {
        "spoilt_file_is_told", "file_in_place_of_a_folder_is_told",
    }),
    "no way out": (
        "pictures",
        ("    def sources", "    def missing(self, path, domain):\n        return UserError('gone')\n\n    def sources"),
        {"wrong_data_root_is_told"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_data_set_fails_at_the_right_place(suite: Suite, what: str) -> None:
    """An author would not be told of the mistake, or would look for it in the wrong place."""
    name, change, expected = BROKEN[what]
    failed = suite(name, change, *FAST).of["failed"]
    if AND_MORE in expected:
        assert expected - {AND_MORE} <= failed
        assert failed & {"facts_are_there", "remotes_are_well_formed", "classes", "unknown_domain_is_told"} == set()
    else:
        assert failed == expected


@pytest.mark.slow
def test_another_process_sees_another_order(suite: Suite) -> None:
    """A data set whose order hangs on the hash seed would pass, and no two machines would agree."""
    change = ("        labels = ", "        files = sorted(files, key=lambda f: hash(f.name))\n        labels = ")
    failed = suite("pictures", change, "-k", "another_process or two_processes or prepared_twice").of["failed"]
    assert failed == {"same_hash_in_another_process"}


def without_groups(loaded, seed):
    domains = [dataclasses.replace(d, group=None) for d in loaded.domains]
    return make_splits(dataclasses.replace(loaded, domains=domains), seed)


def of_part(part, change):
    """Splits in which one part is not what it should be."""

    def split(loaded, seed):
        whole = make_splits(loaded, seed)
        return {d: dataclasses.replace(s, **{part: change(getattr(s, part), loaded)}) for d, s in whole.items()}

    return split


class TwiceValidated(DataModule):
    def val_dataloader(self):
        return [list(loader) * 2 for loader in super().val_dataloader()]


class OpenTest(DataModule):
    def open_test(self):
        self.training_ended, self._test_opened = True, False
        return super().open_test()


class SameEpoch(DataModule):
    epoch = property(lambda _: 0, lambda _, number: None)


class EachDiffers(DataModule):
    def _order(self, rng):
        return super()._order(torch.Generator().manual_seed(torch.seed() % 2**32))


class WrongLabels(DataModule):
    def _labels_of(self, rows):
        return super()._labels_of(rows).roll(1)


HARNESS = {
    "groups torn apart": ("pictures", "make_splits", without_groups, {"groups_stay_together"}),
    "one seed": ("pictures", "make_splits", lambda loaded, _: make_splits(loaded, 0), {"splits_follow_the_seed"}),
    "an image lost": (
        "arrays",
        "make_splits",
        of_part("train", lambda rows, _: rows[1:]),
        {"splits_are_disjoint_and_whole", "without_val_nothing_validates", "long_tail"},
    ),
    "a training image tested": (
        "arrays",
        "make_splits",
        of_part("test", lambda rows, _: torch.cat([torch.tensor([0]), rows])),
        {"splits_are_disjoint_and_whole", "without_val_nothing_validates", "official_test_part_is_the_test_part", "long_tail"},
    ),
    "validated twice": ("arrays", "DataModule", TwiceValidated, {"validation_sees_each_image_once"}),
    "test open": ("arrays", "DataModule", OpenTest, {"test_part_is_opened_once_and_last"}),
    "one epoch": ("pictures", "DataModule", SameEpoch, {"an_epoch_can_be_made_again"}),
    "no epoch twice": (
        "pictures", "DataModule", EachDiffers, {"an_epoch_can_be_made_again", "streamed_batches_are_the_same"},
    ),
    "wrong labels": ("pictures", "DataModule", WrongLabels, {"training_images_have_their_labels"}),
}  # fmt: skip


@pytest.mark.parametrize("what", HARNESS)
def test_a_broken_harness_fails_at_the_right_place(suite: Suite, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The contract's own tests of splits and batches could not fail."""
    name, part, broken, expected = HARNESS[what]
    monkeypatch.setattr(dataset_contract, part, broken)
    assert suite(name, None, *FAST).of["failed"] == expected


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Plugins of one test are none of the next."""
    before = dict(registry._files)
    yield
    registry._files.clear()
    registry._files.update(before)


MADE = """
import torch
from qatbench import DataSet
from qatbench.bench.data import Domain


class Made(DataSet):
    "Noise, drawn when it is asked for."

    name = "made_for_check"
    domains = ("noise",)
    classes = ("a", "b")
    image = (1, 8, 8)
    source, licence, citation = "drawn", "CC0", "A. Nobody, 1999"

    def fingerprint(self):
        return "1"

    def load(self):
        rng = torch.Generator().manual_seed(0)
        return [Domain("noise", torch.randint(256, (40, 1, 8, 8), generator=rng).byte(), torch.arange(40) % 2)]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("licence", "status"), [('"CC0"', 0), ('""', 1)])
def test_check_runs_on_a_data_set(forgotten: None, tmp_path: Path, licence: str, status: int) -> None:
    """`qatbench check` would refuse a data set, or pass whatever it is given."""
    file = tmp_path / f"made_{status}.py"
    file.write_text(MADE.replace('"CC0"', licence))
    assert check_file(file) == status


def test_check_says_what_a_data_set_with_a_variant_needs(forgotten: None, tmp_path: Path) -> None:
    """The author of such a data set would be shown thirty failures of one cause."""
    file = tmp_path / "with_variant.py"
    file.write_text(MADE.replace("    domains", '    takes = "FOLDER"\n    domains').replace("made_for", "variant_for"))
    with pytest.raises(UserError, match=r"DatasetContract.*'variant_for_check:FOLDER'"):
        check_file(file)
