"""What a bit plan costs: average bits, bit operations and bytes, computed from the plan and never claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..site import Site
from ..spec import FLOAT_BITS


class Bits(NamedTuple):
    """Bits of a layer's weight and of its input; 32 is float."""

    w: int
    a: int


def edge_bits(policy: str, bits: Bits) -> Bits:
    """Bits of the first and the last layer under a ``first_last`` policy (``8bit``, ``fp``, ``same``).

    What is float in the other layers is float there, too: w2a32 leaves every input in float.
    """
    width = {"8bit": 8, "fp": FLOAT_BITS}.get(policy)
    return bits if width is None else Bits(*(width if b < FLOAT_BITS else FLOAT_BITS for b in bits))


def cost(sites: Sequence[Site], plan: Mapping[str, Bits], parameters: int) -> dict[str, float]:
    """The cost of one network under a plan.

    Args:
        sites: The network's sites; layers count.
        plan: Layer -> bits. A layer that the plan does not name is float.
        parameters: How many parameters the deployed network has; those that are no quantized weight are stored as 32-bit floats.

    Returns:
        ``avg_bits_weight``, over the weights of all layers; ``avg_bits_weight_inner``, without first and last layer;
        ``avg_bits_act``, over the elements of all layer inputs; ``bops``, bit operations an image: the sum of
        macs x weight bits x activation bits (Baskin et al. 2021, arXiv 1804.10969, without the accumulator's term);
        ``size_bytes``, of the parameters.
    """
    layers = [(site, plan.get(site.name, Bits(FLOAT_BITS, FLOAT_BITS))) for site in sites if site.kind == "layer"]
    inner = [(site, bits) for site, bits in layers if not site.edge] or layers
    quantized = sum(site.weights for site, _ in layers)
    weight_bits = sum(site.weights * bits.w for site, bits in layers)
    return {
        "avg_bits_weight": weight_bits / quantized,
        "avg_bits_weight_inner": sum(s.weights * b.w for s, b in inner) / sum(s.weights for s, _ in inner),
        "avg_bits_act": sum(s.inputs * b.a for s, b in layers) / sum(s.inputs for s, _ in layers),
        "bops": float(sum(site.macs * bits.w * bits.a for site, bits in layers)),
        "size_bytes": (weight_bits + FLOAT_BITS * max(parameters - quantized, 0)) / 8,
    }
