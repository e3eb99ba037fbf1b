from __future__ import annotations

from qatbench.bench.quant import quant_layers
from qatbench.bench.testing import MethodContract, float_net, ready, state


class TestFP32(MethodContract):
    method = "fp32"


def test_nothing_is_quantized() -> None:
    """The float row of every table would be a quantized network."""
    method, _ = ready("fp32")
    assert not list(quant_layers(method.net))
    assert set(method.bit_plan.values()) == {(32, 32)}
    assert {f"net.{name}" for name in float_net().state_dict()} == set(state(method))
