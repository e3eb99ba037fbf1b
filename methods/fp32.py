"""The float network, trained on for as long as every quantized method trains: what quantization is held against."""

from __future__ import annotations

from ..bench.method import Method


class FP32(Method):
    """No quantization. The float starting network trains on for the epochs, and at the learning rate, that the others get.

    Without these extra epochs "within a point of float" is nearly free.
    """

    name = "fp32"
    changes_net = False
    bits = (32,)
