"""What a bit plan costs: average bits, bit operations and bytes, computed from the plan and the network and never claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..site import Site
from ..spec import FLOAT_BITS, Bits
from .layer import quant_layers


def cost(sites: Sequence[Site], plan: Mapping[str, Bits], net: nn.Module) -> dict[str, Any]:
    """The cost of a quantized network under a plan.

    Args:
        sites: The network's sites; layers count.
        plan: Layer -> bits. A layer that the plan does not name is float.
        net: The network with its quantizers, of whose parameters and constants the size is made.

    Returns:
        ``avg_bits_weight``, over the weights of all layers; ``avg_bits_weight_inner``, without first and last layer;
        ``avg_bits_act``, over the elements of all layer inputs; ``macs``, multiply-accumulates an image of each layer;
        ``bops``, bit operations an image: the sum of macs x weight bits x activation bits (Baskin et al. 2021, arXiv
        1804.10969, without the accumulator's term); ``size_bytes``: weights at their bits, what their quantizers need to
        decode and encode (`Quantizer.constants`) and all other parameters at 32 bits; ``peak_act_bytes`` an image: the
        largest, over layers, of what is in memory while the layer runs (`Site.live`), where tensors that only quantized
        layers read are stored at their bits, and all others (the branches of a residual sum, for example) at 32 bits.
    """
    layers = [site for site in sites if site.kind == "layer"]
    bits = {site.name: Bits(*plan.get(site.name, (FLOAT_BITS, FLOAT_BITS))) for site in layers}
    inner = [site for site in layers if not site.edge] or layers
    weights = sum(site.weights for site in layers)
    weight_bits = sum(site.weights * bits[site.name].w for site in layers)
    return {
        "avg_bits_weight": weight_bits / weights,
        "avg_bits_weight_inner": sum(s.weights * bits[s.name].w for s in inner) / sum(s.weights for s in inner),
        "avg_bits_act": sum(s.inputs * bits[s.name].a for s in layers) / sum(s.inputs for s in layers),
        "macs": {site.name: site.macs for site in layers},
        "bops": float(sum(site.macs * bits[site.name].w * bits[site.name].a for site in layers)),
        "size_bytes": (weight_bits + FLOAT_BITS * (_parameters(net) - weights + _constants(net))) / 8,
        "peak_act_bytes": max(_live_bits(site, bits) for site in layers) / 8,
    }


def _live_bits(site: Site, bits: Mapping[str, Bits]) -> int:
    """Bits of the activations in memory while a layer runs."""
    return sum(n * max((bits[r].a for r in readers if r in bits), default=FLOAT_BITS) for n, readers in site.live)


def _parameters(net: nn.Module) -> int:
    """Parameters of the network without its quantizers."""
    ours = {id(p) for _, q in _quantizers(net) for p in q.parameters()}
    return sum(p.numel() for p in net.parameters() if id(p) not in ours)


def _constants(net: nn.Module) -> int:
    """32-bit numbers that the quantizers need in use."""
    return sum(quantizer.constants() for _, quantizer in _quantizers(net))


def _quantizers(net: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, quantizer)
        for name, layer in quant_layers(net)
        for quantizer in (layer.weight_quantizer, layer.act_quantizer)
        if quantizer is not None
    ]
