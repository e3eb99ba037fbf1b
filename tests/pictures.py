"""Small pictures in folders, for tests of data sets that are folders of images."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32


def write_picture(path: Path, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> Path:
    """A picture of noise, (width, height), another one for each path; the format is as the name ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
    noise = rng.integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(noise.squeeze(), mode).save(path)
    return path


def write_classes(folder: Path, counts: Mapping[str, int], ending: str = ".jpg") -> Path:
    """A folder of class folders with so many pictures each."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            write_picture(folder / name / f"img_{i:04}{ending}")
    return folder


def cut_short(path: Path) -> Path:
    """The same file, without its second half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path
