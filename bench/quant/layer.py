"""Layers that hold quantizers, how they are placed in a network, and the integer form in which they are deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantizer import Decode, Quantizer


class QuantLayer(nn.Module):
    """A convolution or linear layer with quantized weight and input. It shares the float layer's own parameters.

    The state-dict keys of the float network stay a subset, so float weights load into the quantized network.

    Args:
        layer: The float `nn.Conv2d` or `nn.Linear`.
        weight_quantizer: None leaves the weight in float.
        act_quantizer: Quantizes the layer's input; None leaves it in float.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, weight_quantizer: Quantizer | None, act_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.act_quantizer = weight_quantizer, act_quantizer
        self.conv = _conv_arguments(layer) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own operation on the quantized input and weight; shapes as in the float layer."""
        x = x if self.act_quantizer is None else self.act_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return apply_layer(x, weight, self.bias, self.conv)


class IntegerLayer(nn.Module):
    """The deployed form of a `QuantLayer`: the weight is stored as 8-bit integer codes, the float weight is gone.

    Inference on integers is emulated in float: codes are decoded when the layer is called.
    """

    codes: Tensor
    decode: Decode

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        if quantizer is None:
            raise ValueError("a layer with a float weight has no integer form")
        codes, self.decode = quantizer.encode(layer.weight.detach())
        self.offset = 0 if quantizer.signed else 2 ** (quantizer.bits - 1)  # unsigned codes, too, fit int8
        self.register_buffer("codes", (codes - self.offset).to(torch.int8))
        self.bias, self.act_quantizer, self.conv = layer.bias, layer.act_quantizer, layer.conv

    def forward(self, x: Tensor) -> Tensor:
        """As `QuantLayer.forward`."""
        x = x if self.act_quantizer is None else self.act_quantizer(x)
        weight = self.decode(self.codes.int() + self.offset)
        return apply_layer(x, weight, self.bias, self.conv)


def apply_layer(x: Tensor, weight: Tensor, bias: Tensor | None, conv: tuple | None) -> Tensor:
    """A convolution with these arguments, or a linear map if there are none."""
    return F.linear(x, weight, bias) if conv is None else F.conv2d(x, weight, bias, *conv)


def _conv_arguments(layer: nn.Conv2d) -> tuple:
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"padding mode {layer.padding_mode!r} is not supported; pad with a module before the convolution"
        )
    return layer.stride, layer.padding, layer.dilation, layer.groups


def swap(net: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)


def quant_layers(net: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Name and module of every `QuantLayer`, in the order of registration."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, QuantLayer))


@torch.no_grad()
def _visit(net: nn.Module, x: Tensor, look: Callable[[str, QuantLayer, Tensor], None]) -> None:
    """One pass over ``x`` in eval mode; ``look(name, layer, input)`` is called before each quantized layer runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: look(name, cast(QuantLayer, layer), inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in quant_layers(net)]
    training = net.training
    try:
        net.eval()
        net(x)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()


def calibrate(net: nn.Module, x: Tensor) -> None:
    """Fit every quantizer of the network in one forward pass over ``x`` (float [B, C, H, W]).

    An activation quantizer is fitted when the pass reaches it, so it sees the input that the quantized layers before it make.
    Running statistics do not move.
    """

    def fit(name: str, layer: QuantLayer, value: Tensor) -> None:
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.fit(layer.weight)
        if layer.act_quantizer is not None:
            layer.act_quantizer.fit(value)

    _visit(net, x, fit)


def count_levels(net: nn.Module, x: Tensor) -> dict[str, tuple[int | None, int | None]]:
    """How many distinct codes each layer's weight and input take on ``x`` (float [B, C, H, W]); None where it is float.

    Codes are counted, not values: with a step a channel there are many values and still at most ``2**bits`` codes.
    """
    levels: dict[str, tuple[int | None, int | None]] = {}

    def count(quantizer: Quantizer | None, value: Tensor) -> int | None:
        if quantizer is None:
            return None
        codes = quantizer.encode(value)[0].flatten()
        lowest, highest = int(codes.min()), int(codes.max())
        if highest - lowest < 2**16:  # a fifth of the memory of `unique`, which sorts
            return int((codes - lowest).bincount().count_nonzero())
        return codes.unique().numel()

    def look(name: str, layer: QuantLayer, value: Tensor) -> None:
        levels[name] = (count(layer.weight_quantizer, layer.weight), count(layer.act_quantizer, value))

    _visit(net, x, look)
    return levels


def deployed(net: nn.Module) -> nn.Module:
    """A copy of the network, in eval mode, whose quantized weights are integer codes (`IntegerLayer`)."""
    net = copy.deepcopy(net).eval()
    for name, layer in list(quant_layers(net)):
        if layer.weight_quantizer is not None:
            swap(net, name, IntegerLayer(layer))
    return net.requires_grad_(False)


__all__ = [
    "Decode",
    "IntegerLayer",
    "QuantLayer",
    "apply_layer",
    "calibrate",
    "count_levels",
    "deployed",
    "quant_layers",
    "swap",
]
