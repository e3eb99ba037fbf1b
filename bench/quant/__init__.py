"""The arithmetic of quantization: quantizers, the layers that hold them, bit plans and what they cost."""

from .cost import Bits, cost, edge_bits
from .layer import IntegerLayer, QuantLayer, calibrate, count_levels, deployed, quant_layers, swap
from .quantizer import Quantizer, Scope, snap
from .uniform import UniformQuantizer, round_ste

__all__ = [
    "Bits",
    "IntegerLayer",
    "QuantLayer",
    "Quantizer",
    "Scope",
    "UniformQuantizer",
    "calibrate",
    "cost",
    "count_levels",
    "deployed",
    "edge_bits",
    "quant_layers",
    "round_ste",
    "snap",
    "swap",
]
