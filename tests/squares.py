"""A plugin for the tests of the command line: two domains of 8x8 images, which train in a moment."""

from __future__ import annotations

import torch
from qatbench import DataSet
from qatbench.bench.data import Domain


class Squares(DataSet):
    """Dark squares and bright ones; on the right the other way round, and harder."""

    name = "squares"
    domains = ("left", "right")
    classes = ("dark", "bright")
    image = (1, 8, 8)

    def fingerprint(self) -> str:
        """The images do not change."""
        return "1"

    def load(self) -> list[Domain]:
        """Noise around two brightnesses."""
        return [_domain(name, 80 if name == "left" else -25) for name in self.selected]


def _domain(name: str, contrast: int) -> Domain:
    labels = torch.arange(120) % 2
    noise = torch.randint(50, 150, (120, 1, 8, 8), generator=torch.Generator().manual_seed(contrast + 100))
    return Domain(name, (noise + contrast * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
