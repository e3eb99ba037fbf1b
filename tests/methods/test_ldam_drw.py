from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.data import Batch
from qatbench.bench.errors import RunFailed
from qatbench.bench.quant import Bits, QuantLayer, audit, cost
from qatbench.bench.quant.integer import check_integers
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, train
from qatbench.methods.ldam_drw import CosineHead, margins
from tails import ABSENT, TAIL, gradient, losses_of, some_logits, tailed, without_linear_head
from torch import nn
from torch.nn import functional as F


class TestLDAMDRW(MethodContract):
    method = "ldam-drw+lsq"


def ldam(counts: tuple[int, ...] = TAIL, **params: float):
    return tailed("ldam-drw+lsq", counts, params={"ldam-drw": params})


# --- margins and weights ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=30), st.floats(0.01, 1))
@settings(deadline=None, derandomize=True, database=None, max_examples=25)
def test_ldam_drw_rarest_class_has_the_largest_margin(counts: list[int], largest: float) -> None:
    """Margins would be on another scale than the cosines', or grow with a class's images."""
    found, n = margins(counts, largest).double(), torch.tensor(counts).double()
    assert float(found.max()) == pytest.approx(largest)
    assert float(found[n.argmin()]) == pytest.approx(largest)
    torch.testing.assert_close(found * n**0.25, (found * n**0.25)[:1].expand(len(n)), rtol=1e-5, atol=0)


def test_ldam_drw_default_margin_is_one_half() -> None:
    """The default would be another method than the paper's code."""
    assert ldam().margin.tolist() == pytest.approx([0.5 * (8 / n) ** 0.25 for n in TAIL])


def test_ldam_drw_margin_is_subtracted_from_the_true_logit() -> None:
    """Margins would help the own class, or be a thirtieth of what they should be."""
    method, (scores, batch) = ldam(max_m=0.4, s=20.0), some_logits()
    moved = scores.detach().clone()
    for k, y in enumerate(batch.y.tolist()):
        moved[k, y] -= 20 * 0.4 * (8 / TAIL[y]) ** 0.25
    method.scope.epochs = 10
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], F.cross_entropy(moved, batch.y))


def test_ldam_drw_without_margin_is_cross_entropy_of_scaled_cosines() -> None:
    """Something else would be left when the margins are switched off."""
    method = ldam(max_m=0.0, s=17.0)
    method.scope.epochs = 10
    features: list[torch.Tensor] = []
    head = method.net.get_submodule("head")
    head.linear = nn.Linear(32, 4, bias=False)  # in float
    head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    found = logits(method, method.net, method.probe)
    cosines = F.cosine_similarity(features[0][:, None], head.linear.weight[None], dim=2)
    torch.testing.assert_close(found, 17 * cosines, rtol=1e-4, atol=1e-4)
    task = losses_of(method, found, method.probe)["task"]
    torch.testing.assert_close(task, F.cross_entropy(17 * cosines, method.probe.y))


def test_ldam_drw_weights_are_deferred_and_sum_to_the_number_of_classes() -> None:
    """Re-weighting would start at once, which the paper found to be worse; or change the learning rate."""
    method, (scores, batch) = ldam(max_m=0.0), some_logits()
    each = F.cross_entropy(scores, batch.y, reduction="none")
    assert float(method.weight.sum()) == pytest.approx(4)
    n = torch.tensor(TAIL).double()
    raw = (1 - 0.9999) / (1 - 0.9999**n)
    torch.testing.assert_close(method.weight, (4 * raw / raw.sum()).float())
    method.scope.epochs = 10
    for epoch, weight in ((0, torch.ones(4)), (7, torch.ones(4)), (8, method.weight), (9, method.weight)):
        method.scope.epoch = epoch
        torch.testing.assert_close(losses_of(method, scores, batch)["task"], (weight[batch.y] * each).mean())


def test_ldam_drw_on_balanced_data_weighs_nothing() -> None:
    """A difference on long-tailed data would prove nothing."""
    method, (scores, batch) = ldam((7, 7, 7, 7), drw=0.0, max_m=0.0), some_logits()
    method.scope.epochs = 10
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], F.cross_entropy(scores, batch.y))


@pytest.mark.parametrize("drw", [0.0, 1.0])
def test_ldam_drw_a_class_without_images(drw: float) -> None:
    """A margin or a weight would be infinite; or the rarest class that occurs would not have the largest margin."""
    method, (scores, batch) = ldam(ABSENT, drw=drw), some_logits()
    method.scope.epochs = 10
    assert method.margin.isfinite().all()
    assert float(method.margin[3]) == pytest.approx(0.5)
    task = losses_of(method, scores, batch)["task"]
    assert task.isfinite()
    assert gradient(task, scores).isfinite().all()


def test_ldam_drw_leaves_the_second_heads_loss_alone() -> None:
    """Superclasses would have the margins of classes."""
    method, plain = tailed("ldam-drw+lsq", coarse=True), tailed("lsq", coarse=True)
    scores, batch = some_logits(6)
    assert torch.equal(losses_of(method, scores, batch)["coarse"], losses_of(plain, scores, batch)["coarse"])
    assert logits(method, method.net, method.probe).shape[1] == 6


# --- the cosine head --------------------------------------------------------------------------------------------------


def head_of(method) -> CosineHead:
    head = method.net.get_submodule("head")
    assert isinstance(head, CosineHead)
    return head


@pytest.mark.parametrize("inner", ["lsq", "dorefa", "adq"])
@pytest.mark.parametrize("bits", ["w2a8", "w4a4"])
def test_ldam_drw_rows_are_normalised_as_they_are_used(inner: str, bits: str) -> None:
    """Logits would not be cosines of the quantized weight: DoReFa's rows are ten times longer than the latent ones."""
    method, data = ready(f"ldam-drw+{inner}", bits=bits, first_last="same", epochs=1)
    Loop(method, data).epoch(list(data.train_dataloader())[:3])
    method.eval()
    head, seen = head_of(method), []
    assert isinstance(head.linear, QuantLayer)
    head.linear.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    found = logits(method, method.net, method.probe)
    x, weight = seen[0], head.linear.weight_quantizer(head.linear.weight)
    norms = weight.norm(dim=1)
    assert torch.all(norms > 0)
    expected = 30 * (head.linear.act_quantizer(x) / x.norm(dim=1, keepdim=True)) @ (weight / norms[:, None]).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.norms, norms)


def test_ldam_drw_a_weight_is_quantized_once_a_pass() -> None:
    """A method that draws random numbers would be given the norms of another weight, and one that counts passes count two."""
    method, _ = ready("ldam-drw+lsq")
    calls: list[int] = []
    head_of(method).linear.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    method.train().compute_losses(method.probe, track=True)["task"].backward()
    assert len(calls) == 1
    assert len(head_of(method).linear.weight_quantizer._forward_hooks) == 1  # ours is gone


def test_ldam_drw_rows_and_features_of_zeros() -> None:
    """A row that few bits make all zero, or a blank feature, would end the run with NaN or a gradient of 10^12."""
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    head = CosineHead(layer, 30.0)
    x = torch.zeros(2, 5)
    x[1] = 1.0
    x.requires_grad_()
    out = head(x)
    assert torch.equal(out, torch.zeros(2, 3))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert head.linear.weight.grad.abs().max() < 100


def test_ldam_drw_starts_from_the_float_heads_directions() -> None:
    """The classifier would forget what the float network learned; or be drawn, and shift all later random numbers."""
    torch.manual_seed(3)
    layer = nn.Linear(5, 3)
    before = torch.get_rng_state()
    head = CosineHead(layer, 30.0)
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(4, 5)
    torch.testing.assert_close(head(x), 30 * F.cosine_similarity(x[:, None], layer.weight[None], dim=2))
    torch.testing.assert_close(head(2 * x), head(x))
    torch.testing.assert_close(head.linear.weight.norm(dim=1), torch.ones(3))


def test_ldam_drw_the_head_is_a_site_like_any_other() -> None:
    """The classifier would stay in float without a word, or its cost be missing from the table."""
    method, _ = ready("ldam-drw+lsq", bits="w4a4", first_last="8bit")
    site = next(s for s in method.sites if s.name == "head.linear")
    assert site.edge
    assert not site.signed_input
    assert method.bit_plan["head.linear"] == Bits(8, 8)
    plain, _ = ready("lsq", bits="w4a4", first_last="8bit")
    ours, theirs = (cost(m.sites, m.bit_plan, m.net) for m in (method, plain))
    assert ours["bops"] == theirs["bops"]
    assert ours["avg_bits_weight"] == theirs["avg_bits_weight"]
    levels = audit(method.net, method.probe.x)
    assert levels["head.linear"][0] is not None


@pytest.mark.parametrize(("policy", "bits"), [("native", 32), ("fp", 32), ("8bit", 8), ("same", 4)])
def test_ldam_drw_classifier_is_float_unless_the_run_says_otherwise(policy: str, bits: int) -> None:
    """The paper's float classifier would be quantized, or the policy that all methods share not be kept."""
    method, _ = ready("ldam-drw+lsq", bits="w4a4", first_last=policy)
    assert method.bit_plan["head.linear"] == Bits(bits, bits)


def test_ldam_drw_under_a_budget_that_includes_the_head() -> None:
    """A mixed-precision plan would look for a layer that the float network does not have."""
    method, _ = ready("ldam-drw+lsq", bits="avg3", first_last="same")
    layers = [s for s in method.sites if s.kind == "layer"]
    assert sum(s.weights * method.bit_plan[s.name].w for s in layers) <= 3 * sum(s.weights for s in layers)
    assert method.bit_plan["head.linear"].w < 32


def test_ldam_drw_without_a_linear_head() -> None:
    """The run would be plain cross-entropy under the name of LDAM."""
    with pytest.raises(RunFailed, match="ldam-drw changes nothing"):
        without_linear_head("ldam-drw+lsq")


def test_ldam_drw_is_shipped(tmp_path: Path) -> None:
    """The integer file would predict otherwise than what was measured: it has codes, and no norms of its own."""
    method, data = ready("ldam-drw+lsq", bits="w4a4", epochs=2)
    train(method, data, tmp_path)
    method.eval()
    batch: Batch = all_train(data)
    ours = logits(method, method.net, batch)
    assert check_integers(method.net, batch.x)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from qatbench.bench.export import Session, export_float, export_method

    found = Session(export_method(method, batch.x).model)(batch.x)
    assert (found.argmax(1) == ours.argmax(1)).float().mean() > 0.97
    assert (found - ours).abs().mean() < 0.01 * 30
    assert math.isfinite(float(Session(export_float(method, batch.x))(batch.x).sum()))
