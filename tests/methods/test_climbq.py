from __future__ import annotations

import pytest
import torch
from qatbench.bench.chain import members
from qatbench.bench.errors import UserError
from qatbench.bench.quant import CdfQuantizer, quant_layers
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.emaq_lt import ConditionalInput
from tails import losses_of, some_logits, tailed
from torch.nn import functional as F


class TestClimbQ(MethodContract):
    method = "climbq"


def test_climbq_has_the_gradient_of_the_cdf_and_one_set_of_statistics() -> None:
    """ClimbQ would be EmaQ-LT under another name: other gradients, a client for each domain."""
    method, _ = ready("climbq")
    for _, layer in quant_layers(method.net):
        assert isinstance(layer.weight_quantizer, CdfQuantizer)
        assert isinstance(layer.act_quantizer, ConditionalInput)
        assert layer.weight_quantizer.through
        assert layer.act_quantizer.through
        assert layer.act_quantizer.domains == 1
    assert not any(name.endswith("running_mean") and value.ndim > 1 for name, value in method.net.named_buffers())


def test_climbq_s_is_the_code_s() -> None:
    """Training and use would differ: the code's s is about 2 in both, since it divides a class's share by the batch's sum."""
    quantizer = dict(quant_layers(tailed("climbq").net))["head"].act_quantizer
    labels = torch.tensor([0, 0, 1, 3])
    quantizer.scope.labels, share = labels, F.one_hot(labels, 4).float().mean(0)[labels]
    quantizer.statistics(torch.randn(4, 5))
    expected = 2 - share / share.sum()
    torch.testing.assert_close(expected, 2 - torch.tensor([2, 2, 1, 1]) / 6)
    torch.testing.assert_close(quantizer.train().spread(torch.tensor(3.0)).flatten(), 3 * expected)
    assert float(quantizer.eval().spread(torch.tensor(3.0))) == 6


def test_climbq_loss_is_binary_cross_entropy_of_the_softmax() -> None:
    """The loss would not be the one of the code, weighted by class and averaged over images and classes."""
    method, (scores, batch) = tailed("climbq"), some_logits()
    method.omega.copy_(torch.tensor([0.1, 0.5, 2.0, 1.4]))
    weight = method.omega[batch.y][:, None].expand(-1, 4)
    expected = F.binary_cross_entropy(scores.softmax(1), F.one_hot(batch.y, 4).float(), weight=weight)
    found = losses_of(method, scores, batch)["task"]
    torch.testing.assert_close(found, expected)
    certain = torch.tensor([[200.0, 0, 0, -200]]).requires_grad_()
    loss = losses_of(method, certain, batch.select(torch.tensor([1])))["task"]
    loss.backward()
    assert loss.isfinite()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_climbq_native_policy_is_the_code_s() -> None:
    """`first_last=native` would not be the policy of the paper's tables: all convolutions at m bits, a float classifier."""
    widths = list(ready("climbq", first_last="native", bits="w2a2")[0].bit_plan.values())
    assert {tuple(b) for b in widths[:-1]} == {(2, 2)}
    assert tuple(widths[-1]) == (32, 32)


@pytest.mark.parametrize("name", ["cla", "loss", "aggregation", "norm", "aqgd_norm"])
def test_climbq_settings_that_are_fixed_are_refused(name: str) -> None:
    """A run would be called ClimbQ and train by something else, or a setting do nothing."""
    with pytest.raises(UserError, match=name):
        ready("climbq", params={"climbq": {name: "none"}})


def test_climbq_composes_with_what_alters_logits() -> None:
    """It would be refused as a base of wrappers that it does not clash with, or taken by one that replaces its loss."""
    assert [cls.name for cls in members("logit-adjust+climbq")] == ["logit-adjust", "climbq"]
    with pytest.raises(UserError, match="both alter the loss"):
        members("cb-focal+climbq")
