from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qatbench.bench.data import Batch, DataModule
from qatbench.bench.errors import RunFailed
from qatbench.bench.method import Method, Run
from qatbench.bench.quant import QuantLayer
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, same, state, train
from qatbench.methods.tau_norm import GRID, TauNorm, row_norms
from tails import tailed, without_linear_head
from torch import nn


class TestTauNorm(MethodContract):
    method = "tau-norm+lsq"


def at(tau: float | None, inner: str = "lsq", **settings: object) -> tuple[Method, DataModule]:
    return ready(f"tau-norm+{inner}", params={"tau-norm": {"tau": tau}}, **settings)


def used_head(method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight as the head uses it, and bias."""
    head = method.net.get_submodule("head")
    assert isinstance(head, QuantLayer)
    return head.weight_quantizer(head.weight).detach(), head.bias.detach()


def features_and_logits(method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's quantized input on the probe batch, and what the method predicts."""
    seen: list[torch.Tensor] = []
    handle = method.net.get_submodule("head").act_quantizer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    found = logits(method, method.net, method.probe)
    handle.remove()
    return seen[0], found


INNER = ["lsq", "dorefa", "adq", "lsqplus"]


@pytest.mark.parametrize("inner", INNER)
def test_tau_norm_0_is_identity_without_bias(inner: str) -> None:
    """The control of the search would not be the inner method without its bias."""
    method, _ = at(0.0, inner)
    plain, _ = ready(inner)
    expected = logits(plain, plain.net, plain.probe) - used_head(method)[1]
    torch.testing.assert_close(logits(method, method.net, method.probe), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", INNER)
def test_tau_norm_1_has_unit_norms(inner: str) -> None:
    """Rows would be divided by other norms than those of the weight in use, or the bias would stay."""
    method, data = at(1.0, inner, epochs=1, first_last="same")
    Loop(method, data).epoch(list(data.train_dataloader())[:3])
    method.eval()
    weight, _ = used_head(method)
    rows = weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    features, found = features_and_logits(method)
    torch.testing.assert_close(found, features @ rows.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", INNER)
def test_tau_norm_follows_weights_that_a_probe_moves(inner: str) -> None:
    """The landscape would be that of a head which divides by the norms of other weights: steeper than the network in use."""
    method, _ = at(1.0, inner, first_last="same")
    head, noted = method.eval().net.get_submodule("head"), method.norms.clone()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([4.0, 2.0, 1.0, 0.7])[:, None])
    weight, _ = used_head(method)
    features, found = features_and_logits(method)
    expected = features @ (weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(method.norms, noted)


def test_tau_norm_gradient_is_that_of_the_moved_weights() -> None:
    """A curvature would be of gradients of another function: along a row of norm 1 the logits do not change."""
    method, _ = at(1.0, "fp32")
    head = method.eval().net.get_submodule("head")
    logit = method.predict(method.net, method.probe).square().sum()
    (grad,) = torch.autograd.grad(logit, [head.weight])
    assert grad.abs().max() > 1e-3
    assert ((grad * head.weight).sum(1).abs() < 1e-4 * grad.norm(dim=1) * head.weight.norm(dim=1)).all()


def test_tau_norm_of_a_deployed_head() -> None:
    """A network of integer codes, which shows no weights, would be divided by something else."""
    method, _ = at(1.3, first_last="same")
    method.eval()
    integer = method.deploy(Run(method))
    assert method.present_norms(integer) is method.norms
    ours, theirs = (logits(method, net, method.probe) for net in (method.net, integer))
    torch.testing.assert_close(ours, theirs)


def test_tau_norm_rows_of_zeros() -> None:
    """A row that few bits make all zero would predict NaN, which argmax takes for the largest."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0], [3.0, 4, 0]]))
    assert row_norms(layer).tolist() == [1, 5]


def test_tau_norm_training_is_the_inner_methods(tmp_path: Path) -> None:
    """A method that acts in use alone would have other weights."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = at(None, epochs=1)
    train(wrapped, data, tmp_path / "wrapped")
    ours = alone.net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in wrapped.net.state_dict().items())


def measured(method: Method, data: DataModule) -> list[float]:
    """Balanced accuracy of the validation images at each tau, by the harness's own meter."""
    assert isinstance(method, TauNorm)
    scores, chosen = [], method.tau.clone()
    for tau in GRID:
        method.tau.fill_(tau)
        each = []
        for loader in data.val_dataloader():
            meter = method.task.meter("cpu")
            for batch in loader:
                meter.update(logits(method, method.net, batch), batch.y)
            each.append(meter.compute()["bacc"])
        scores.append(sum(each) / len(each))
    method.tau.copy_(chosen)
    return scores


def test_tau_norm_choice_is_the_best_on_validation_images(tmp_path: Path) -> None:
    """It would be chosen by another number than the table's, or on other images."""
    method, data = at(None, bits="w4a4", epochs=2)
    train(method, data, tmp_path)
    head = method.net.get_submodule("head")
    with torch.no_grad():  # as after a long tail: long rows for some classes
        head.weight.mul_(torch.tensor([4.0, 2.0, 1.0, 0.7])[:, None])
        head.weight_quantizer.fit(head.weight)
    method.measure(method.net)
    run = Run(method)
    scores = measured(method, data)
    assert max(scores) > min(scores)
    assert method.balanced_accuracies(run) == pytest.approx(scores)
    method.validated(run, {})
    assert float(method.tau) == pytest.approx(GRID[scores.index(max(scores))])


def test_tau_norm_choosing_moves_nothing_else(tmp_path: Path) -> None:
    """Looking at validation images would train on them, or leave norms in the wrong mode for the next epoch."""
    method, data = at(None, epochs=1)
    train(method, data, tmp_path)
    method.train()
    method.net.get_submodule("bn1").eval()
    before, modes, rng = state(method), [m.training for m in method.modules()], torch.get_rng_state()
    method.validated(Run(method), {})
    assert set(same(before, state(method))) <= {"tau"}
    assert modes == [m.training for m in method.modules()]
    assert torch.equal(rng, torch.get_rng_state())


def test_tau_norm_a_given_tau_stays(tmp_path: Path) -> None:
    """The setting would be overridden by the search."""
    method, data = at(0.7, epochs=1)
    train(method, data, tmp_path)
    assert float(method.tau) == pytest.approx(0.7)


def test_tau_norm_without_validation_images(tmp_path: Path) -> None:
    """The power would stay at its start without a word, and the row be named tau-norm."""
    for tau in (None, 1.0):
        method, data = at(tau, epochs=1)
        data.val_domains = ()
        if tau is None:
            with pytest.raises(RunFailed, match=r"chooses tau on validation images.*give tau-norm.tau"):
                Loop(method, data).epoch(list(data.train_dataloader())[:1])
        else:
            Loop(method, data).epoch(list(data.train_dataloader())[:1])


def test_tau_norm_a_domain_or_class_absent_from_validation(tmp_path: Path) -> None:
    """0 / 0 would make every score NaN, and tau the first of the grid."""
    method, data = at(None, epochs=1)
    train(method, data, tmp_path)
    batches = [b.select(b.y != 2) for b in Run(method).val_batches() if int(b.domain[0]) != 1]
    run = Run(method)
    run.val_batches = lambda: iter(batches)  # type: ignore[method-assign]
    assert all(0 <= score <= 1 for score in method.balanced_accuracies(run))


def test_tau_norm_leaves_a_second_head_alone() -> None:
    """Superclasses would lose their bias, or be divided by norms of which nobody chose the power."""
    method, plain = (tailed(chain, coarse=True) for chain in ("tau-norm+lsq", "lsq"))
    method.tau.fill_(1.5)
    ours, theirs = logits(method, method.net, method.probe), logits(plain, plain.net, plain.probe)
    assert torch.equal(ours[:, 4:], theirs[:, 4:])
    assert not torch.equal(ours[:, :4], theirs[:, :4])


def test_tau_norm_without_a_linear_head() -> None:
    """The run would end in a traceback, or normalise something else."""
    with pytest.raises(RunFailed, match="does not end in a linear layer"):
        without_linear_head("tau-norm+lsq")


def test_tau_norm_is_shipped(tmp_path: Path) -> None:
    """The integer file would decide as if tau were 0."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from qatbench.bench.export import Session, export_method

    method, data = at(1.3, bits="w4a4", epochs=2)
    train(method, data, tmp_path)
    method.eval()
    batch: Batch = all_train(data)
    ours = logits(method, method.net, batch)
    found = Session(export_method(method, batch.x).model)(batch.x)
    assert (found.argmax(1) == ours.argmax(1)).float().mean() > 0.97
    assert (found - ours).abs().mean() < 0.05 * ours.std()
