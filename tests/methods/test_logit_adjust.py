from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qatbench.bench.assemble import assemble
from qatbench.bench.testing import MethodContract, all_train, float_net, logits, ready, train
from tails import ABSENT, TAIL, gradient, losses_of, some_logits, tailed
from torch.nn import functional as F

FORMS = ("loss", "posthoc")


class TestLogitAdjust(MethodContract):
    method = "logit-adjust+lsq"


def adjusted(form: str, tau: float, counts: tuple[int, ...] = TAIL, **more: bool):
    return tailed("logit-adjust+lsq", counts, params={"logit-adjust": {"form": form, "tau": tau}}, **more)


@pytest.mark.parametrize("form", FORMS)
def test_logit_adjust_tau_0_is_identity(form: str) -> None:
    """The ablation's control would not be the inner method."""
    method, plain = adjusted(form, 0.0), tailed("lsq")
    scores, batch = some_logits()
    assert torch.equal(losses_of(method, scores, batch)["task"], losses_of(plain, scores, batch)["task"])
    assert torch.equal(logits(method, method.net, method.probe), logits(plain, plain.net, plain.probe))


@pytest.mark.parametrize("form", FORMS)
def test_logit_adjust_uniform_prior_changes_nothing(form: str) -> None:
    """Balanced data would be learned or decided otherwise, so a difference on long-tailed data would prove nothing."""
    method, plain = adjusted(form, 1.5, (70, 70, 70, 70)), tailed("lsq")
    scores, batch = some_logits()
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], losses_of(plain, scores, batch)["task"])
    ours, theirs = logits(method, method.net, method.probe), logits(plain, plain.net, plain.probe)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("form", FORMS)
def test_logit_adjust_never_both_at_once(form: str) -> None:
    """A class's share would be taken out twice."""
    method, plain = adjusted(form, 1.0), tailed("lsq")
    scores, batch = some_logits()
    trains_alike = torch.equal(losses_of(method, scores, batch)["task"], losses_of(plain, scores, batch)["task"])
    decides_alike = torch.equal(logits(method, method.net, method.probe), logits(plain, plain.net, plain.probe))
    assert (trains_alike, decides_alike) == ((False, True) if form == "loss" else (True, False))


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_logit_adjust_is_the_papers_formula(tau: float) -> None:
    """The sign, or the place of tau, would be another one: rare classes would be pushed down."""
    log_prior = np.log(np.array(TAIL) / sum(TAIL))
    scores, batch = some_logits()
    f = scores.detach().double().numpy() + tau * log_prior
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    rows, own = np.arange(len(batch)), batch.y.numpy()
    task = losses_of(adjusted("loss", tau), scores, batch)["task"]
    assert task.item() == pytest.approx(-np.log(p[rows, own]).mean(), rel=1e-5)
    p[rows, own] -= 1
    np.testing.assert_allclose(gradient(task, scores).numpy(), p / len(batch), atol=1e-6)

    method, plain = adjusted("posthoc", tau), tailed("lsq")
    shift = logits(method, method.net, method.probe) - logits(plain, plain.net, plain.probe)
    np.testing.assert_allclose(shift.numpy(), np.broadcast_to(-tau * log_prior, shift.shape), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_logit_adjust_a_class_without_images(form: str) -> None:
    """The logarithm of nothing would be minus infinity; or the classes after it would get each other's shares."""
    method = adjusted(form, 1.0, ABSENT)
    scores, batch = some_logits()
    task = losses_of(method, scores, batch)["task"]
    assert task.isfinite()
    assert gradient(task, scores).isfinite().all()
    assert logits(method, method.net, method.probe).isfinite().all()
    expected = torch.log(torch.tensor([1000.0, 1, 40, 8]) / 1049)
    torch.testing.assert_close(method.adjustment, expected)


@pytest.mark.parametrize("form", FORMS)
def test_logit_adjust_leaves_a_second_head_alone(form: str) -> None:
    """Superclasses would be adjusted by the counts of classes, or the shapes would not fit."""
    method, plain = adjusted(form, 1.0, coarse=True), tailed("lsq", coarse=True)
    scores, batch = some_logits(6)
    assert torch.equal(losses_of(method, scores, batch)["coarse"], losses_of(plain, scores, batch)["coarse"])
    ours, theirs = logits(method, method.net, method.probe), logits(plain, plain.net, plain.probe)
    assert torch.equal(ours[:, 4:], theirs[:, 4:])
    assert torch.equal(ours[:, :4], theirs[:, :4]) is (form == "loss")


def test_logit_adjust_every_loss_of_the_inner_method_sees_adjusted_logits() -> None:
    """A loss of the inner method would be computed on other logits than the class's own."""
    method = tailed("logit-adjust+cb-focal+lsq", params={"cb-focal": {"beta": 0.0, "gamma": 0.0}})
    scores, batch = some_logits()
    expected = F.cross_entropy(scores + torch.tensor(TAIL).log(), batch.y)
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], expected)


def test_logit_adjust_posthoc_is_shipped(tmp_path: Path) -> None:
    """The integer file would decide without the adjustment."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from qatbench.bench.export import Session, export_method

    _, data = ready("lsq")
    method = adjusted("posthoc", 1.0)
    x = all_train(data).x
    found = Session(export_method(method.eval(), x).model)(x)
    assert (found - logits(method, method.net, all_train(data))).abs().mean() < 0.05
    assert method.adjustment.abs().max() > 1


def test_logit_adjust_posthoc_trains_as_the_inner_method(tmp_path: Path) -> None:
    """The two forms could not be compared: the one that only decides otherwise would have other weights."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = ready("logit-adjust+lsq", epochs=1, params={"logit-adjust": {"form": "posthoc"}})
    train(wrapped, data, tmp_path / "wrapped")
    ours = alone.net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in wrapped.net.state_dict().items())


@pytest.mark.parametrize(
    "chain", ["logit-adjust+lsq", "balanced-softmax+lsq", "cb-focal+lsq", "ldam-drw+lsq", "emaq-lt", "climbq"]
)
def test_the_prior_is_that_of_what_is_trained_on(chain: str) -> None:
    """With domains of unequal size a method would make up for class sizes that no batch has."""
    made, _ = ready(chain, domains=2)
    tables = []
    for counts, by_domain in (
        ((90, 10, 15, 5), ((90, 0, 10, 0), (0, 10, 5, 5))),
        ((54, 30, 21, 15), ()),  # 60 (n_1 / 100 + n_2 / 20)
        ((90, 10, 15, 5), ()),
    ):
        task = replace(made.task, class_counts=counts, domain_counts=by_domain)
        buffers = assemble(made.spec, float_net(), task, made.probe).named_buffers()
        names = ("adjustment", "weight", "margin", "omega", "log_n", "scale")
        tables.append({name: value for name, value in buffers if name.split(".")[-1] in names})
    uneven, same, pooled = tables
    assert uneven
    for name, value in uneven.items():
        torch.testing.assert_close(value, same[name], rtol=1e-6, atol=1e-6)
    assert any(not torch.allclose(value, pooled[name], rtol=1e-3) for name, value in uneven.items())
