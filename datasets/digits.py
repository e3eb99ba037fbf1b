"""Digits of seven kinds as 3x28x28 or 3x32x32, SVHN by itself, and the long-tailed SynDigits."""

from __future__ import annotations

import bz2
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from ..bench.dataset import DataSet, Domain
from ..bench.errors import UserError
from ..bench.fetch import Remote
from ..bench.files import FETCH, check_labels, one_line, read_bytes, read_idx_pair, read_mat, unpack
from ..bench.images import decode

_FONTS = 1_000_000  # groups of Chars74K's fonts start here, beyond the numbers of MNIST's digits

# What each domain is read from. Of several paths for one thing the first that is there counts; an archive is unpacked to the first.
_FILES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "mnist": tuple(
        (f"MNIST/raw/{kind}-ubyte.gz", f"MNIST/raw/{kind}-ubyte")
        for kind in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ),
    "usps": (("USPS/usps.bz2",), ("USPS/usps.t.bz2",)),
    "mnist_m": (("MNIST-M/mnist_m", "mnist_m"),),
    "chars74k": (("chars74k/EnglishFnt/English/Fnt", "chars74k_digits/English/Fnt"),),
    "syndigits": (("SynDigits/synth_train_32x32.mat",), ("SynDigits/synth_test_32x32.mat",)),
    "svhn": (("SVHN/train_32x32.mat",), ("SVHN/test_32x32.mat",)),
    "chars74k_street": (("chars74k/EnglishImg/English/Img", "chars74k_digits/English/Img"),),
}
_GOOD_AND_BAD = (
    "GoodImg/Bmp",
    "BadImag/Bmp",
)  # Chars74K's street photographs, sharp and not; the misspelling is theirs


def _mnist(kind: str, size: int, md5: str, sha256: str) -> Remote:
    name = f"{kind}-ubyte.gz"
    places = (
        "http://yann.lecun.com/exdb/mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    )
    return Remote(f"MNIST/raw/{name}", tuple(f"{place}/{name}" for place in places), sha256, md5, size)


def _usps(name: str, md5: str, packed_anew: str) -> Remote:
    url = f"https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/{name}"
    return Remote(f"USPS/{name}", (url,), md5=md5, accept=(packed_anew,))


def _svhn(name: str, size: int, md5: str, sha256: str) -> Remote:
    return Remote(f"SVHN/{name}", (f"http://ufldl.stanford.edu/housenumbers/{name}",), sha256, md5, size)


def _chars74k(name: str, md5: str) -> Remote:
    return Remote(
        f"chars74k/{name}.tgz",
        (f"http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/{name}.tgz",),
        md5=md5,
        unpack=f"chars74k/{name}",
        note=f"{name}.tgz is also linked from https://teodecampos.github.io/chars74k/",
    )


class Digits(DataSet):
    """Digits: MNIST, USPS, MNIST-M, SynDigits, SVHN, and Chars74K's fonts and street photographs, any of them by name.

    The EmaQ paper has mnist, mnist_m and syndigits; Digits-Five (Peng et al. 2019) is mnist, mnist_m, usps, svhn and
    syndigits. Images of another size are resized with Pillow's bicubic filter, street photographs without regard to their
    proportions, and grey ones get three equal channels.

    MNIST-M's digits are MNIST's, so both are split alike. Chars74K has no official split: a font, in all its styles, is
    in one part only; of the street photographs the files do not say which show the same sign, so neighbours of a test
    image may train.
    """

    name = "digits"
    domains = ("mnist", "usps", "mnist_m", "chars74k", "syndigits", "svhn", "chars74k_street")
    default_domains: ClassVar[tuple[str, ...]] = ("mnist", "usps", "mnist_m", "chars74k")
    classes = tuple("0123456789")
    augment = "shift"  # a digit in a mirror is none
    source = (
        "MNIST/raw/*.gz, USPS/*.bz2, mnist_m/, chars74k_digits/English/{Fnt,Img}/, SynDigits/synth_*_32x32.mat, "
        "SVHN/*_32x32.mat under the data root"
    )
    licence = (
        "MNIST: CC BY-SA 3.0; USPS, MNIST-M, SynDigits: none stated; Chars74K: research use; SVHN: non-commercial use"
    )
    citation = (
        "LeCun et al. 1998 (MNIST); Hull 1994 (USPS); Ganin et al. 2016 (MNIST-M); de Campos et al. 2009 (Chars74K); "
        "Ganin and Lempitsky 2015 (SynDigits); Netzer et al. 2011 (SVHN)"
    )
    generated: ClassVar[Mapping[str, str]] = {
        "mnist_m": "MNIST digits, |texture - digit| over crops of photographs (Ganin et al. 2016)",
        "chars74k": "digits rendered from computer fonts (de Campos et al. 2009)",
        "syndigits": "numbers rendered from Windows fonts, varied in place, slant, colours and blur (Ganin and Lempitsky 2015)",
    }
    counts: ClassVar[Mapping[str, int]] = {
        "mnist": 70_000,
        "usps": 9_298,
        "mnist_m": 68_002,
        "chars74k": 10_160,
        "syndigits": 488_953,
        "svhn": 99_289,
        "chars74k_street": 885,
    }
    # md5: torchvision (MNIST, USPS, SVHN), pytorch-adapt and dm_nevis (MNIST-M, Chars74K). sha256 and sizes: tensorflow_datasets
    # (MNIST, where they were computed on the files as well; SVHN).
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "mnist": (
            _mnist(
                "train-images-idx3", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            _mnist(
                "train-labels-idx1", 28_881, "d53e105ee54ea40749a09fcbcd1e9432",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            _mnist(
                "t10k-images-idx3", 1_648_877, "9fb629c4189551a2d022fa330f9573f3",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            _mnist(
                "t10k-labels-idx1", 4_542, "ec29112dd5afa0611ce80d1b7f02629c",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        "usps": (
            _usps(
                "usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197",
                "96e2f816c35b13277ae963486f6611c39105f9dd63f5f25ff3ef8dfbed3b5346",
            ),
            _usps(
                "usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118",
                "7af3f9712a18c4f3158076db006173a7b3814cc699fe6ea9852c133bc2e68ad6",
            ),
        ),
        "mnist_m": (
            Remote(
                "mnist_m.tar.gz",
                (
                    "https://drive.google.com/uc?export=download&id=0B_tExHiYS-0veklUZHFYT19KYjg&confirm=t",
                    "https://cornell.box.com/shared/static/jado7quprg6hzzdubvwzh9umr75damwi",
                ),
                md5="859df31c91afe82e80e5012ba928f279",
                unpack="MNIST-M",
                note="mnist_m.tar.gz is linked from http://yaroslav.ganin.net",
            ),
        ),
        "chars74k": (_chars74k("EnglishFnt", "f6710b1302a7e9693d904b16389d9d8a"),),
        "syndigits": (
            Remote(
                "SynthDigits.zip",
                ("https://drive.google.com/uc?export=download&id=0B9Z4d7lAwbnTSVR1dEFSRUFxOUU&confirm=t",),
                unpack="SynDigits",
                note="SynthDigits.zip is linked from http://yaroslav.ganin.net",
            ),
        ),
        "svhn": (
            _svhn(
                "train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373",
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            _svhn(
                "test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3",
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        "chars74k_street": (_chars74k("EnglishImg", "85d157e0c58f998e1cda8def62bcda0d"),),
    }  # fmt: skip
    most: ClassVar[tuple[int | None, int | None]] = (None, None)  # SynDigits' images a class, to train and to test

    class Params(DataSet.Params):
        """What a user can ask for."""

        size: Literal[28, 32] = Field(28, description="height and width: 28 as MNIST, 32 as SVHN")

    params: Params

    def look(self) -> None:
        """Images have the size asked for."""
        self.image = (3, self.params.size, self.params.size)

    def sources(self) -> Iterator[Path]:
        """The files and folders of the domains asked for."""
        for name in self.selected:
            for path in self._files(name):
                if name == "chars74k":
                    yield from _samples(path)
                elif name == "chars74k_street":
                    yield from (sample for part in _GOOD_AND_BAD for sample in _samples(path / part))
                else:
                    yield path

    def load(self) -> list[Domain]:
        """Read the domains asked for."""
        read = {
            "mnist": _read_mnist,
            "usps": _read_usps,
            "mnist_m": _read_mnist_m,
            "chars74k": _read_fonts,
            "syndigits": self._read_syndigits,
            "svhn": _read_svhn,
            "chars74k_street": _read_street,
        }
        return [read[name](self._files(name), self.params.size) for name in self.selected]

    def _files(self, domain: str) -> list[Path]:
        return [self.find(domain, *paths) for paths in _FILES[domain]]

    def _read_syndigits(self, files: list[Path], size: int) -> Domain:
        parts = []
        for path, most in zip(files, self.most, strict=True):
            images, labels = read_mat(path)
            labels = check_labels(labels, 10, path)
            if most is not None:
                kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:most] for c in range(10)]))
                images, labels = images[kept], labels[kept]
            parts.append((_fit(images, size), labels))
        return _join("syndigits", parts)


class SVHN(Digits):
    """SVHN: digits cut from photographs of house numbers, with the official test part; without the `extra` images."""

    name = "svhn"
    domains = ("svhn",)
    default_domains = ()
    source = "SVHN/train_32x32.mat, SVHN/test_32x32.mat under the data root"
    licence = "non-commercial use"
    citation = "Netzer et al.: Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS workshop, 2011"
    generated: ClassVar[Mapping[str, str]] = {}
    counts: ClassVar[Mapping[str, int]] = {"svhn": Digits.counts["svhn"]}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {"svhn": Digits.remotes["svhn"]}

    class Params(Digits.Params):
        """What a user can ask for."""

        size: Literal[28, 32] = Field(32, description="height and width: 28 as MNIST, 32 as SVHN")


class SynDigitsLT(Digits):
    """SynDigits-LT: 1,000 images of the commonest class, exponentially fewer of the others; 200 of each to test.

    EmaQ-LT's counts. Which images those are the papers do not say: here they are drawn, by seed, from the first 1,000
    training images of each class in the order of the file, and the first 200 of each class test.
    """

    name = "syndigits-lt"
    domains = ("syndigits",)
    default_domains = ()
    source = "SynDigits/synth_train_32x32.mat, SynDigits/synth_test_32x32.mat under the data root"
    licence = "none stated"
    citation = (
        "Ganin and Lempitsky: Unsupervised Domain Adaptation by Backpropagation, ICML 2015; EmaQ-LT, arXiv 2606.04920"
    )
    generated: ClassVar[Mapping[str, str]] = {"syndigits": Digits.generated["syndigits"]}
    counts: ClassVar[Mapping[str, int]] = {"syndigits": 12_000}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {"syndigits": Digits.remotes["syndigits"]}
    most = (1000, 200)

    class Params(Digits.Params):
        """What a user can ask for."""

        imbalance: float | None = Field(50.0, ge=1, description="the largest class over the smallest")


def _read_mnist(files: list[Path], size: int) -> Domain:
    parts = [read_idx_pair(files[i], files[i + 1], (28, 28), 10) for i in (0, 2)]
    fitted = [(_fit(images, size), labels) for images, labels in parts]
    return _join("mnist", fitted, group=torch.arange(sum(len(labels) for _, labels in parts)))


def _read_usps(files: list[Path], size: int) -> Domain:
    """LIBSVM text: a label 1..10, then 256 values -1..1 as index:value."""
    from sklearn.datasets import load_svmlight_file

    parts = []
    for path in files:
        text = unpack(path, bz2.decompress, read_bytes(path))
        try:
            values, labels = load_svmlight_file(io.BytesIO(text), n_features=256, zero_based=False)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UserError(f"{path} is not LIBSVM text of 256 values a line ({one_line(error)}); {FETCH}") from None
        values = values.toarray()
        if not (np.abs(values) <= 1).all() or not len(values):
            raise UserError(f"{path} holds no values, or values beyond -1..1; {FETCH}")
        pixels = np.round((values + 1) * 127.5).astype(np.uint8).reshape(-1, 16, 16)
        parts.append((_fit(pixels, size), check_labels(labels, 10, path, first=1) - 1))
    return _join("usps", parts)


def _read_mnist_m(files: list[Path], size: int) -> Domain:
    """PNG files named after the MNIST digit that they show, and a list of names and labels for each part."""
    (folder,) = files
    parts, groups = [], []
    for kind, start in (("train", 0), ("test", 60_000)):
        path = folder / f"mnist_m_{kind}_labels.txt"
        names, labels = _label_list(path)
        images = _pictures([folder / f"mnist_m_{kind}" / name for name in names], size)
        parts.append((images, check_labels(labels, 10, path)))
        groups += [start + int(Path(name).stem) for name in names]
    return _join("mnist_m", parts, group=torch.tensor(groups))


def _label_list(path: Path) -> tuple[list[str], np.ndarray]:
    names, labels = [], []
    for number, line in enumerate(read_bytes(path).decode("ascii", "replace").splitlines(), 1):
        name, _, label = line.strip().partition(" ")
        if not (Path(name).stem.isdigit() and Path(name).name == name and label.isdigit() and len(label) < 10):
            raise UserError(f"{path}, line {number}: expected 'NUMBER.png LABEL', found {line[:40]!r}; {FETCH}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise UserError(f"{path} is empty; {FETCH}")
    return names, np.asarray(labels)


def _read_fonts(files: list[Path], size: int) -> Domain:
    """Folder Sample00N holds digit N-1: fonts in order, each in four styles."""
    paths, labels = _sorted_samples(files)
    groups = []
    for path in paths:
        number = path.stem.partition("-")[2]
        if not number.isdecimal():
            raise UserError(f"{path} is not named imgCCC-NNNNN.png as in Chars74K; remove it")
        groups.append(_FONTS + (int(number) - 1) // 4)
    return Domain("chars74k", _tensor(_pictures(paths, size)), labels, group=torch.tensor(groups))


def _read_street(files: list[Path], size: int) -> Domain:
    """Folders Sample00N as of the fonts, once for the good photographs and once for the bad ones."""
    paths, labels = _sorted_samples([files[0] / part for part in _GOOD_AND_BAD])
    return Domain("chars74k_street", _tensor(_pictures(paths, size)), labels)


def _read_svhn(files: list[Path], size: int) -> Domain:
    parts = []
    for path in files:
        images, labels = read_mat(path)
        parts.append((_fit(images, size), check_labels(labels, 10, path, first=1) % 10))  # 10 stands for 0
    return _join("svhn", parts)


def _samples(folder: Path) -> list[Path]:
    """Chars74K's folders of the ten digits."""
    samples = [folder / f"Sample{digit + 1:03d}" for digit in range(10)]
    for sample in samples:
        if not sample.is_dir():
            raise UserError(f"{sample} is missing: put Chars74K's folder there or leave its domain out of `domains`")
    return samples


def _sorted_samples(folders: Sequence[Path]) -> tuple[list[Path], torch.Tensor]:
    """Chars74K's images, digit by digit, and their labels."""
    paths, labels = [], []
    for digit, samples in enumerate(zip(*map(_samples, folders), strict=True)):
        for sample in samples:
            files = sorted(sample.glob("*.png"))
            if not files:
                raise UserError(f"{sample} has no PNG files: put Chars74K's there or leave its domain out of `domains`")
            paths += files
            labels += [digit] * len(files)
    return paths, torch.tensor(labels)


def _pictures(paths: Sequence[Path], size: int) -> np.ndarray:
    """Image files as uint8 [N, size, size, 3]."""
    return np.stack([np.asarray(_resized(decode(path), size)) for path in paths])


def _fit(images: np.ndarray, size: int) -> np.ndarray:
    """Images [N, h, w] or [N, h, w, 3] as uint8 [N, size, size, 3]; the three channels of grey share memory."""
    if images.shape[1:3] != (size, size):
        fitted = np.empty((len(images), size, size, *images.shape[3:]), np.uint8)
        for i, x in enumerate(images):
            fitted[i] = np.asarray(_resized(Image.fromarray(x), size))
        images = fitted
    return images if images.ndim == 4 else np.broadcast_to(images[..., None], (*images.shape, 3))


def _resized(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _join(name: str, parts: list[tuple[np.ndarray, np.ndarray]], group: torch.Tensor | None = None) -> Domain:
    """The training part and, after it, the official test part."""
    labels = np.concatenate([labels for _, labels in parts])
    images = np.empty((len(labels), *parts[0][0].shape[1:]), np.uint8)  # in this order in memory, whatever the files'
    np.concatenate([images for images, _ in parts], out=images)
    return Domain(name, _tensor(images), torch.from_numpy(labels), torch.arange(len(parts[0][1]), len(labels)), group)


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
