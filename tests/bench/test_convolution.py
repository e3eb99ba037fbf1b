"""The gradient of a strided 1x1 convolution over few channels, which oneDNN gets wrong on CPUs with AVX2 and without AVX-512."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from qatbench.bench.convolution import StridedPointwise, is_strided_pointwise
from qatbench.bench.network import make_network
from qatbench.bench.quant import QuantLayer, Scope, UniformQuantizer
from qatbench.bench.site import Site
from torch import nn
from torch.nn import functional as F

SITE = Site("conv", "layer", (6,), weights=18, inputs=192)


def gradients(layer: nn.Module, weight: nn.Parameter, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the weight and of the input, for one random gradient of the output."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    seed = torch.Generator().manual_seed(1)
    return torch.autograd.grad(out, (weight, x), torch.randn(out.shape, generator=seed))


@pytest.mark.parametrize("stride", [2, (1, 2), (2, 1), 3])
@pytest.mark.parametrize("channels", range(1, 9))
def test_the_gradient_is_that_of_the_contiguous_layer(channels: int, stride: int | tuple[int, int]) -> None:
    """A user's network would train on garbage, or the process would die in the midst of a sweep (with AVX2 alone)."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 6, 1, stride, bias=False)
    x = torch.randn(5, channels, 9, 8)
    right = gradients(layer, layer.weight, x)
    last = x.contiguous(memory_format=torch.channels_last)
    guarded = StridedPointwise(copy.deepcopy(layer)).to(memory_format=torch.channels_last) if channels < 8 else layer
    for ours, theirs in zip(gradients(guarded, guarded.weight, last), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(guarded(last), layer(last))


def test_quantized_layers_have_it_too() -> None:
    """The float network would train right and the quantized one wrong."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 1, 2, bias=False)
    x = torch.randn(5, 3, 8, 8)
    weight, act = UniformQuantizer(4, SITE, Scope(), True), UniformQuantizer(4, SITE, Scope(), True)
    weight.fit(layer.weight)
    act.fit(x)
    quantized = QuantLayer(layer, weight, act)
    plain = lambda x: F.conv2d(act(x), weight(layer.weight), stride=2)  # noqa: E731
    right = gradients(plain, layer.weight, x)  # type: ignore[arg-type]
    ours = gradients(quantized, layer.weight, x.contiguous(memory_format=torch.channels_last))
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_network_is_made_with_it(plug) -> None:
    """A network of a plugin would be left with the layer that oneDNN gets wrong; or its state dict would change."""
    plug("""
    class Narrow(nn.Module):
        name = "narrow"
        def __init__(self, channels, outputs):
            super().__init__()
            self.skip = nn.Conv2d(channels, 6, 1, 2)
            self.wide = nn.Conv2d(6, 8, 3, 2)
            self.head = nn.Linear(8, outputs)
        def forward(self, x):
            return self.head(self.wide(self.skip(x).relu()).mean((2, 3)))
    """)
    torch.manual_seed(3)
    net = make_network("narrow", 3, 4)
    assert isinstance(net.skip, StridedPointwise)
    assert type(net.wide) is nn.Conv2d
    assert list(net.state_dict()) == [
        "skip.weight",
        "skip.bias",
        "wide.weight",
        "wide.bias",
        "head.weight",
        "head.bias",
    ]
    torch.manual_seed(3)
    assert torch.equal(net.skip.weight, nn.Conv2d(3, 6, 1, 2).weight)


def test_which_layers_are_meant() -> None:
    """All strided shortcuts would be sliced, or some of those that oneDNN gets wrong would not."""

    def meant(channels: int, kernel: int, stride: int, padding: int = 0) -> bool:
        return is_strided_pointwise(
            torch.empty(6, channels, kernel, kernel), ((stride, stride), (padding, padding), (1, 1), 1)
        )

    assert meant(7, 1, 2)
    assert not meant(8, 1, 2)
    assert not meant(3, 1, 1)
    assert not meant(3, 3, 2)
    assert not meant(3, 1, 2, padding=1)


@pytest.mark.parametrize("chain", ["lsq", "fqat+lsq"])
def test_the_contracts_training_survives_avx2(chain: str) -> None:
    """On most desktops `qatbench check` would abort the interpreter, whatever the method."""
    code = (
        "from qatbench.bench.testing import Loop, ready; m, data = ready('{}'); "
        "losses = Loop(m, data).epoch(list(data.train_dataloader())[:3]); assert all(0 < v < 10 for v in losses), losses"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run(
        [sys.executable, "-c", code.format(chain)], env=env, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
