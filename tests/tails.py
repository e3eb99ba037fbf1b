"""A method on a task with given class counts, for the tests of long-tail methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from qatbench.bench.assemble import assemble
from qatbench.bench.data import Batch
from qatbench.bench.method import Method, Out
from qatbench.bench.testing import IMAGE, TinyNet, float_net, ready
from torch import Tensor, nn

TAIL = (1000, 200, 40, 8)
ABSENT = (1000, 0, 40, 8)
COARSE = {"superclasses": ("u", "v"), "superclass": (0, 0, 1, 1)}


def tailed(chain: str, counts: tuple[int, ...] = TAIL, coarse: bool = False, **settings: Any) -> Method:
    """The chain on the contract's network and images, told that there are so many training images of each class.

    ``coarse``: with a second head, of two superclasses.
    """
    made, _ = ready(chain, **settings)
    task = replace(made.task, class_counts=counts, **(COARSE if coarse else {}))
    torch.manual_seed(0)
    net = TinyNet(IMAGE[0], task.outputs) if coarse else float_net()
    return assemble(made.spec, net, task, made.probe)


def some_logits(outputs: int = 4, images: int = 12, seed: int = 0) -> tuple[Tensor, Batch]:
    """Random logits, a leaf, and a batch of their labels; of four classes, one is absent from it."""
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(images, outputs, generator=rng)).requires_grad_()
    labels = torch.arange(images) % 3
    return logits, Batch(torch.zeros(images, *IMAGE), labels, torch.zeros(images, dtype=torch.int64))


def losses_of(method: Method, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The outermost method's losses of these logits."""
    return method.losses(Out(logits, {}), batch)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """The loss's gradient in a leaf."""
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


class Convolutional(nn.Module):
    """A network that ends in a convolution: it has no linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(IMAGE[0], 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: means over places."""
        return self.conv2(self.relu(self.conv1(x))).mean((2, 3))


def without_linear_head(chain: str) -> Method:
    """The chain on `Convolutional`."""
    made, data = ready(chain.split("+")[-1])
    spec = made.spec.model_copy(update={"method": chain})
    return assemble(spec, Convolutional(), data.task, made.probe)
