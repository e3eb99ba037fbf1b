"""A network by its name, and what is checked of it before anything is trained."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .convolution import StridedPointwise, conv_arguments, is_strided_pointwise
from .errors import UserError
from .quant import swap
from .registry import find
from .site import Site, find_sites, more_than_its_class


def make_network(name: str, channels: int, outputs: int) -> nn.Module:
    """A network with initial weights, drawn from the global generator.

    Args:
        name: As the registry knows it.
        channels: Of the images.
        outputs: Width of its output.

    Raises:
        UserError: There is no such network, or it cannot be built.
    """
    cls = find("networks", name)
    try:
        net = cls(channels, outputs)
    except Exception as error:
        raise UserError(
            f"network {name!r} cannot be built for {channels} channels and {outputs} outputs: {_what(error)}"
        ) from error
    for layer_name, layer in list(net.named_modules()):
        plain = isinstance(layer, nn.Conv2d) and more_than_its_class(layer) is None
        if plain and is_strided_pointwise(layer.weight, conv_arguments(layer)):
            swap(net, layer_name, StridedPointwise(layer))
    return net


def check_network(name: str, image: tuple[int, int, int], outputs: int, images: int) -> tuple[Site, ...]:
    """The sites of a network; refuses one that could not be quantized whole or trained on this task.

    Args:
        name: As the registry knows it.
        image: Shape of one input image, (C, H, W).
        outputs: How many logits an image must have.
        images: How many there are in a pass of training.

    Raises:
        UserError: See `find_sites`; or its output is of another shape; or it fails on such a batch.
    """
    return _checked(find("networks", name), name, image, outputs, min(images, 2))


@functools.cache
def _checked(cls: type, name: str, image: tuple[int, int, int], outputs: int, images: int) -> tuple[Site, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make_network(name, image[0], outputs)
        try:
            sites = tuple(find_sites(net, image))
            with torch.no_grad():
                for mode, n in ((False, 2), (True, images)):
                    _check_output(net.train(mode)(torch.randn(n, *image)), (n, outputs), "training" if mode else "use")
        except Exception as error:
            raise UserError(
                f"network {name!r} on {'x'.join(map(str, image))} images: {_what(error, images)}"
            ) from error
    if not any(site.kind == "layer" for site in sites):
        raise UserError(f"network {name!r} has no nn.Conv2d or nn.Linear, so there is nothing to quantize")
    return sites


def _check_output(output: object, shape: tuple[int, int], when: str) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"in {when} it returns a {type(output).__name__}; return the logits alone, float {list(shape)}"
        )
    if tuple(output.shape) != shape or not output.is_floating_point():
        raise ValueError(
            f"in {when} it returns {output.dtype} {list(output.shape)} for {shape[0]} images; the task has {shape[1]} outputs, so "
            f"return float {list(shape)}"
        )


def _what(error: Exception, images: int = 2) -> str:
    """The error in one line; `find_sites` and the checks above word theirs themselves."""
    text = " ".join(str(error).split())
    if images == 1 and "more than 1 value per channel" in text:
        return "one image a pass leaves a BatchNorm one value a channel; raise batch, or lower accumulate"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text[:200]}"
