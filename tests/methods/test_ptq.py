from __future__ import annotations

import pytest
import torch
from qatbench.bench.quant import quant_layers
from qatbench.bench.testing import MethodContract, all_train, float_net, logits, ready


class TestPTQ(MethodContract):
    method = "ptq"


def test_nothing_is_learned() -> None:
    """Post-training quantization would have a parameter that training could move."""
    method, _ = ready("ptq")
    assert {n for n, _ in method.net.named_parameters()} == {n for n, _ in float_net().named_parameters()}


def test_two_bits_are_four_levels_by_default_and_by_full() -> None:
    """The baseline would be weaker than PyTorch's own: three of four levels, from the largest weight."""
    errors = {}
    for rule in ("mse", "full", "minmax"):
        params = {} if rule == "mse" else {"weight_range": rule}
        method, _ = ready("ptq", params={"ptq": params}, bits="w2a2", first_last="same")
        layers = [layer for _, layer in quant_layers(method.net)]
        errors[rule] = [float((q.weight_quantizer(q.weight) - q.weight).detach().square().mean()) for q in layers]
        codes = layers[1].weight_quantizer.encode(layers[1].weight)[0].unique().tolist()
        assert codes == ([-1, 0, 1] if rule == "minmax" else [-2, -1, 0, 1])
    assert all(m <= 1.001 * min(f, n) for m, f, n in zip(errors["mse"], errors["full"], errors["minmax"], strict=True))
    assert sum(errors["full"]) < sum(errors["minmax"])


@pytest.mark.parametrize("rule", ["minmax", "percentile"])
def test_steps_come_from_the_probe(rule: str) -> None:
    """A setting of the range would have no effect; or every layer would be rounded to a grid that does not fit it."""
    params = {"range": rule, "weight_range": rule, "percentile": 95.0}
    method, _ = ready("ptq", params={"ptq": params}, bits="w4a4", first_last="same")
    layers = dict(quant_layers(method.net))
    first = next(iter(layers.values()))
    for quantizer, value in ((first.weight_quantizer, first.weight), (first.act_quantizer, method.probe.x)):
        size = value.detach().abs().flatten()
        edge = size.max() if rule == "minmax" else size.kthvalue(round(0.95 * size.numel())).values
        assert quantizer.step.item() == pytest.approx(edge.item() / 7)
    assert len(layers) == sum(s.kind == "layer" for s in method.sites)


def test_more_bits_are_closer_to_float() -> None:
    """A table would show ptq at 2 bits above ptq at 8: the bits would not reach the network."""
    errors = []
    for bits in (2, 4, 8):
        method, data = ready("ptq", bits=f"w{bits}a{bits}", first_last="same")
        batch = all_train(data)
        float_logits = logits(method, float_net(), batch)
        errors.append((logits(method, method.net, batch) - float_logits).pow(2).mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_float_weights_stay() -> None:
    """Rounding would be written into the float weights, and a second calibration would start from them."""
    method, _ = ready("ptq")
    ours = method.net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in float_net().state_dict().items())
