from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.chain import build
from qatbench.bench.data import Batch
from qatbench.bench.errors import RunFailed
from qatbench.bench.export import NoIntegerForm, export_method
from qatbench.bench.longtail import tail_counts
from qatbench.bench.method import Method, Run
from qatbench.bench.quant import CdfQuantizer, RunningCdfQuantizer, Scope, quant_layers
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, all_train, check_codes, logits, ready, same, state
from qatbench.methods.cb_focal import class_balanced
from qatbench.methods.emaq import EmaQ, Thresholds
from qatbench.methods.emaq_lt import (
    Conditional,
    ConditionalInput,
    ConditionalNorm,
    class_scale,
    class_weights,
    confidence,
    deviations,
    distance,
    levene_bounds,
    taken_for,
)
from tails import ABSENT, TAIL, gradient, losses_of, some_logits, tailed, without_linear_head
from torch import Tensor
from torch.nn import functional as F

SITE = Site("layer", "layer", (4,), weights=36, inputs=72, norm="bn")
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
COUNTS = st.lists(st.integers(1, 5000), min_size=2, max_size=12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditional(counts: tuple[int, ...] = TAIL, bits: int = 4, domains: int = 1, **how: Any) -> ConditionalInput:
    """A quantizer for activations, in eval mode; the defaults are the method's."""
    how = {"s_train": "class", "s_eval": "const2", "class_ema": False} | how
    return ConditionalInput(bits, SITE, Scope(), scale=class_scale(counts), domains=domains, **how).eval()


def sample(counts: tuple[int, ...], spreads: tuple[float, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of classes of these sizes and deviations, and their labels."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return normal(len(labels), 6, seed=seed) * torch.tensor(spreads)[labels][:, None], labels


def bounds(counts: tuple[int, ...], spreads: tuple[float, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Lower ends, upper ends and C_c of such a sample."""
    features, labels = sample(counts, spreads, seed)
    return levene_bounds(deviations(features, labels, len(counts)), labels, counts, 0.05)


class TestEmaQLT(MethodContract):
    method = "emaq-lt"


# --- (g) 1 and 2: the conditional CDF


@given(COUNTS)
@SMALL
def test_emaq_lt_1_class_scale(counts: list[int]) -> None:
    """Classes would be widened in another order than their sizes, or beyond what Eq. 18 allows."""
    s = class_scale(counts).double()
    assert bool((s > 1).all())
    assert bool((s < 2).all())
    assert float((2 - s).sum()) == pytest.approx(1, abs=1e-5)
    order = torch.tensor(counts).argsort(descending=True)
    assert bool((s[order].diff() >= 0).all())
    equal = class_scale([7] * len(counts))
    torch.testing.assert_close(equal, torch.full_like(equal, 2 - 1 / len(counts)))


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("through", [False, True])
def test_emaq_lt_2_with_s_of_1_the_cdf_is_emaq_s(domains: int, through: bool) -> None:
    """The long-tailed extension would differ from EmaQ in more than s."""
    ours, theirs = (
        conditional(domains=domains, through=through),
        RunningCdfQuantizer(4, SITE, Scope(), domains=domains, through=through),
    )
    ours.scale.fill_(1.0)
    grads = []
    for quantizer in (ours, theirs):
        quantizer.scope.domain, quantizer.scope.labels = torch.arange(12) % domains, torch.arange(12) % 4
        x = normal(12, 3, 5).requires_grad_()
        quantizer.train()(x).mul(normal(12, 3, 5, seed=1)).sum().backward()
        grads.append(x.grad)
    x = normal(12, 3, 5)
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@given(st.floats(1, 2), st.floats(0, 1), st.integers(0, 1000))
@SMALL
def test_emaq_lt_2_a_larger_s_moves_codes_to_the_centre(s: float, more: float, seed: int) -> None:
    """Rare classes would be compressed where the paper widens them."""
    quantizer = conditional(bits=8).train()
    quantizer.scope.labels = torch.zeros(8, dtype=torch.int64)
    x, size = normal(8, 50, seed=seed), []
    for value in (s, s + more):
        quantizer.scale.fill_(value)
        size.append(quantizer(x).abs())
    assert bool((size[1] <= size[0] + 1e-6).all())


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5, 5)])
def test_emaq_lt_2_each_sample_has_the_s_of_its_class(shape: tuple[int, ...]) -> None:
    """An image would be quantized by the CDF of another image's class."""
    labels, x = torch.tensor([3, 0, 0, 1]), normal(*shape)
    quantizer = conditional(bits=8).train()
    quantizer.scope.labels = labels
    mean, std = quantizer.statistics(x)
    s = class_scale(TAIL)[labels].view(-1, *(1,) * (x.ndim - 1))
    place = 255 * torch.special.ndtr((x - mean) / (s * std))
    expected = (place.round() * 2 / 255 - 1) * 2 * std
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-4, atol=2e-2)
    torch.testing.assert_close(quantizer.encode(x)[0].float(), place, atol=0.51, rtol=0)


def test_emaq_lt_2_the_range_does_not_depend_on_the_class() -> None:
    """A code would have several values in one tensor: more than 2^bits levels under the name of `bits`."""
    quantizer, x = conditional(bits=2, s_eval="predicted"), normal(4, 2000)
    quantizer.fit(x)
    quantizer.predicted = torch.arange(4)
    check_codes("conditional", quantizer, x)
    assert quantizer(x).unique().numel() == 4


# --- (g) 3: Levene's test


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.1, 2.0, 30.0])), min_size=1, max_size=7
    ),
    st.integers(0, 1000),
)
@SMALL
def test_emaq_lt_3_bounds_enclose_the_pole(classes: list[tuple[int, float]], seed: int) -> None:
    """NaN would reach the weights, and with them every parameter of the network."""
    counts, spreads = tuple(n for n, _ in classes), tuple(s for _, s in classes)
    features, labels = sample(counts, spreads, seed)
    z = deviations(features, labels, len(counts))
    low, high, c = levene_bounds(z, labels, counts, 0.05)
    d = distance(counts, low, high)
    for values in (low, high, c, d):
        assert values.isfinite().all()
    total = torch.zeros(len(counts), dtype=torch.float64).index_add(0, labels, z)
    grand = (total / torch.tensor(counts)).mean()
    if grand > 0:
        pole = total / grand
        assert bool((low <= pole * (1 + 1e-9)).all())
        assert bool((pole <= high * (1 + 1e-9)).all())
        torch.testing.assert_close(low * high, pole.square(), rtol=1e-9, atol=1e-9)
    for mode in ("paper", "normalised"):
        assert class_weights(d, counts, 0.999, mode).isfinite().all()


def test_emaq_lt_3_bounds_are_where_the_test_s_inequality_turns() -> None:
    """The interval would not be the solution of Theorem 4: at its ends ``n_c (A / n_c - m)^2`` is C_c, with m as measured."""
    counts, spreads = (300, 120, 40), (1.0, 1.02, 0.98)
    features, labels = sample(counts, spreads)
    z = deviations(features, labels, 3)
    low, high, c = levene_bounds(z, labels, counts, 0.05)
    assert bool((c > 0).all())
    total = torch.zeros(3, dtype=torch.float64).index_add(0, labels, z)
    mean = total / torch.tensor(counts)
    for end in (low, high):
        torch.testing.assert_close(end * (total / end - mean.mean()).square(), c, rtol=1e-7, atol=1e-7)
    from scipy.stats import f  # the critical value, by the distribution's own name

    within = (z - mean[labels]).square().sum() / (460 - 3)
    between = torch.tensor(counts) * (mean - mean.mean()).square()
    torch.testing.assert_close(c, 2 * f.ppf(0.95, 2, 457) * within - (between.sum() - between))


def test_emaq_lt_3_equal_classes_leave_plain_cross_entropy() -> None:
    """Balanced data of equal spread would be weighted unequally."""
    half = normal(30, 6)
    features, labels = half.repeat(4, 1), torch.arange(4).repeat_interleave(30)
    d = distance((30,) * 4, *levene_bounds(deviations(features, labels, 4), labels, (30,) * 4, 0.05)[:2])
    assert torch.equal(d, torch.zeros(4, dtype=torch.float64))
    method, (scores, batch) = tailed("emaq-lt", (30,) * 4, params={"emaq-lt": {"cla": "none"}}), some_logits()
    method.omega.copy_(class_weights(d, (30,) * 4, 0.999, "normalised"))
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], F.cross_entropy(scores, batch.y))


def test_emaq_lt_3_the_spec_s_example() -> None:
    """The normal case: with unequal spreads every C_c is negative, where the formula without a guard has NaN."""
    counts = (5000, 1500, 500, 150, 25)
    low, high, _ = bounds(counts, (1.0,) * 5)
    assert not distance(counts, low, high).any()
    low, high, c = bounds(counts, (1.3, 1.1, 1.0, 0.9, 0.7))
    assert bool((c < 0).all())
    torch.testing.assert_close(low, high)
    assert bool((distance(counts, low, high) > 0).all())


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("counts", [(30, 0, 20), (30, 1, 1), (1, 1, 1), (30,), (30, 0)])
def test_emaq_lt_3_classes_without_or_with_one_image(counts: tuple[int, ...], spread: float) -> None:
    """A class that the list has emptied, or features that are all equal, would end in NaN."""
    low, high, c = bounds(counts, (spread,) * len(counts))
    d = distance(counts, low, high)
    assert torch.cat([low, high, c, d]).isfinite().all()
    for mode in ("paper", "normalised", "cb", "none"):
        weight = class_weights(d, counts, 0.999, mode)
        assert weight.isfinite().all()
        assert bool((weight[torch.tensor(counts) > 0] > 0).all())


# --- (g) 4: the classes' weights


@given(st.integers(1, 5000), st.floats(1e-3, 1e9), st.sampled_from([0.8, 0.999, 0.9999]))
@SMALL
def test_emaq_lt_4_weights(n: int, d: float, rho: float) -> None:
    """A class would weigh nothing, or without bound."""
    distances = torch.tensor([d, 1e12, 0.0], dtype=torch.float64)
    weight, limit, inside = class_weights(distances, (n, n, n), rho, "paper").tolist()
    assert 0 < weight <= 1 + 1e-6
    assert weight == pytest.approx((1 - rho ** (1 / d)) / (1 - rho ** (n / d)), rel=1e-3) or d > 1e4
    assert limit == pytest.approx(1 / n, rel=1e-5)
    assert inside == 1
    assert class_weights(distances, (1, 1, 1), rho, "paper").tolist() == pytest.approx([1, 1, 1])
    assert float(class_weights(distances, (n, 3, 5), rho, "normalised").sum()) == pytest.approx(3, rel=1e-5)


def test_emaq_lt_4_the_spec_s_numbers() -> None:
    """The weights would not be those of Eq. 24; or inside all bounds not class-balanced ones, as in ClimbQ's code."""
    d = torch.tensor([500.0, 475, 0], dtype=torch.float64)
    assert class_weights(d, (5000, 25, 9), 0.999, "paper").tolist() == pytest.approx([2.0e-4, 0.040, 1], rel=0.01)
    assert float(class_weights(torch.ones(1), (10**6,), 0.8, "paper")) == pytest.approx(0.2)  # Fig. 8
    inside = class_weights(torch.zeros(4), TAIL, 0.999, "normalised")
    just_outside = class_weights(torch.tensor([0.01, 0, 0.5, 0]), TAIL, 0.999, "normalised")
    torch.testing.assert_close(just_outside, inside)  # the formula itself would make the first class the heaviest
    torch.testing.assert_close(inside, class_balanced(TAIL, 0.999))
    torch.testing.assert_close(inside, class_weights(torch.tensor([9.0, 0, 3, 1]), TAIL, 0.999, "cb"))


# --- (g) 5 and 6: the logits


def test_emaq_lt_5_adjusting_all_logits_changes_nothing() -> None:
    """The control would be no control."""
    (scores, batch), found = some_logits(), {}
    for cla in ("all", "none", "true_logit_train"):
        method = tailed("emaq-lt", params={"emaq-lt": {"cla": cla}})
        loss = losses_of(method, scores, batch)["task"]
        found[cla] = loss, gradient(loss, scores)
    for one, other in zip(found["all"], found["none"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["true_logit_train"][1], found["none"][1], atol=1e-3)


@given(st.integers(0, 1000), st.integers(2, 5000))
@SMALL
def test_emaq_lt_5_confidence(seed: int, n: int) -> None:
    """A class of one image would be adjusted, or a frequent class less than a rare one."""
    scores = normal(20, 4, seed=seed) + 1
    log_n = torch.tensor(float(n)).log()
    assert not confidence(scores, torch.zeros(20)).any()
    less, more = confidence(scores, log_n.expand(20)), confidence(scores, (log_n + 1).expand(20))
    positive = scores.logsumexp(1) > 0
    assert bool((more > less)[positive].all())


def test_emaq_lt_5_a_class_of_one_image_is_left_alone() -> None:
    """A class whose log n is 0 would be adjusted all the same."""
    method = tailed("emaq-lt", (1, 1, 1, 1), params={"emaq-lt": {"omega": "none"}})
    scores, batch = some_logits()
    torch.testing.assert_close(losses_of(method, scores, batch)["task"], F.cross_entropy(scores, batch.y))


def test_emaq_lt_5_only_the_true_logit_is_adjusted() -> None:
    """Eq. 26 would be another method's; and s would have a gradient, which is an option."""
    scores, batch = some_logits()
    method = tailed("emaq-lt")
    s = scores.detach().logsumexp(1) * torch.tensor(TAIL).log()[batch.y]
    expected = scores.detach().clone()
    expected[torch.arange(12), batch.y] -= s
    torch.testing.assert_close(method.adjusted(scores, batch.y), expected)
    own = method.omega[batch.y] / 12 * (expected.softmax(1)[torch.arange(12), batch.y] - 1)
    found = gradient(losses_of(method, scores, batch)["task"], scores)
    torch.testing.assert_close(found[torch.arange(12), batch.y], own)
    flows = tailed("emaq-lt", params={"emaq-lt": {"cla_gradient": True}})
    assert not torch.allclose(gradient(losses_of(flows, scores, batch)["task"], scores), found, atol=1e-3)


def test_emaq_lt_5_post_hoc() -> None:
    """The alternative would adjust in training, too, or not as post-hoc logit adjustment with tau about 1 does."""
    method, data = ready("emaq-lt", params={"emaq-lt": {"cla": "posthoc_classwise"}})
    plain, _ = ready("emaq-lt", params={"emaq-lt": {"cla": "none"}})
    batches = list(data.train_dataloader())[:2]
    assert Loop(method, data).epoch(batches) == Loop(plain, data).epoch(batches)
    f, log_n = logits(plain, plain.net, method.probe), torch.tensor(method.task.class_counts).log()
    lse = f.logsumexp(1, keepdim=True)
    assert 0 < float(method.lse) < 100
    torch.testing.assert_close(logits(method, method.net, method.probe), f - lse / method.lse * log_n)
    twice = tailed("emaq-lt", coarse=True, params={"emaq-lt": {"cla": "posthoc_classwise", "kappa": 0.5}})
    none = tailed("emaq-lt", coarse=True, params={"emaq-lt": {"cla": "none"}})
    f, found = logits(none, none.net, none.probe), logits(twice, twice.net, none.probe)
    lse = f[:, :4].logsumexp(1, keepdim=True)
    torch.testing.assert_close(found[:, :4], f[:, :4] - 0.5 * lse * torch.tensor(TAIL).log())
    assert torch.equal(found[:, 4:], f[:, 4:])


def test_emaq_lt_6_table_xix() -> None:
    """The score would not be the natural logarithm of the class size times the log-sum-exp."""
    scores = torch.full((1, 10), 2.365 - math.log(10))
    assert float(confidence(scores, torch.tensor([5000.0]).log())) == pytest.approx(20.14, abs=0.02)


# --- (g) 7: EmaQ


@pytest.mark.parametrize("domains", [1, 3])
def test_emaq_lt_7_on_balanced_data_it_is_emaq_with_another_spread(
    domains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ablation would measure more than the three parts of the extension."""
    ours = tailed("emaq-lt", (50,) * 4, domains=domains, params={"emaq-lt": {"cla": "none", "omega": "cb"}})
    s = 2 - 1 / 4
    monkeypatch.setattr(RunningCdfQuantizer, "spread", lambda q, std: (s if q.training else 2) * std)
    theirs, data = ready("emaq", domains=domains, params={"emaq": {}})
    batches = list(data.train_dataloader())[:1]
    assert Loop(ours, data).epoch(batches) == pytest.approx(Loop(theirs, data).epoch(batches), rel=1e-5)
    mine = state(ours)
    for name, value in state(theirs).items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_emaq_lt_7_without_its_parts_it_is_emaq() -> None:
    """The ablations of Tables XII and XIII would leave something on."""
    off = {"conditional": False, "omega": "none", "cla": "none"}
    ours, data = ready("emaq-lt", params={"emaq-lt": off})
    theirs, _ = ready("emaq", params={"emaq": {}})
    batches = list(data.train_dataloader())[:2]
    assert Loop(ours, data).epoch(batches) == pytest.approx(Loop(theirs, data).epoch(batches), rel=1e-5)
    mine, other = logits(ours, ours.net, ours.probe), logits(theirs, theirs.net, theirs.probe)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# --- (g) 8: the lists; the rest is in tests/bench/test_longtail.py


@pytest.mark.parametrize(
    ("imbalance", "ten", "hundred"), [(10, 20_425, 18_292), (50, 13_988, 11_761), (200, 11_199, 8_883)]
)
def test_emaq_lt_8_lists(imbalance: int, ten: int, hundred: int) -> None:
    """The tables' long tails would have other images than ours."""
    assert sum(tail_counts([5000] * 10, imbalance, "climbq")) == ten
    assert sum(tail_counts([500] * 100, imbalance, "climbq")) == hundred
    for sizes in ([5000] * 10, [500] * 100):
        counts = tail_counts(sizes, imbalance, "ldam")
        assert counts == sorted(counts, reverse=True)
        assert min(counts) == counts[-1] == math.floor(counts[0] / imbalance) >= 1


# --- s in use


@pytest.mark.parametrize(("s_eval", "s"), [("const2", 2.0), ("expected", None)])
@pytest.mark.parametrize("class_ema", [False, True])
def test_thresholds_are_the_codes(s_eval: str, s: float | None, class_ema: bool) -> None:
    """What is shipped would compute with another s than was measured."""
    quantizer, x = conditional(domains=3, s_eval=s_eval, class_ema=class_ema), normal(12, 3, 4, 4)
    quantizer.scope.domain = torch.arange(12) % 3
    quantizer.fit(x)
    share = torch.tensor(TAIL) / sum(TAIL)
    s = float((share * (2 - share)).sum()) if s is None else s
    torch.testing.assert_close(quantizer.spread(torch.tensor(3.0)), torch.tensor(3 * s))
    table = Thresholds(quantizer).eval()
    for domain in (quantizer.scope.domain, torch.full((12,), -1)):
        quantizer.scope.domain = domain
        assert torch.equal(quantizer.encode(x)[0], table.encode(x)[0])
        assert torch.equal(quantizer(x), table(x))


def test_labels_are_not_used_in_evaluation() -> None:
    """The test would be taken with the answers."""
    for s_eval in ("const2", "expected", "predicted"):
        quantizer, x = conditional(s_eval=s_eval), normal(4, 30)
        quantizer.fit(x)
        without = quantizer(x)
        quantizer.scope.labels = torch.tensor([3, 0, 0, 1])
        assert torch.equal(quantizer(x), without)
        method, data = ready("emaq-lt", params={"emaq-lt": {"s_eval": s_eval}})
        batch = all_train(data)
        swapped = Batch(batch.x, batch.y.roll(1), batch.domain)
        assert torch.equal(logits(method, method.net, batch), logits(method, method.net, swapped))


def test_predicted_s_is_that_of_the_first_pass() -> None:
    """The second pass would be for nothing, or the first one not with the expectation; and the network remember a batch."""
    method, data = ready("emaq-lt", params={"emaq-lt": {"s_eval": "predicted"}})
    for module in method.net.modules():
        if isinstance(module, Conditional):
            module.scale.copy_(torch.tensor([1.0, 1.3, 1.6, 2.0]))
    method.eval()
    batch = all_train(data)
    method.scope.domain = batch.domain
    with torch.no_grad():
        first = method.net(batch.x)
        with taken_for(method.net, first.argmax(1)):
            second = method.net(batch.x)
        assert torch.equal(method.predict(method.net, batch), second)
        assert not torch.equal(first, second)
        assert torch.equal(method.net(batch.x), first)
    shipped = method.deploy(Run(method))
    assert not any(isinstance(m, Thresholds) for m in shipped.modules())
    torch.testing.assert_close(logits(method, shipped, batch), second, rtol=1e-3, atol=1e-3)


def test_the_mismatch_of_training_and_use_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody would see that the network is used with another s than in training; or it would be told where there is none."""
    caplog.set_level(logging.INFO, logger="qatbench")
    told: dict[str, float] = {}
    cases = {
        "default": ("emaq-lt", {}),
        "expected": ("emaq-lt", {"s_eval": "expected"}),
        "predicted": ("emaq-lt", {"s_eval": "predicted"}),
        "one s": ("emaq-lt", {"conditional": False}),
        "climbq": ("climbq", {}),
    }
    for case, (name, params) in cases.items():
        method, data = ready(name, params={name: params})
        with_scale(method)
        loop = Loop(method, data)
        method.train()
        before = state(method)
        caplog.clear()
        method.validated(loop.run, {})
        found = [r.getMessage() for r in caplog.records if "codes of activations differ" in r.getMessage()]
        assert len(found) == (case != "one s")
        if found:
            told[case] = float(found[0].split(" by ")[1].split()[0])
        assert not any(m.as_trained for m in method.net.modules() if isinstance(m, Conditional))
        assert same(before, state(method)) == []
        assert all(module.training for module in method.net.modules())
    assert 0 < told["climbq"] < 0.5 * told["default"]  # its s is about 2 in training, too
    assert 0 < told["predicted"] != told["expected"] < told["default"]


def test_predicted_s_has_no_integer_form() -> None:
    """The file would hold the first pass alone, and be another method."""
    method, data = ready("emaq-lt", params={"emaq-lt": {"s_eval": "predicted"}}, domains=1)
    with pytest.raises(NoIntegerForm, match="other thresholds for each image"):
        export_method(method, all_train(data).x)


# --- class statistics


def test_class_statistics_follow_the_batch_as_far_as_it_has_images() -> None:
    """A class of which a batch has one image would be quantized by that image's statistics; or an absent one would be NaN."""
    quantizer = conditional((40, 30, 20, 10), class_ema=True).train()
    labels = torch.tensor([0] * 48 + [1])
    x = normal(49, 400) + torch.where(labels == 0, 0.0, 3.0)[:, None]
    quantizer.scope.labels, quantizer.scope.track = labels, True
    mean, std = x.mean(), x.std()
    quantizer(x)
    u = (x - mean) / std
    for c, n in ((0, 48), (1, 1)):
        own = n / (n + 16)
        torch.testing.assert_close(quantizer.class_mean[c], 0.1 * own * u[labels == c].mean())
        torch.testing.assert_close(quantizer.class_std[c], 1 + 0.1 * own * (u[labels == c].std() - 1))
    assert quantizer.class_mean[2:].tolist() == [0, 0]
    assert quantizer.class_std[2:].tolist() == [1, 1]
    before = quantizer.class_mean.clone()
    quantizer.scope.track = False
    quantizer(x)
    assert torch.equal(before, quantizer.class_mean)
    centre, reach = quantizer.statistics(x)
    torch.testing.assert_close(centre.flatten(), (mean + std * before)[labels])
    assert torch.equal(reach, std)


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("class_ema", [False, True])
def test_the_gradient_goes_through_the_statistics(class_ema: bool, domains: int) -> None:
    """ClimbQ would train by a gradient that is not the derivative of what it computes, but for the rounding."""
    labels, domain = torch.tensor([0, 0, 1, 3, 2, 1]), torch.arange(6) % domains
    x, g = normal(6, 7).double().requires_grad_(), normal(6, 7, seed=1).double()
    quantizer = conditional(bits=8, through=True, domains=domains, class_ema=class_ema).double().train()
    quantizer.scope.labels, quantizer.scope.domain = labels, domain
    shift, wide = torch.zeros(4), torch.ones(4)
    if class_ema:
        shift, wide = torch.tensor([0.3, -0.2, 0.5, 0.0]), torch.tensor([0.8, 1.0, 1.2, 0.7])
        quantizer.class_mean.copy_(shift)
        quantizer.class_std.copy_(wide)
    found = torch.autograd.grad(quantizer(x), x, g)[0]
    of = [x[domain == d] for d in range(domains)]
    mean, std = (torch.stack(values)[domain][:, None] for values in ([v.mean() for v in of], [v.std() for v in of]))
    s = class_scale(TAIL)[labels][:, None].double()
    centre, spread = mean + shift[labels][:, None] * std, s * wide[labels][:, None] * std
    place = 255 * torch.special.ndtr((x - centre) / spread)
    rounded = place + (place.round() - place).detach()
    expected = torch.autograd.grad((rounded * 2 / 255 - 1) * 2 * std, x, g)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- bad input


@pytest.mark.parametrize("class_ema", [False, True])
@pytest.mark.parametrize(
    "x", [torch.zeros(4, 6), torch.ones(4, 6), torch.full((4, 6), 2.0**100), normal(4, 6) * 2.0**-100, normal(4)]
)
def test_a_constant_or_extreme_input_stays_finite(x: Tensor, class_ema: bool) -> None:
    """A dead layer, sigma = 0, would turn the network into NaN."""
    quantizer = conditional(class_ema=class_ema)
    quantizer.fit(x)
    quantizer.scope.labels, quantizer.scope.track = torch.tensor([2, 2, 0, 1]), True
    leaf = x.clone().requires_grad_()
    out = quantizer.train()(leaf)
    out.sum().backward()
    assert out.isfinite().all()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in quantizer.buffers())
    check_codes("conditional", quantizer.eval(), x)


@pytest.mark.parametrize(
    "settings", [{}, {"stats": "class_ema"}, {"s_train": "batch"}, {"omega": "paper"}, {"loss": "bce"}]
)
def test_a_class_absent_from_training_and_a_batch_of_one_class(settings: dict[str, Any]) -> None:
    """The lists that empty classes could not be trained on."""
    method = tailed("emaq-lt", ABSENT, params={"emaq-lt": settings})
    batch = method.probe
    for part in (batch.select(batch.y != 1), batch.select(batch.y == 2)):
        method.train()
        losses = method.compute_losses(part, track=True)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad.isfinite().all() for p in method.net.parameters() if p.grad is not None)
        assert all(b.isfinite().all() for b in method.buffers() if b.is_floating_point())
    assert float(method.omega[1]) == 0


def test_a_network_without_a_linear_head_is_refused() -> None:
    """The run would end in an error about a module without a name; weights by class size need no features."""
    with pytest.raises(RunFailed, match=r"does not end in a linear layer; set emaq-lt\.omega to cb or none"):
        without_linear_head("emaq-lt")


# --- the test of the features


def test_the_features_are_what_the_head_is_given() -> None:
    """The test would be about another layer, of some images, or in training mode."""
    method, data = ready("emaq-lt")
    method.train()
    loop, before = Loop(method, data), state(method)
    method.train()
    features, labels = method.features(loop.run)
    assert same(before, state(method)) == []
    assert all(module.training for module in method.net.modules())
    batch = all_train(data)
    assert torch.equal(labels, batch.y)
    seen: list[Tensor] = []
    dict(quant_layers(method.net))["head"].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    logits(method, method.net, batch)
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-4)


EMPTY = torch.zeros(4, 2), torch.arange(4)


def test_the_test_is_made_before_training_and_every_so_many_epochs() -> None:
    """The weights would be those of a network that is long gone; with refresh=0 the paper's single test would be many."""
    for refresh, expected in ((2, [0, 2, 4]), (0, [0]), (1, [0, 1, 2, 3, 4])):
        method, data = ready("emaq-lt", params={"emaq-lt": {"refresh": refresh}})
        loop, made = Loop(method, data), []
        method.features = lambda run, m=method, made=made: made.append(m.scope.epoch) or EMPTY  # type: ignore[method-assign]
        for epoch in range(5):
            loop.epoch([], epoch)
        assert made == expected
    for omega in ("cb", "none"):
        method, data = ready("emaq-lt", params={"emaq-lt": {"omega": omega}})
        method.features = None  # type: ignore[method-assign]
        Loop(method, data).epoch([])


def test_the_weights_are_those_of_the_test(caplog: pytest.LogCaptureFixture) -> None:
    """What was measured would not reach the loss, or not outlive the run that measured it."""
    caplog.set_level(logging.INFO, logger="qatbench")
    method, data = ready("emaq-lt", params={"emaq-lt": {"zeta": 0.9}})
    before = method.omega.clone()
    loop = Loop(method, data)
    loop.epoch([])
    features, labels = method.features(loop.run)
    counts = method.task.class_counts
    low, high, _ = levene_bounds(deviations(features, labels, 4), labels, counts, 0.9)
    expected = class_weights(distance(counts, low, high), counts, 0.999, "normalised")
    assert torch.equal(method.omega, expected)
    assert not torch.equal(method.omega, before)
    assert "omega" in method.state_dict()
    assert any("Levene: " in record.getMessage() for record in caplog.records)


# At zeta=0.05 the test finds no class of the contract's images, and every omega is 1.
SETTINGS: list[dict[str, Any]] = [
    {"conditional": False},
    {"stats": "class_ema"},
    {"s_train": "batch"},
    {"s_eval": "expected"},
    {"s_eval": "predicted"},
    {"zeta": 0.9, "omega": "paper"},
    {"zeta": 0.9, "omega": "cb"},
    {"zeta": 0.9, "omega": "none"},
    {"zeta": 0.9, "rho": 0.8},
    {"zeta": 0.9},
    {"loss": "bce"},
    {"cla": "none"},
    {"cla": "posthoc_classwise"},
    {"cla": "posthoc_classwise", "kappa": 0.2},
    {"cla_gradient": True},
    {"act_at": "post_bn"},
    {"act_at": "post_bn", "stats": "class_ema"},
]


@pytest.mark.parametrize("params", SETTINGS)
def test_every_setting_trains_and_makes_a_difference(params: dict[str, Any]) -> None:
    """A setting of the suites would crash, or do nothing; of two settings, the second beside the first."""
    found: list[Tensor] = []
    for given_params in (params, dict(list(params.items())[:-1])):
        method, data = ready("emaq-lt", params={"emaq-lt": given_params})
        uneven = [
            batch.select((batch.y > 0) | (torch.arange(len(batch)) < 6)) for batch in list(data.train_dataloader())[:3]
        ]
        with_scale(method)
        losses = Loop(method, data).epoch(uneven)
        assert all(torch.isfinite(torch.tensor(losses)))
        found.append(logits(method, method.net, uneven[0]))
    assert not torch.equal(*found)


def with_scale(method: Method) -> None:
    """Give the classes scales that differ: the contract's images are balanced."""
    for module in method.net.modules():
        if isinstance(module, Conditional):
            module.scale.copy_(torch.tensor([1.1, 1.3, 1.6, 1.9]))


def test_behind_a_norm_it_is_n_0_s() -> None:
    """`act_at=post_bn` would not be what ClimbQ's code does."""
    quantizer = ConditionalNorm(
        8, SITE, Scope(), scale=class_scale(TAIL), s_train="class", s_eval="const2", class_ema=False
    )
    x, labels = normal(4, 200) * 3 + 1, torch.tensor([3, 0, 0, 1])
    quantizer.scope.labels = labels
    place = 255 * torch.special.ndtr(x / class_scale(TAIL)[labels][:, None])
    torch.testing.assert_close(quantizer.train().encode(x)[0].float(), place, atol=0.51, rtol=0)
    method, _ = ready("emaq-lt", params={"emaq-lt": {"act_at": "post_bn"}})
    assert sum(isinstance(m, ConditionalNorm) for m in method.net.modules()) > 3
    assert isinstance(build("emaq-lt", {}), EmaQ)
    assert not isinstance(dict(quant_layers(method.net))["head"].weight_quantizer, Conditional)
    assert isinstance(dict(quant_layers(method.net))["head"].weight_quantizer, CdfQuantizer)
