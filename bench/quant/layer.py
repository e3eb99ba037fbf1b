"""Layers that hold quantizers, how they are placed in a network, and the integer form in which they are deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convolution import Conv, conv_arguments, convolve
from ..errors import RunFailed
from ..site import channel_dim, unquantizable
from .quantizer import Decode, Quantizer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
        if reason := unquantizable(layer):
            raise ValueError(f"the layer {reason}")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.act_quantizer = weight_quantizer, act_quantizer
        if act_quantizer is not None:
            act_quantizer.of = "input"
        self.conv = conv_arguments(layer) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own operation on the quantized input and weight; shapes as in the float layer."""
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        if self.act_quantizer is None:
            return apply_layer(x, weight, self.bias, self.conv)
        quantized = self.act_quantizer(x)
        keeps = self.act_quantizer.random or not quantized.requires_grad
        redo = None if keeps else self.act_quantizer.redo(x)
        if redo is None:
            return apply_layer(quantized, weight, self.bias, self.conv)
        with _made_again(quantized, redo):
            return apply_layer(quantized, weight, self.bias, self.conv)


def _made_again(value: Tensor, redo: Callable[[], Tensor]) -> AbstractContextManager:
    """What is computed in here does not keep ``value`` for the backward pass; it is made by ``redo`` there."""
    place = value.data_ptr()

    def pack(kept: Tensor) -> Tensor | None:
        return None if kept.data_ptr() == place and kept.shape == value.shape else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: redo() if kept is None else kept)


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


def apply_layer(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv | None) -> Tensor:
    """A convolution with these arguments, or a linear map if there are none."""
    return F.linear(x, weight, bias) if conv is None else convolve(x, weight, bias, conv)


def swap(net: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)


def quant_layers(net: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Name and module of every `QuantLayer`, in the order of registration."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, QuantLayer))


@torch.no_grad()
def _visit(net: nn.Module, x: Tensor, look: Callable[[str, QuantLayer, Tensor], None], measure: bool = False) -> None:
    """One pass over ``x`` in eval mode; ``look(name, layer, input)`` is called before each quantized layer runs.

    With ``measure`` each BatchNorm takes its running statistics from this pass.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: look(name, cast(QuantLayer, layer), inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in quant_layers(net)]
    training = net.training
    try:
        net.eval()
        with measured_norms(net) if measure else nullcontext():
            net(x)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()


@contextmanager
def measured_norms(net: nn.Module, still: Set[nn.Parameter] = frozenset()) -> Iterator[list[Any]]:
    """In here the running statistics of each BatchNorm become the plain mean over the passes, whatever they were.

    Args:
        net: The network.
        still: Parameters that are frozen: a norm whose scale is one of them keeps its statistics.

    Yields:
        The norms.
    """
    norms: list[Any] = [
        m for m in net.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None and m.weight not in still
    ]
    before = [(norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            # No momentum: the mean over all batches since the count was 0. A count of its own: that of training goes on.
            norm.training, norm.momentum = True, None
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
        yield norms
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.training, norm.momentum, norm.num_batches_tracked = kept


def calibrate(net: nn.Module, x: Tensor) -> None:
    """Fit every quantizer of the network in one forward pass over ``x`` (float [B, C, H, W]).

    An activation quantizer is fitted when the pass reaches it, so it sees the input that the quantized layers before it make.
    The quantizer of a layer that runs several times is fitted to all its inputs. Running statistics do not move, unless quantized
    weights have another scale than the float ones (`Quantizer.rescales`): then those of every BatchNorm are taken from this pass.

    Raises:
        RunFailed: A weight or an input is NaN or infinite.
    """
    inputs: dict[str, list[Tensor]] = {}

    def fit(name: str, layer: QuantLayer, value: Tensor) -> None:
        for what, tensor in (("weight", layer.weight), ("input", value)):
            if not bool(torch.isfinite(tensor).all()):
                raise RunFailed(
                    f"the {what} of {name} is not finite, so nothing can be fitted to it: the float network has diverged; "
                    "train it with a smaller float_lr"
                )
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.fit(layer.weight)
        if layer.act_quantizer is not None:
            seen = inputs.setdefault(name, []) if layer.act_quantizer.site.calls > 1 else []
            seen.append(_flushed(value))
            layer.act_quantizer.fit(_joined(seen))

    rescaled = any(
        layer.weight_quantizer.rescales for _, layer in quant_layers(net) if layer.weight_quantizer is not None
    )
    _visit(net, x, fit, measure=rescaled)


def _flushed(x: Tensor) -> Tensor:
    """The tensor; all zeros if none of its values is larger than the denormal floats, for which no step is small enough."""
    return x if bool((x.abs() >= torch.finfo(torch.float32).tiny).any()) else torch.zeros_like(x)


def _joined(inputs: Sequence[Tensor]) -> Tensor:
    """All inputs of a layer as one, [B, C, positions, 1], so that what is measured by image or channel still is.

    Calls on different numbers of images cannot be joined; then it is the input with the widest range.
    """
    if len(inputs) == 1:
        return inputs[0]
    if len({len(x) for x in inputs}) > 1:
        return max(inputs, key=lambda x: float(x.abs().max()))
    flat = [x.movedim(channel_dim(x), 1).reshape(len(x), x.shape[channel_dim(x)], -1) for x in inputs]
    return torch.cat(flat, dim=2)[..., None]


def audit(net: nn.Module, x: Tensor) -> dict[str, tuple[int | None, int | None]]:
    """How many codes each layer's weight and input take on ``x`` (float [B, C, H, W]); None where it is float.

    Codes are counted within each group that shares a grid (`Quantizer.per`), and the largest count is given: with a step a
    channel there are many values and still at most ``2**bits`` codes. Within a group a code must have one value, and that must
    be what the network computes with.

    Raises:
        RunFailed: Codes do not decode to the quantizer's output, or one code has several values in a group.
    """
    levels: dict[str, tuple[int | None, int | None]] = {}

    def look(name: str, layer: QuantLayer, value: Tensor) -> None:
        levels[name] = (
            _count(layer.weight_quantizer, layer.weight, f"the weight of {name}"),
            _count(layer.act_quantizer, value, f"the input of {name}"),
        )

    _visit(net, x, look)
    return levels


def _count(quantizer: Quantizer | None, x: Tensor, what: str) -> int | None:
    """The most codes that any group of ``x`` takes."""
    if quantizer is None:
        return None
    codes, decode = quantizer.encode(x)
    values = quantizer(x)
    if not torch.equal(decode(codes), values):
        raise RunFailed(
            f"{what} is not what its codes stand for: {type(quantizer).__name__} computes with other values"
        )
    lowest, span = codes.min(), int(codes.max() - codes.min()) + 1
    if span > 2**16:
        return codes.unique().numel()
    cell = (group_index(quantizer, x) * span + (codes - lowest)).flatten()  # of a group and a code
    cells = (int(cell.max()) // span + 1) * span
    largest = values.new_full((cells,), -torch.inf).scatter_reduce_(0, cell, values.flatten(), "amax")
    smallest = values.new_full((cells,), torch.inf).scatter_reduce_(0, cell, values.flatten(), "amin")
    if bool((largest > smallest).any()):
        raise RunFailed(f"{what} has several values for one code: its grid is not one a {quantizer.per}")
    return int((largest > -torch.inf).view(-1, span).sum(1).max())


def group_index(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Number of the grid that each element of ``x`` is on: int64, broadcastable to ``x``."""
    if quantizer.per == "tensor":
        return torch.zeros((), dtype=torch.int64, device=x.device)
    if quantizer.per == "domain":
        assert quantizer.scope.domain is not None
        index, dim = quantizer.scope.domain - quantizer.scope.domain.min(), 0
    else:
        dim = 1 if quantizer.per == "channel" and quantizer.of == "input" else 0
        index = torch.arange(x.shape[dim], device=x.device)
    return index.view([-1 if d == dim else 1 for d in range(x.ndim)])


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
    "audit",
    "calibrate",
    "deployed",
    "group_index",
    "quant_layers",
    "swap",
]
