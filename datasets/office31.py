"""Office-31: things of the office in three domains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..bench.dataset import Domain
from ..bench.fetch import Remote
from ..bench.folders import Folders, Names

_TRAIN = 0.8  # of each class, in the split of AlignQ's code
_MIRROR = "https://cloud.tsinghua.edu.cn/f"  # of thuml/Transfer-Learning-Library
_BY_HAND = "get domain_adaptation_images.tar.gz at https://drive.google.com/file/d/0B4IapRTv9pJ1WGZVd1VDMmhwdlE/view"


def _remote(domain: str, key: str) -> tuple[Remote, ...]:
    urls = (f"{_MIRROR}/{key}/?dl=1",)
    return (Remote(f"office31/{domain}.tgz", urls, unpack=f"office31/{domain}.unpacked", note=_BY_HAND),)


def _places(domain: str) -> tuple[str, ...]:
    images = f"{domain}/images"
    original = f"domain_adaptation_images/{images}"
    return (
        *(f"office31/{images}", f"office31/{original}", original),
        *(f"office31/{domain}.unpacked/{images}", f"office31/unpacked/{original}", f"office31/unpacked/{images}"),
    )


class Office31(Folders):
    """Office-31: 31 things of the office, as a shop shows them, and from a camera and a webcam.

    `split="alignq"` takes the test part of AlignQ's public code, drawn for each class by itself with NumPy's generator at
    seed 1. That code draws from files as `os.listdir` lists them, in an order that the file system chooses; here they are
    sorted by name.
    """

    name = "office31"
    domains = ("amazon", "dslr", "webcam")
    classes = (
        "back_pack", "bike", "bike_helmet", "bookcase", "bottle", "calculator", "desk_chair", "desk_lamp",
        "desktop_computer", "file_cabinet", "headphones", "keyboard", "laptop_computer", "letter_tray",
        "mobile_phone", "monitor", "mouse", "mug", "paper_notebook", "pen", "phone", "printer", "projector",
        "punchers", "ring_binder", "ruler", "scissors", "speaker", "stapler", "tape_dispenser", "trash_can",
    )  # fmt: skip
    augment = "crop-flip"
    source = "office31/DOMAIN/images/CLASS/*.jpg under the data root, or an archive of it"
    licence = "research use"
    citation = "Saenko et al., Adapting Visual Category Models to New Domains, ECCV 2010"
    counts: ClassVar[Mapping[str, int]] = {"amazon": 2817, "dslr": 498, "webcam": 795}
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = {d: _places(d) for d in domains}
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {
        "amazon": _remote("amazon", "ec12dfcddade43ab8101"),
        "dslr": _remote("dslr", "a41d818ae2f34da7bb32"),
        "webcam": _remote("webcam", "8a41009a166e4131adcd"),
    }
    complete: ClassVar[tuple[Remote, ...]] = (Remote("domain_adaptation_images.tar.gz", unpack="office31/unpacked"),)

    class Params(Folders.Params):
        """The size of the images, and which of them test."""

        split: Literal["harness", "alignq"] = Field(
            "harness", description="harness: drawn anew for each seed; alignq: 80/20 in each class, as in AlignQ's code"
        )

    params: Params

    def domain(self, name: str, folder: Path, found: Names) -> Domain:
        """One domain, with its official test part if that was asked for."""
        domain = super().domain(name, folder, found)
        test = alignq_test(domain.labels) if self.params.split == "alignq" else None
        return Domain(name, domain.images, domain.labels, test)


def alignq_test(labels: Tensor) -> Tensor:
    """Indices of the images that test in AlignQ's split; a class keeps at least one image to train on."""
    test = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        n = len(members)
        train = np.random.RandomState(1).choice(np.arange(n), max(1, int(n * _TRAIN)), replace=False)
        test.append(members[np.setdiff1d(np.arange(n), train)])
    return torch.cat(test).sort().values
