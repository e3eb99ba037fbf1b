from __future__ import annotations

import torch
from qatbench.bench.quant import CdfQuantizer, RunningCdfQuantizer, quant_layers
from qatbench.bench.testing import Loop, MethodContract, ready
from qatbench.methods.alignq import admm_loss, admm_step, correlation, distortion


class TestAlignQ(MethodContract):
    method = "alignq"


X = torch.tensor([[0.2, -1.0, 0.5, 1.2], [1.0, 0.3, -0.7, 0.1], [-0.4, 0.8, 0.9, -1.5]])
GOLDEN_D = torch.tensor(
    [[0.01119, -0.002971, -0.008219], [-0.002971, -0.008219, 0.01119], [-0.008219, 0.01119, -0.002971]]
)


def test_admm_term_is_the_public_code_s() -> None:
    """The term would be another one than the authors': other weights, another norm, a biased deviation."""
    D = correlation(2 * (2 * torch.special.ndtr(X) - 1)) - correlation(X)  # noqa: N806  as there: by the CDF of N(0, 1)
    torch.testing.assert_close(D, GOLDEN_D, rtol=0, atol=2e-6)
    relaxed, multiplier = torch.arange(1, 10).view(3, 3) / 10, torch.full((3, 3), 0.5)
    torch.testing.assert_close(admm_loss(D, relaxed, multiplier, 0.2, 0.3), torch.tensor(0.434419), rtol=0, atol=2e-6)
    relaxed, multiplier = admm_step(D, relaxed, multiplier, 0.2, 0.3)
    torch.testing.assert_close(relaxed[0], torch.tensor([1.454145, 1.441872, 1.437324]), rtol=0, atol=5e-6)
    torch.testing.assert_close(multiplier[0], torch.tensor([0.067113, 0.066547, 0.066337]), rtol=0, atol=5e-6)


def test_distortion_is_of_the_quantizers_cdf() -> None:
    """What is kept would be the correlation behind another CDF than the one that the quantizer applies."""
    mean, std = X.mean(), X.std()
    torch.testing.assert_close(distortion(X), correlation(torch.special.ndtr((X - mean) / std)) - correlation(X))
    torch.testing.assert_close(distortion(X), distortion(3 * X + 7), rtol=0, atol=1e-5)


def test_admm_gradients_stay_finite_where_nothing_varies() -> None:
    """A channel that is dead for a whole batch, or a place where D' has reached D, would make every weight NaN."""
    for x in (torch.zeros(3, 4), torch.ones(3, 4), X.relu().index_fill(1, torch.tensor([1]), 0.0)):
        x = x.clone().requires_grad_()
        zero = torch.zeros(3, 3)
        admm_loss(distortion(x), zero, zero, 0.2, 0.3).backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    relaxed, multiplier = admm_step(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3, 3), 0.2, 0.3)
    assert not relaxed.any()
    assert not multiplier.any()


def test_admm_places() -> None:
    """The setting would be without effect, or the term be missing in a network without joints."""
    found = {}
    for admm in ("off", "joints", "layers"):
        method, data = ready("alignq", params={"alignq": {"admm": admm}})
        found[admm] = method.train().compute_losses(next(iter(data.train_dataloader())), track=True)
        kinds = {"off": (), "joints": ("joint",), "layers": ("layer",)}[admm]
        assert len(method.relaxed) == len([site for site in method.sites if site.kind in kinds])
    assert set(found["off"]) == {"task"}
    assert 0 < found["joints"]["admm"] < found["layers"]["admm"]
    assert found["off"]["task"] == found["joints"]["task"] == found["layers"]["task"]
    method, _ = ready("alignq")
    layers = [site for site in method.sites if site.kind == "layer"]
    assert method.taps(layers) == [site.name for site in layers]


def test_admm_state_moves_once_a_step() -> None:
    """D' would stay at its random start, or follow passes that are no step; a batch in parts would not fit."""
    for chain, settings in (("alignq", {}), ("alignq", {"accumulate": 2}), ("sam+alignq", {}), ("kd+alignq", {})):
        method, data = ready(chain, **settings)
        inner = method.members[0]
        before = inner.relaxed.clone()
        batch = next(iter(data.train_dataloader()))
        method.train().compute_losses(batch, track=False)
        assert torch.equal(inner.relaxed, before)
        Loop(method, data).epoch([batch])
        n = len(batch) // settings.get("accumulate", 1)
        moved = inner.relaxed != before
        assert moved[:, :n, :n].all()
        assert not moved[:, n:].any()
        assert float(inner.multiplier[:, :n, :n].mean()) < 0.1  # from 0.5


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
