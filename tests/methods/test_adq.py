from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.chain import build
from qatbench.bench.errors import UserError
from qatbench.bench.method import Method, Probe, Run
from qatbench.bench.quant import Bits, Quantizer, Scope, UniformQuantizer, audit, quant_layers
from qatbench.bench.quant.codebook import Codebook, CodebookParams, in_order, quantiles
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, float_net, ready, same, state, train
from qatbench.methods.n2uq import LearnedThresholds
from torch import Tensor

SITE = Site("layer", "layer", (4,), weights=360, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
WIDTHS = st.integers(2, 5)
SEEDS = st.integers(0, 10**6)


class TestADQ(MethodContract):
    method = "adq"


class TestKDADQ(MethodContract):
    """With distillation, as in the paper."""

    method = "kd+adq"


def normal(seed: int, n: int = 500) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


def codebook(w: Tensor, bits: int = 3, **params: Any) -> Codebook:
    quantizer = Codebook(bits, SITE, Scope(), CodebookParams(**params))
    quantizer.fit(w)
    return quantizer


def error(quantizer: Quantizer, w: Tensor) -> float:
    return float((quantizer(w).double() - w.double()).square().mean())


def is_proper(quantizer: Codebook) -> bool:
    entries = quantizer.codebook
    return bool((entries.diff() > 0).all()) and int((entries == 0).sum()) == 1 and bool(entries.isfinite().all())


def adq(bits: str = "w3a3", name: str = "adq", **params: Any) -> Method:
    return ready(name, bits=bits, params={"adq": params})[0]


def inner(method: Method) -> list[Site]:
    return [s for s in method.sites if s.kind == "layer" and not s.edge]


def codebooks(method: Method) -> list[Codebook]:
    return [q for _, layer in quant_layers(method.net) if isinstance(q := layer.weight_quantizer, Codebook)]


# --- the codebook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["2^b-1", "2^b"])
@pytest.mark.parametrize("init", ["quantile", "uniform", "kmeans", "random"])
@given(
    WIDTHS,
    SEEDS,
    st.sampled_from(["ema", "entries"]),
    st.sampled_from(["normal", "few", "positive", "zeros", "constant"]),
)
@SMALL
def test_adq_1_codebook_is_sorted_with_one_zero(
    init: str, levels: str, bits: int, seed: int, update: str, kind: str
) -> None:
    """Two codes would stand for one value, so that 3 bits are 2.8; or a weight could no longer be pruned to zero."""
    w = {
        "few": normal(seed, 5),
        "positive": normal(seed).abs(),
        "zeros": torch.zeros(9),
        "constant": torch.full((9,), -0.5),
    }.get(kind, normal(seed))
    quantizer = codebook(w, bits, init=init, levels=levels, update=update, decay=0.5, dead_after=3)
    assert len(quantizer.codebook) == (2**bits if levels == "2^b" else 2**bits - 1)
    assert is_proper(quantizer)
    for k in range(6):
        quantizer.follow(w + 0.3 * normal(seed + k, len(w)), 1)
        assert is_proper(quantizer)
    assert quantizer.encode(w)[0].max() <= quantizer.qmax


@given(WIDTHS, SEEDS)
@SMALL
def test_adq_2_symmetric_data_have_a_symmetric_codebook(bits: int, seed: int) -> None:
    """One sign would get the better entries."""
    half = normal(seed)
    entries = codebook(torch.cat([half, -half]), bits).codebook
    assert torch.equal(entries, -entries.flip(0))
    assert torch.equal(codebook(half, bits, symmetric=True).codebook, entries)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adq_2_each_entry_is_the_median_of_an_equal_share(bits: int) -> None:
    """Entries would stand where the weights are not: the start would not be by quantiles."""
    w, m = normal(0, 4000), 2 ** (bits - 1) - 1
    entries = codebook(w, bits).codebook
    for side, values in ((entries[entries > 0], w[w > 0]), (-entries[entries < 0].flip(0), -w[w < 0])):
        cuts = quantiles(values, torch.arange(m + 1) / m)
        for k, (low, high) in enumerate(itertools.pairwise(cuts)):
            share = values[(values >= low) & (values < high)]
            assert len(share) / len(values) == pytest.approx(1 / m, abs=len(values) ** -0.5)
            assert float(side[k]) == pytest.approx(float(share.median()), rel=0.05)


def test_adq_2_two_bits_start_at_the_medians() -> None:
    """The ternary codebook would not be {-median, 0, median} of each sign."""
    w = normal(1, 401)
    expected = [-quantiles(-w[w < 0], torch.tensor(0.5)).item(), 0.0, quantiles(w[w > 0], torch.tensor(0.5)).item()]
    assert codebook(w, 2).codebook.tolist() == pytest.approx(expected)


@given(WIDTHS, SEEDS, st.sampled_from([2.0**-20, 0.5, 64.0]), st.sampled_from(["quantile", "uniform", "kmeans"]))
@SMALL
def test_adq_3_scaling_and_negation_commute(bits: int, seed: int, a: float, init: str) -> None:
    """The codebook would depend on the unit or the sign of the weights, which a BatchNorm after the layer undoes."""
    w = normal(seed, 501)
    one, scaled, mirrored = (
        codebook(w, bits, init=init),
        codebook(a * w, bits, init=init),
        codebook(-w, bits, init=init),
    )
    for k in range(3):
        assert torch.equal(scaled.codebook, a * one.codebook)
        assert torch.equal(scaled.encode(a * w)[0], one.encode(w)[0])
        assert torch.equal(mirrored.codebook, -one.codebook.flip(0))
        assert torch.equal(mirrored.encode(-w)[0], one.qmax - one.encode(w)[0])
        drift = w + 0.01 * k
        one.follow(drift, 1), scaled.follow(a * drift, 1), mirrored.follow(-drift, 1)


@pytest.mark.parametrize("update", ["ema", "entries"])
def test_adq_4_decay_of_one_freezes(update: str) -> None:
    """The limit of a slow codebook would not be a static one."""
    quantizer = codebook(normal(0), 4, decay=1.0, update=update)
    before = quantizer.codebook.clone()
    for k in range(20):
        quantizer.follow(normal(k), 1)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("update", ["ema", "entries"])
@given(WIDTHS, SEEDS)
@SMALL
def test_adq_4_decay_of_zero_is_a_lloyd_step(update: str, bits: int, seed: int) -> None:
    """Entries would go to another place than the mean of their weights."""
    w = normal(seed)
    quantizer = codebook(w, bits, decay=0.0, update=update)
    codes, before = quantizer.encode(w)[0], quantizer.codebook.clone()
    was = error(quantizer, w)
    quantizer.follow(w, 1)
    for k, entry in enumerate(quantizer.codebook):
        own = w[codes == k]
        goal = before[k] if before[k] == 0 or not len(own) else own.mean()
        assert float(entry) == pytest.approx(float(goal), rel=1e-5)
    assert error(quantizer, w) <= was


@pytest.mark.parametrize("update", ["ema", "entries"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adq_5_fixed_weights_lead_to_a_fixed_point(bits: int, update: str) -> None:
    """The codebook would wander, or get worse, while the weights stand still."""
    w = normal(3, 3000)
    quantizer = codebook(w, bits, decay=0.5, update=update)
    errors = [error(quantizer, w)]
    for _ in range(300):
        quantizer.follow(w, 1)
        errors.append(error(quantizer, w))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    before = quantizer.codebook.clone()
    codes = quantizer.encode(w)[0]
    for k, entry in enumerate(before):
        if entry != 0:
            assert float(entry) == pytest.approx(float(w[codes == k].mean()), abs=2e-4)


@given(WIDTHS, SEEDS, st.integers(0, 3))
@SMALL
def test_adq_6_nearest_entry_and_idempotent(bits: int, seed: int, updates: int) -> None:
    """A weight would be rounded away from its nearest value; or what is on the codebook would be moved."""
    w = normal(seed)
    quantizer = codebook(w, bits, decay=0.5)
    for k in range(updates):
        quantizer.follow(normal(seed + k + 1), 1)
    values = quantizer(w)
    assert bool(torch.isin(values, quantizer.codebook).all())
    distance = (w.double()[:, None] - quantizer.codebook.double()).abs()
    assert bool(((w.double() - values.double()).abs() <= distance.min(1).values + 1e-8).all())
    assert torch.equal(quantizer(values), values)
    assert torch.equal(quantizer(quantizer.codebook), quantizer.codebook)


@pytest.mark.parametrize(
    ("kind", "bits", "uniform", "start", "after"),
    [
        ("normal", 2, 0.941, 0.319, 0.192), ("normal", 3, 0.208, 0.083, 0.044), ("normal", 4, 0.038, 0.028, 0.0126),
        ("laplace", 2, 1.957, 1.023, 0.533), ("laplace", 3, 1.036, 0.380, 0.139), ("laplace", 4, 0.278, 0.170, 0.048),
    ],
)  # fmt: skip
def test_adq_7_quantiles_beat_a_uniform_grid_and_updates_help(
    kind: str, bits: int, uniform: float, start: float, after: float
) -> None:
    """The point of the method would be gone: a codebook worse than an even grid, or an update that does not help it."""
    torch.manual_seed(0)
    w = torch.randn(100_000) if kind == "normal" else torch.distributions.Laplace(0.0, 1.0).sample((100_000,))
    quantizer = codebook(w, bits, decay=0.9)
    even, first = error(codebook(w, bits, init="uniform"), w), error(quantizer, w)
    assert first < even
    assert even == pytest.approx(uniform, rel=0.3)  # depends on the largest weight
    assert first == pytest.approx(start, rel=0.05)
    for _ in range(20):
        was = error(quantizer, w)
        for _ in range(10):
            quantizer.follow(w, 1)
        assert error(quantizer, w) <= was * (1 + 1e-6)
    assert is_proper(quantizer)
    assert error(quantizer, w) == pytest.approx(after, rel=0.1)


def test_adq_10_no_gradient_reaches_the_codebook() -> None:
    """Entries would be trained twice, by the loss and by the average."""
    w = normal(0).requires_grad_()
    quantizer = codebook(w.detach(), 3)
    quantizer(w).mul(torch.arange(500.0)).sum().backward()
    assert torch.equal(w.grad, torch.arange(500.0))  # straight through
    assert not list(quantizer.parameters())
    assert not quantizer.codebook.requires_grad


def test_clip_stops_the_gradient_of_far_weights() -> None:
    """The option would be without effect, or stop weights that are in reach."""
    w = normal(0).requires_grad_()
    quantizer = codebook(w.detach(), 2, clip=1.5)
    quantizer(w).sum().backward()
    limit = 1.5 * float(quantizer.codebook.abs().max())
    assert torch.equal(w.grad, (w.detach().abs() <= limit).float())
    assert 0 < w.grad.mean() < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_without_weights_mirrors_the_other(sign: int) -> None:
    """A layer of positive weights would have no entries below zero, and none to go to when a weight gets there."""
    w = sign * normal(0).abs()
    entries = codebook(w, 3).codebook
    assert is_proper(codebook(w, 3))
    assert torch.equal(entries, -entries.flip(0))


def test_equal_entries_are_moved_apart_and_order_is_kept() -> None:
    """Equal quantiles (of weights that are equal) would be two codes of one value; or sorting would change a codebook."""
    entries = torch.tensor([0.5, -1.0, 0.0, 0.5, 0.5, -1.0])
    found = in_order(entries)
    assert bool((found.diff() > 0).all())
    assert found.tolist() == pytest.approx([-1, -1, 0, 0.5, 0.5, 0.5], rel=1e-5)
    assert torch.equal(in_order(found), found)


@pytest.mark.parametrize(
    ("init", "grid"), [("quantile", "inner"), ("uniform", "middle"), ("random", "middle"), ("kmeans", "middle")]
)
def test_every_start_is_another(init: str, grid: str) -> None:
    """An axis of the ablation would compare a setting with itself."""
    w = normal(0)
    first, other = codebook(w, 3), codebook(w, 3, init=init, grid=grid)
    assert not torch.equal(first.codebook, other.codebook)
    assert torch.equal(other.codebook, codebook(w, 3, init=init, grid=grid).codebook)
    if init == "kmeans":
        assert error(other, w) < error(first, w)
    if init == "uniform":
        top = float(w.max())
        assert other.codebook[-3:].tolist() == pytest.approx([top / 3, 2 * top / 3, top])
    if grid == "inner":
        assert other.codebook[-3:].tolist() == pytest.approx(
            quantiles(w[w > 0], torch.tensor([0.25, 0.5, 0.75])).tolist()
        )


def test_quantiles_are_torchs() -> None:
    """The quantiles would be another convention than the one that everybody uses."""
    w, q = normal(0, 101), torch.linspace(0, 1, 23)
    torch.testing.assert_close(quantiles(w, q), torch.quantile(w, q))


def test_the_two_averages_differ_where_the_weights_move() -> None:
    """``entries`` would be ``ema`` under another name: only the latter lets an entry that has just filled jump to its weights."""
    found = []
    for update in ("ema", "entries"):
        quantizer = codebook(torch.linspace(-1, 1, 101), 2, decay=0.9, update=update)
        for _ in range(5):
            quantizer.follow(torch.cat([torch.full((300,), 0.9), torch.linspace(-1, 0, 50)]), 1)
        found.append(float(quantizer.codebook[-1]))
    assert found[0] > found[1] + 0.05
    assert found[1] == pytest.approx(0.9 + (0.51 - 0.9) * 0.9**5, abs=0.01)


@pytest.mark.parametrize("update", ["ema", "entries"])
def test_a_dead_entry_is_put_where_the_weights_are(update: str) -> None:
    """An entry that the weights have left would be lost for good: 3 bits would become 2.8."""
    w = torch.linspace(-1, 1, 1001)
    quantizer = codebook(w, 3, decay=0.5, update=update, dead_after=30)
    near = 0.5 * w  # nothing is near the outermost entries any more
    quantizer.codebook[0], quantizer.codebook[-1] = -9.0, 9.0
    for _ in range(20):
        quantizer.follow(near, 1)
    assert quantizer.codebook[0] == -9
    assert int(quantizer.idle[0]) > 0
    for _ in range(60):
        quantizer.follow(near, 1)
    assert is_proper(quantizer)
    assert float(quantizer.codebook.abs().max()) <= 0.5
    assert quantizer.encode(near)[0].unique().numel() == 7
    assert int(quantizer.idle.max()) == 0


def test_a_layer_with_fewer_weights_than_entries() -> None:
    """A small layer at 8 bits would crash, now or when its unused entries are thought dead."""
    w = normal(0, 32)
    quantizer = codebook(w, 8, dead_after=2, decay=0.5)
    for _ in range(10):
        quantizer.follow(w, 1)
    assert is_proper(quantizer)
    assert error(quantizer, w) < 1e-4 * float(w.square().mean())


def test_the_layout_in_memory_does_not_matter() -> None:
    """Weights in channels_last would go to other entries than the same weights in rows, or come back in another layout."""
    w = normal(0, 8 * 6 * 9).view(8, 6, 3, 3)
    last = w.contiguous(memory_format=torch.channels_last)
    quantizer = codebook(w, 3)
    assert torch.equal(quantizer(last), quantizer(w))
    assert torch.equal(quantizer.encode(last)[0], quantizer.encode(w)[0])
    assert quantizer(last).is_contiguous(memory_format=torch.channels_last)
    quantizer.follow(last, 1)
    again = codebook(w, 3)
    again.follow(w, 1)
    assert torch.equal(quantizer.codebook, again.codebook)


def test_weights_that_are_nan_do_not_crash_the_update() -> None:
    """A diverged run would end in a traceback instead of the harness's "diverged"."""
    quantizer = codebook(normal(0), 3)
    quantizer.follow(torch.full((500,), torch.nan), 1)
    quantizer.follow(torch.full((500,), torch.inf), 1)
    assert is_proper(quantizer)


# --- activations ------------------------------------------------------------------------------------------------------


@given(st.integers(2, 4), SEEDS)
@SMALL
@torch.no_grad()
def test_adq_9_thresholds_increase_and_levels_are_integers(bits: int, seed: int) -> None:
    """Activations would not be integers on hardware, or a larger input would give a smaller code."""
    quantizer = adq_activation(bits)
    rng = torch.Generator().manual_seed(seed)
    quantizer.widths.copy_(torch.rand(quantizer.n, generator=rng))
    quantizer.start.copy_(torch.randn((), generator=rng) * 0.1)
    quantizer.project()
    assert bool((quantizer.thresholds.diff() > 0).all())
    x = torch.linspace(-1, 20, 3001)
    codes = quantizer.encode(x)[0]
    assert codes.unique().tolist() == list(range(2**bits))
    assert bool((codes.diff() >= 0).all())
    torch.testing.assert_close(quantizer(x), codes * quantizer.step)


def adq_activation(bits: int) -> LearnedThresholds:
    method = build("adq", {})
    quantizer = method.act_quantizer(bits, SITE, Scope())
    assert isinstance(quantizer, LearnedThresholds)
    return quantizer


def test_adq_9_equal_widths_are_the_uniform_quantizer() -> None:
    """The start would not be the uniform grid with its plain straight-through gradient."""
    quantizer = adq_activation(3)
    even = UniformQuantizer(3, SITE, Scope(), False)
    even.step.fill_(2 / 7)
    x = torch.linspace(-0.5, 2.4, 1003)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(quantizer(one), even(other))
    quantizer(one).sum().backward()
    even(other).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_adq_9_a_widths_gradient_is_from_right_of_its_segments_start() -> None:
    """Thresholds would be moved by inputs on which they have no influence."""
    quantizer = adq_activation(2)
    for k, value in enumerate((0.3, 1.0, 1.7)):  # one input in the middle of each segment, off its centre
        quantizer.zero_grad()
        quantizer(torch.tensor([value + 0.1])).sum().backward()
        assert bool((quantizer.widths.grad[: k + 1] != 0).all())
        assert not quantizer.widths.grad[k + 1 :].any()


# --- the method -------------------------------------------------------------------------------------------------------


def test_adq_10_distillation_without_weight_is_adq(tmp_path: Path) -> None:
    """The teacher would change training by being there."""
    params = {"adq": {"period": 2}}
    alone, data = ready("adq", epochs=1, params=params)
    train(alone, data, tmp_path / "alone")
    taught, data = ready("kd+adq", epochs=1, params={**params, "kd": {"weight": 0.0}})
    train(taught, data, tmp_path / "taught")
    assert same(state(alone), state(taught)) == []
    assert taught.losses_seen["task"] == alone.losses_seen["task"]


def test_codebooks_follow_every_period_until_they_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks would move in every pass, or at another rate than the setting says, or up to the last step."""
    method, data = ready("adq", params={"adq": {"period": 3, "freeze": 0.25}}, epochs=2)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(Codebook, "follow", lambda self, weight, steps: calls.append((method.scope.step + 1, steps)))
    loop = Loop(method, data)
    assert method.scope.steps == 14
    for epoch in (0, 1):
        loop.epoch(list(data.train_dataloader()), epoch)
    assert calls == [(step, 3) for step in (3, 6, 9) for _ in inner(method)]


def test_codebook_of_a_frozen_layer_stays() -> None:
    """A layer that another method keeps still (``crt``) would move: its weights would go to other entries."""
    method, data = ready("adq", params={"adq": {"period": 1, "decay": 0.5}})
    loop = Loop(method, data)
    loop.epoch(list(data.train_dataloader())[:1])
    frozen, *others = [method.net.get_submodule(site.name) for site in inner(method)]
    frozen.weight.grad = None
    before = [layer.weight_quantizer.codebook.clone() for layer in (frozen, *others)]
    method.after_update(loop.run)
    assert torch.equal(frozen.weight_quantizer.codebook, before[0])
    assert not any(torch.equal(la.weight_quantizer.codebook, b) for la, b in zip(others, before[1:], strict=True))


def test_a_pass_moves_no_codebook() -> None:
    """A method with several passes a step, or a second look at a batch, would move the codebooks several times."""
    method, data = ready("adq", params={"adq": {"period": 1}})
    before = [q.codebook.clone() for q in codebooks(method)]
    method.train().compute_losses(next(iter(data.train_dataloader())), track=True)["task"].backward()
    assert all(torch.equal(q.codebook, b) for q, b in zip(codebooks(method), before, strict=True))


@pytest.mark.parametrize("name", ["adq", "kd+adq"])
def test_a_static_codebook_stays(name: str) -> None:
    """The ablation's control would not be one; or in a chain the codebooks would never be updated."""
    for update, stays in (("static", True), ("ema", False)):
        method, data = ready(name, params={"adq": {"update": update, "period": 1}}, epochs=1)
        before = [q.codebook.clone() for q in codebooks(method)]
        Loop(method, data).epoch(list(data.train_dataloader())[:3])
        same_as_before = [torch.equal(q.codebook, b) for q, b in zip(codebooks(method), before, strict=True)]
        assert all(same_as_before) is stays


def test_first_and_last_layer() -> None:
    """The paper's float edges would be quantized; or an 8-bit edge would need a codebook larger than the layer."""
    method, _ = ready("adq", first_last="native")
    edges = [s.name for s in method.sites if s.kind == "layer" and s.edge]
    assert {method.bit_plan[name] for name in edges} == {Bits(32, 32)}
    method, _ = ready("adq", first_last="8bit")
    for name in edges:
        assert isinstance(method.net.get_submodule(name).weight_quantizer, UniformQuantizer)
    assert all(isinstance(method.net.get_submodule(s.name).weight_quantizer, Codebook) for s in inner(method))


def test_a_codebook_larger_than_its_layer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A layer would be "compressed" into more numbers than it has, and nobody would know."""
    with caplog.at_level(logging.WARNING, "qatbench"):
        adq("w4a4")
        assert not caplog.messages
        adq("w8a8")
    assert any("has 128 weights and at 8 bits a codebook of 255 entries" in m for m in caplog.messages)


def test_constants_are_the_entries() -> None:
    """The size of a network would leave out its look-up tables."""
    assert codebook(normal(0), 4).constants() == 15
    assert codebook(normal(0), 4, levels="2^b").constants() == 16


# --- mixed precision --------------------------------------------------------------------------------------------------


def spent(method: Method) -> float:
    sites = inner(method)
    return sum(s.weights * method.bit_plan[s.name].w for s in sites) / sum(s.weights for s in sites)


@pytest.mark.parametrize("sens", ["hessian", "hmqat", "fisher", "acc_drop"])
def test_every_sensitivity_gives_a_plan_within_the_budget(sens: str) -> None:
    """A run of 2.81 bits would have more of them, or would not start."""
    method = adq("avg2.81", sens=sens, probes=4)
    assert (1.9 if sens == "acc_drop" else 2.7) < spent(method) <= 2.81  # a measured loss may rise with the bits
    assert {method.bit_plan[s.name].w for s in inner(method)} <= {2, 3, 4}
    assert {method.bit_plan[s.name].a for s in inner(method)} == {3}
    for site in inner(method):
        layer = method.net.get_submodule(site.name)
        assert len(layer.weight_quantizer.codebook) == 2 ** method.bit_plan[site.name].w - 1


def test_harm_is_what_the_sensitivity_says() -> None:
    """Two settings would be one; or the error would be that of another quantizer than the codebook that is trained."""
    found = {}
    for sens in ("hessian", "hmqat", "fisher", "acc_drop"):
        method = adq(sens=sens, probes=8)
        found[sens] = method.harm(inner(method), (2, 3, 4), Probe(float_net(), method.probe))
    names = [s.name for s in inner(method)]
    weights = Probe(float_net(), method.probe).weights(inner(method))
    for sens, harm in found.items():
        assert list(harm) == names
        assert sens == "acc_drop" or all(t[2] >= t[3] >= t[4] >= 0 for t in harm.values())
    some = [n for n in names if found["hessian"][n][2] > 0]
    assert some
    for name in some:
        errors = {b: error(codebook(weights[name].detach(), b), weights[name].detach()) for b in (2, 4)}
        ratio = found["hessian"][name][2] / found["hessian"][name][4]
        assert ratio == pytest.approx(errors[2] / errors[4], rel=1e-3)
        assert found["fisher"][name][2] / found["fisher"][name][4] == pytest.approx(ratio, rel=1e-3)
        assert found["hmqat"][name][2] == pytest.approx(16 * found["hmqat"][name][4])
        trace = found["hessian"][name][4] / errors[4]  # the same random vectors
        assert found["hmqat"][name][4] == pytest.approx(trace * 4.0**-4, rel=1e-3)


def test_allocation_is_by_the_rule_that_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The ablation "uniform or by sensitivity, at equal bits" would compare a plan with itself."""
    with caplog.at_level(logging.INFO, "qatbench"):
        plans = {rule: adq("avg3", allocation=rule, probes=4) for rule in ("dp", "greedy", "closed", "uniform")}
    assert {plans["uniform"].bit_plan[s.name].w for s in inner(plans["uniform"])} == {3}
    assert {plans["dp"].bit_plan[s.name].w for s in inner(plans["dp"])} > {3}
    assert all(2.7 < spent(method) <= 3 for method in plans.values())
    assert sum("bits of each layer" in m for m in caplog.messages) == 4


def test_activations_may_have_the_bits_of_their_layer() -> None:
    """The option would be without effect, or quantize what the run leaves in float."""
    method = adq("avg2.81", act_bits="layer", probes=4)
    assert all(method.bit_plan[s.name].a == method.bit_plan[s.name].w for s in inner(method))
    assert {method.bit_plan[s.name].a for s in method.sites if s.kind == "layer" and s.edge} == {8}
    floating = adq("avg2.81a32", act_bits="layer", probes=4)
    assert {floating.bit_plan[s.name].a for s in inner(floating)} == {32}


def test_candidates_bound_the_widths() -> None:
    """A layer would get a width that the user has ruled out; or a budget that cannot be met would be taken."""
    method = adq("avg3", candidates=[2, 8], probes=2)
    assert {method.bit_plan[s.name].w for s in inner(method)} == {2, 8}
    with pytest.raises(UserError, match=r"5 bits a weight is out of reach.*2 to 4"):
        adq("avg5", probes=2)
    with pytest.raises(UserError, match="candidates"):
        build("adq", {"adq": {"candidates": [1, 9]}})


@pytest.mark.parametrize("name", ["adq", "kd+adq"])
def test_a_mixed_plan_trains_and_ships(name: str, tmp_path: Path) -> None:
    """Layers of different widths would not train, or their codebooks would not be what is shipped."""
    method, data = ready(name, bits="avg2.81", epochs=1, params={"adq": {"period": 2, "probes": 2}})
    train(method, data, tmp_path)
    method.eval()
    levels = audit(method.net, method.probe.x)
    for site in inner(method):
        bits, found = method.bit_plan[site.name], levels[site.name]
        assert found[0] is not None
        assert found[0] <= 2**bits.w - 1
    shipped = method.deploy(Run(method))
    torch.testing.assert_close(shipped(method.probe.x), method.net(method.probe.x), rtol=1e-4, atol=1e-4)
