"""Fashion-MNIST: MNIST's format and counts, with clothes for digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..bench.dataset import DataSet, Domain
from ..bench.fetch import Remote
from ..bench.files import read_idx_pair

_SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_REPOSITORY = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"


def _remote(name: str, size: int, md5: str, sha256: str) -> Remote:
    return Remote(f"FashionMNIST/raw/{name}", (f"{_SITE}/{name}", f"{_REPOSITORY}/{name}"), sha256, md5, size)


class FashionMNIST(DataSet):
    """Fashion-MNIST: Zalando's clothes, 28x28 grey as three channels, with the official test part."""

    name = "fashion_mnist"
    domains = ("fashion_mnist",)
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    image = (3, 28, 28)
    augment = "crop-flip"
    source = "FashionMNIST/raw/*.gz under the data root, as torchvision stores them"
    licence = "MIT"
    citation = "Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747, 2017"
    counts: ClassVar[Mapping[str, int]] = {"fashion_mnist": 70_000}
    # md5: the owner's README; sha256 and sizes: tensorflow_datasets.
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "fashion_mnist": (
            _remote(
                "train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            _remote(
                "train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            _remote(
                "t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            _remote(
                "t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        )
    }  # fmt: skip

    def sources(self) -> list[Path]:
        """Images and labels of the training part, then of the test part."""
        kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        return [self.find(self.domains[0], f"FashionMNIST/raw/{kind}-ubyte.gz") for kind in kinds]

    def load(self) -> list[Domain]:
        """Read all four files."""
        files = self.sources()
        parts = [read_idx_pair(files[i], files[i + 1], self.image[1:], len(self.classes)) for i in (0, 2)]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        three = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)
        test = torch.arange(len(parts[0][1]), len(labels))
        return [Domain(self.domains[0], three, torch.from_numpy(labels), test)]
