"""The arithmetic of quantization: quantizers, the layers that hold them, bit plans and what they cost."""

from ..spec import Bits, Budget
from .cdf import CdfQuantizer, RunningCdfQuantizer
from .cost import cost
from .grid import grid_codes, redo_grid, round_to_grid
from .layer import IntegerLayer, QuantLayer, audit, calibrate, deployed, quant_layers, swap
from .quantizer import Decode, Quantizer, Scope, snap
from .uniform import UniformQuantizer, closest_step, round_ste

__all__ = [
    "Bits",
    "Budget",
    "CdfQuantizer",
    "Decode",
    "IntegerLayer",
    "QuantLayer",
    "Quantizer",
    "RunningCdfQuantizer",
    "Scope",
    "UniformQuantizer",
    "audit",
    "calibrate",
    "closest_step",
    "cost",
    "deployed",
    "grid_codes",
    "quant_layers",
    "redo_grid",
    "round_ste",
    "round_to_grid",
    "snap",
    "swap",
]
