"""A convolution whose gradient is right on every CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Conv = tuple[Any, Any, Any, int]
"""Stride, padding, dilation and groups, as `F.conv2d` takes them."""

BLOCK = 8  # channels that a kernel of oneDNN takes at a time with AVX2


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """``F.conv2d(x, weight, bias, *conv)``; in training on a CPU a strided pointwise one reads its pixels first."""
    if torch.is_grad_enabled() and x.device.type == "cpu" and is_strided_pointwise(weight, conv):
        (rows, columns), *rest = conv
        return F.conv2d(x[:, :, ::rows, ::columns], weight, bias, 1, *rest)
    return F.conv2d(x, weight, bias, *conv)


def is_strided_pointwise(weight: Tensor, conv: Conv) -> bool:
    """Whether this is a 1x1 convolution with a stride above 1 over fewer than 8 channels; see `StridedPointwise`."""
    (stride, padding, *_), (inputs, *kernel) = conv, weight.shape[1:]
    return kernel == [1, 1] and inputs < BLOCK and max(stride) > 1 and padding in ((0, 0), "valid")


def conv_arguments(layer: nn.Conv2d) -> Conv:
    """What `F.conv2d` is given for this layer, besides input, weight and bias."""
    return layer.stride, layer.padding, layer.dilation, layer.groups


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride above 1 over fewer than 8 channels, for training on a CPU.

    With AVX2 and without AVX-512, oneDNN (its issue 6035; torch 2.11 to 2.15) writes past the end of the gradient of such a weight
    if the input is channels_last: the gradient is wrong, or the process dies. In training, the pixels that the
    convolution reads are picked first, so that its stride is 1: the same products, ten times as fast as in contiguous layout.

    Args:
        layer: The layer that it takes the place of, whose parameters it shares.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        stride: Any = layer.stride
        super().__init__(
            layer.in_channels, layer.out_channels, 1, stride, groups=layer.groups, bias=False, device="meta"
        )  # on meta: an initialisation would draw random numbers
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training

    def forward(self, input: Tensor) -> Tensor:
        """Float [B, I, H, W] to [B, O, ceil(H / stride), ceil(W / stride)]."""
        return convolve(input, self.weight, self.bias, conv_arguments(self))
