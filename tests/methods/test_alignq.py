from __future__ import annotations

import torch
from qatbench.bench.quant import CdfQuantizer, RunningCdfQuantizer, quant_layers
from qatbench.bench.testing import MethodContract, ready


class TestAlignQ(MethodContract):
    method = "alignq"


def test_alignq_is_the_cdf_with_autograd_through_its_statistics() -> None:
    """AlignQ would be EmaQ under another name: the gradient is what tells them apart."""
    method, _ = ready("alignq")
    for _, layer in quant_layers(method.net):
        assert isinstance(layer.weight_quantizer, CdfQuantizer)
        assert isinstance(layer.act_quantizer, RunningCdfQuantizer)
        assert layer.weight_quantizer.through
        assert layer.act_quantizer.through
        assert layer.act_quantizer.domains == 1


def test_alignq_native_policy_is_the_code_s() -> None:
    """`first_last=native` would not be what the code does: all convolutions at m bits, the classifier in float."""
    method, _ = ready("alignq", first_last="native", bits="w2a2")
    widths = list(method.bit_plan.values())
    assert {tuple(b) for b in widths[:-1]} == {(2, 2)}
    assert tuple(widths[-1]) == (32, 32)


def test_alignq_layers_without_a_norm_keep_their_scale() -> None:
    """The classifier's logits would be many times those of the float network, and training start from a lost one."""
    method, _ = ready("alignq", first_last="8bit")
    head = dict(quant_layers(method.net))["head"]
    _, decode = head.weight_quantizer.encode(head.weight)
    torch.testing.assert_close(decode(torch.tensor(255)), 2 * head.weight.detach().std())
