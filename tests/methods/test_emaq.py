from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.data import Batch, Split
from qatbench.bench.errors import RunFailed, UserError
from qatbench.bench.quant import CdfQuantizer, RunningCdfQuantizer, Scope, audit, quant_layers
from qatbench.bench.quant.cdf import normal_fit, surrogate_slope
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, all_train, logits, ready, same, state, train
from qatbench.methods.emaq import Average, DomainNorm, Thresholds, sensitivity
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72, norm="bn")
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestEmaQ(MethodContract):
    method = "emaq"


# --- (g) 1 to 5 are about the CDF quantizer and stand in tests/bench/test_cdf.py; here is what needs domains


def fitted(domains: int, bits: int = 4, **more: Any) -> tuple[RunningCdfQuantizer, Tensor]:
    """A quantizer for activations of domains whose means and deviations differ, and the batch that it was fitted on."""
    scope = Scope()
    scope.domain = torch.arange(12) % domains
    x = normal(12, 3, 8, 8) * (1 + scope.domain.float()).view(-1, 1, 1, 1) + 5 * scope.domain.view(-1, 1, 1, 1)
    quantizer = RunningCdfQuantizer(bits, SITE, scope, domains=domains, **more)
    quantizer.fit(x)
    return quantizer, x


def test_emaq_1_domains_are_projected_onto_one_distribution() -> None:
    """Domains with other statistics would not share a grid: that is what the method is for."""
    quantizer, _ = fitted(2, 8)
    quantizer.scope.domain = torch.tensor([0, 1])
    x = torch.stack([normal(50_000), 40 + 7 * normal(50_000, seed=1)])
    quantizer.fit(x)
    places = quantizer.eval().encode(x)[0].double() / 255
    one, other = (row.sort().values for row in places)
    assert (one - other).abs().max() < 0.01


def test_emaq_4_the_paper_s_grid_is_counted_at_the_bits_that_it_takes() -> None:
    """Eq. 6 has 9 levels at "2 bits": a table would compare 3.2 bits with 2."""
    params = {"emaq": {"grid": "paper"}}
    method, _ = ready("emaq", bits="w2a2", params=params)
    inner = {n: b for n, b in method.bit_plan.items() if n not in ("conv1", "head")}
    assert {tuple(b) for b in inner.values()} == {(4, 4)}
    levels = audit(method.net, method.probe.x)
    assert max(w for n, (w, _) in levels.items() if n in inner and w) == 9
    same, _ = ready("emaq", bits="w2a2", params=params, first_last="same")
    assert {tuple(b) for b in same.bit_plan.values()} == {(4, 4)}
    assert {layer.weight_quantizer.qmax for _, layer in quant_layers(same.net)} == {8}
    for bits in ("w7a7", "avg3"):
        with pytest.raises(RunFailed, match="grid=true_bits"):
            ready("emaq", bits=bits, params=params)
    behind, _ = ready("emaq", bits="w2a2", params={"emaq": {"act_at": "post_bn"}})
    assert {b.a for b in behind.bit_plan.values()} == {32}


def test_emaq_6_the_gradient_is_eq_13() -> None:
    """Weights would be trained by another gradient than the paper's."""
    w = (normal(500) * 0.05 + 0.3).double().requires_grad_()
    grad = normal(500, seed=1).double()
    for unit in (False, True):
        quantizer = CdfQuantizer(4, SITE, Scope(), 1.7, surrogate=True, unit=unit)
        w.grad = None
        quantizer(w).backward(grad)
        mean, std = w.detach().mean(), w.detach().std()
        phi = torch.distributions.Normal(mean, std).log_prob(w.detach()).exp()
        place = 15 * torch.special.ndtr((w.detach() - mean) / std)
        slope = surrogate_slope(place)
        norm = std * (2 * torch.pi) ** 0.5 if unit else 1.0
        torch.testing.assert_close(w.grad, grad * slope * 2 * float(quantizer.alpha) * phi * norm)
        assert torch.equal(w.grad.sign(), grad.sign())
    between = surrogate_slope(torch.tensor([3.0, 3.25, 3.5, 3.75]))  # psi = -1, -1/2, 0, 1/2 (Eq. 11 and 12)
    torch.testing.assert_close(between, torch.tensor([0.196612, 0.235004, 0.25, 0.235004]))
    for aqgd_norm, unit in (("sigma", {True, False}), ("none", {False})):
        layers = quant_layers(ready("emaq", params={"emaq": {"aqgd_norm": aqgd_norm}})[0].net)
        assert {
            layer.weight_quantizer.unit for _, layer in layers
        } == unit  # what has no norm behind it keeps its scale


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3))
@SMALL
def test_emaq_7_weights_of_the_clients(beta: list[float], scale: float) -> None:
    """The average of the clients would not be an average, or depend on the unit of the loss."""

    def mean(values: list[float]) -> Tensor:
        average, total = Average(), torch.zeros(len(values))
        for k, value in enumerate(values):
            client = torch.zeros(len(values)).index_fill_(0, torch.tensor([k]), 1.0)
            share = average.add(torch.tensor([value]))
            total = client if k == 0 else total.lerp(client, share[0])
        return total

    weights = mean(beta)
    assert bool((weights >= 0).all())
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    expected = torch.tensor(beta) / sum(beta) if sum(beta) > 0 else torch.full((len(beta),), 1 / len(beta))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    if sum(beta) > 0:
        torch.testing.assert_close(weights, mean([scale * b for b in beta]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean([3.0] * len(beta)), torch.full((len(beta),), 1 / len(beta)))


def test_emaq_7_one_domain_steps_as_a_client_alone() -> None:
    """With one domain EmaQ would not be the single-domain EmaQ of the paper's tables."""
    one, data = ready("emaq", domains=1)
    plain, _ = ready("emaq", domains=1)
    plain.step = lambda run: (run.backward(), run.update())  # type: ignore[method-assign]
    batches = list(data.train_dataloader())[:2]
    Loop(one, data).epoch(batches)
    Loop(plain, data).epoch(batches)
    assert same(state(one), state(plain)) == []


def test_emaq_7_identical_clients_step_as_one() -> None:
    """The aggregate would not be the clients' common step where they agree."""
    one, data = ready("emaq")
    batch = next(iter(data.train_dataloader()))
    part = batch.select(batch.domain == 0)
    for norm in (m for m in one.net.modules() if isinstance(m, DomainNorm)):
        norm.running_mean[:] = norm.running_mean[0]
    loop = Loop(one, data)
    one.train()
    loop.run.backward(part)
    alone = {n: p.grad.clone() for n, p in one.net.named_parameters()}
    copies = Batch(part.x.repeat_interleave(3, 0), part.y.repeat_interleave(3), torch.arange(3).repeat(len(part)))
    loop.run.batch, updates = copies, []
    loop.run.update = lambda: updates.append({n: p.grad.clone() for n, p in one.net.named_parameters()})  # type: ignore[method-assign]
    one.step(loop.run)
    for name, gradient in updates[0].items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_emaq_7_clients_weigh_in_proportion_to_their_sensitivity(scope: str) -> None:
    """Clients might weigh by the inverse, by the float weights, or by the gradient behind the rounding, and all else would hold."""
    method, data = ready("emaq", params={"emaq": {"scope": scope}})
    loop = Loop(method, data)
    method.train()
    batch = next(iter(data.train_dataloader()))
    layers = dict(quant_layers(method.net))
    gradients, beta = [], []
    for _, part in batch.by_domain():
        seen: dict[str, Tensor] = {}

        def keep(
            _module: nn.Module, _inputs: object, quantized: Tensor, name: str, seen: dict[str, Tensor] = seen
        ) -> None:
            quantized.retain_grad()
            seen[name] = quantized

        handles = [
            layer.weight_quantizer.register_forward_hook(functools.partial(keep, name=name))
            for name, layer in layers.items()
        ]
        loop.run.backward(part)
        for handle in handles:
            handle.remove()
        each = torch.stack([_steepest(seen[name].detach(), seen[name].grad) for name in layers])
        beta.append(each if scope == "layer" else each.max())
        gradients.append({n: p.grad.clone() for n, p in method.net.named_parameters()})
    loop.run.batch = batch
    loop.run.update = lambda: None  # type: ignore[method-assign]
    method.step(loop.run)
    expected = torch.stack(beta)
    torch.testing.assert_close(method.beta.view_as(expected), expected, rtol=1e-3, atol=0)
    shares = expected / expected.sum(0)
    for k, (name, layer) in enumerate(layers.items()):
        share = shares[:, k] if scope == "layer" else shares
        wanted = torch.stack([s * g[f"{name}.weight"] for s, g in zip(share, gradients, strict=True)]).sum(0)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-3, atol=1e-5)


def _steepest(value: Tensor, gradient: Tensor | None) -> Tensor:
    """Eq. 17, term by term."""
    assert gradient is not None
    w, g = value.flatten().tolist(), gradient.flatten().tolist()
    return torch.tensor(max(abs(g[i] - g[i - 1]) / abs(w[i] - w[i - 1]) for i in range(1, len(w)) if w[i] != w[i - 1]))


@given(st.floats(-5, 5), st.integers(0, 1000))
@SMALL
def test_emaq_8_sensitivity(shift: float, seed: int) -> None:
    """Equal neighbours would divide by zero; or the sensitivity would be one of the gradient's level, not of its changes."""
    value = normal(200, seed=seed).mul(2).round() / 2
    gradient = normal(200, seed=seed + 1)
    found = sensitivity(value, gradient)
    apart = value.diff().abs()
    assert float(found) == pytest.approx(float((gradient.diff().abs()[apart > 0] / apart[apart > 0]).max()))
    torch.testing.assert_close(sensitivity(value, gradient + shift), found, rtol=1e-4, atol=1e-4)
    assert float(sensitivity(torch.ones(9), gradient[:9])) == -1
    assert float(sensitivity(torch.ones(1), gradient[:1])) == -1


def test_emaq_8_a_network_whose_weights_are_all_equal_counts_as_one() -> None:
    """A client would weigh infinitely much, or the run end with NaN."""
    method, data = ready("emaq")
    with torch.no_grad():
        for _, layer in quant_layers(method.net):
            layer.weight.fill_(0.01)
    loop = Loop(method, data)
    loop.epoch(list(data.train_dataloader())[:1])
    assert torch.equal(method.beta, torch.ones_like(method.beta))


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_emaq_9_the_order_of_the_domains_does_not_matter(scope: str) -> None:
    """A result would depend on the alphabet."""
    batch = next(iter(ready("emaq")[1].train_dataloader()))
    gradients, betas = [], []
    for order in ([0, 1, 2], [2, 0, 1]):
        method, data = ready("emaq", params={"emaq": {"scope": scope}})
        renamed = torch.tensor(order)
        for module in method.net.modules():  # the same state, under the new numbers
            for name in ("running_mean", "running_var", "mean", "std"):
                values = getattr(module, name, None)
                if isinstance(module, DomainNorm | RunningCdfQuantizer) and isinstance(values, Tensor):
                    values[renamed] = values.clone()
        loop = Loop(method, data)
        method.train()
        loop.run.batch = Batch(batch.x, batch.y, renamed[batch.domain])
        loop.run.update = lambda m=method: gradients.append({n: p.grad for n, p in m.net.named_parameters()})  # type: ignore[method-assign]
        method.step(loop.run)
        betas.append(method.beta[renamed])
    torch.testing.assert_close(*betas, rtol=1e-4, atol=1e-6)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_emaq_10_thresholds_are_the_codes(domains: int, bits: int) -> None:
    """What is shipped, without a CDF, would compute with other codes than were trained."""
    quantizer, x = fitted(domains, bits)
    quantizer.eval()
    table = Thresholds(quantizer).eval()
    around = table.thresholds[:domains]
    for value in (around, around.nextafter(around - 1), around.nextafter(around + 1)):
        quantizer.scope.domain = torch.arange(domains)
        assert torch.equal(quantizer.encode(value)[0], table.encode(value)[0])
    for domain in (torch.arange(12) % domains, torch.full((12,), -1)):
        quantizer.scope.domain = domain
        wide = torch.cat([x, 3 * x.flip(0)], 1)
        assert torch.equal(quantizer.encode(wide)[0], table.encode(wide)[0])
        assert torch.equal(quantizer(wide), table(wide))
    mean, std = quantizer.mean.view(-1)[0], quantizer.std.view(-1)[0]
    n = 2**bits - 1
    formula = torch.special.ndtri((torch.arange(1, n + 1).double() - 0.5) / n) * std + mean
    torch.testing.assert_close(around[0].double(), formula, rtol=1e-3, atol=1e-4)


# --- domains


def test_statistics_are_each_domain_s_own() -> None:
    """One domain's images would be quantized on another's grid."""
    quantizer, x = fitted(3)
    for d in range(3):
        mean, std = normal_fit(x[quantizer.scope.domain == d])
        torch.testing.assert_close(quantizer.mean[d], mean)
        torch.testing.assert_close(quantizer.std[d], std)
    before = quantizer.mean.clone()
    only = quantizer.scope.domain == 1
    quantizer.scope.domain, quantizer.scope.track = quantizer.scope.domain[only], True
    quantizer.train()(x[only] + 100)
    assert torch.equal(quantizer.mean[[0, 2]], before[[0, 2]])
    assert not torch.equal(quantizer.mean[1], before[1])


def test_an_unseen_domain_meets_the_mean_of_the_others() -> None:
    """Under lodo the held-out domain would be measured with an arbitrary domain's statistics."""
    quantizer, x = fitted(3)
    quantizer.eval()
    quantizer.scope.domain = torch.full((12,), -1)
    codes = quantizer.encode(x)[0]
    other, _ = fitted(3)
    other.eval()
    for name in ("mean", "std"):
        getattr(other, name)[:] = getattr(quantizer, name).mean()
    assert torch.equal(codes, other.encode(x)[0])
    method, data = ready("emaq")
    batch = all_train(data)
    unseen = Batch(batch.x, batch.y, torch.full_like(batch.y, -1))
    assert torch.isfinite(logits(method, method.net, unseen)).all()
    assert not torch.equal(logits(method, method.net, unseen), logits(method, method.net, batch))


def test_domain_norm_is_batchnorm_of_each_part() -> None:
    """Domains would be normalised by each other's images."""
    norm, scope = nn.BatchNorm2d(3), Scope()
    scope.domain, scope.track = torch.tensor([0, 1, 0, 1, 1]), True
    ours, x = DomainNorm(copy.deepcopy(norm), 2, scope), normal(5, 3, 4, 4) * 3 + 1
    out = ours.train()(x)
    for d in (0, 1):
        theirs = copy.deepcopy(norm).train()
        torch.testing.assert_close(out[scope.domain == d], theirs(x[scope.domain == d]))
        torch.testing.assert_close(ours.running_mean[d], theirs.running_mean)
        torch.testing.assert_close(ours.running_var[d], theirs.running_var)


SETTINGS: list[dict[str, Any]] = [
    {"aggregation": "awa"},
    {"scope": "layer"},
    {"norm": "shared"},
    {"align": False},
    {"act_at": "post_bn"},
    {"aqgd_norm": "ste"},
    {"aqgd_norm": "none"},
    {"grid": "paper"},
    {"act_surrogate": True},
    {"act_at": "post_bn", "norm": "shared", "aqgd_norm": "ste"},
    {"act_at": "post_bn", "act_surrogate": True},
]


@pytest.mark.parametrize("params", SETTINGS)
def test_every_setting_trains_and_makes_a_difference(params: dict[str, Any]) -> None:
    """A setting of the suites would crash, or do nothing."""
    method, data = ready("emaq", params={"emaq": params})
    other, _ = ready("emaq", params={"emaq": dict(list(params.items())[:-1])})
    batches = list(data.train_dataloader())[:3]
    losses = Loop(method, data).epoch(batches)
    Loop(other, data).epoch(batches)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(logits(method, method.net, batches[0]), logits(other, other.net, batches[0]))


def test_settings_that_exclude_each_other_are_refused() -> None:
    """The ablation without a CDF would have one; or a setting would do nothing."""
    with pytest.raises(UserError, match="act_at=post_bn goes by the CDF"):
        ready("emaq", params={"emaq": {"align": False, "act_at": "post_bn"}})
    with pytest.raises(UserError, match="act_surrogate is for a CDF"):
        ready("emaq", params={"emaq": {"aqgd_norm": "ste", "act_surrogate": True}})
    with pytest.raises(RunFailed, match=r"no BatchNorm to quantize behind; set emaq\.act_at to input"):
        ready("emaq", norm="group", params={"emaq": {"act_at": "post_bn"}})


def test_float_weights_and_several_domains() -> None:
    """A run of w32a4, which has no sensitivity, would end in a traceback."""
    for scope in ("network", "layer"):
        method, data = ready("emaq", bits="w32a4", params={"emaq": {"scope": scope}})
        Loop(method, data).epoch(list(data.train_dataloader())[:1])
        assert torch.equal(method.beta, torch.ones_like(method.beta))


def test_clients_weigh_equally_under_awa() -> None:
    """The ablation would compare SWA with itself."""
    method, data = ready("emaq", params={"emaq": {"aggregation": "awa"}})
    loop = Loop(method, data)
    method.train()
    batch = next(iter(data.train_dataloader()))
    each = []
    for _, part in batch.by_domain():
        loop.run.backward(part)
        each.append({n: p.grad.clone() for n, p in method.net.named_parameters()})
    loop.run.batch = batch
    loop.run.update = lambda: None  # type: ignore[method-assign]
    method.step(loop.run)
    for name, p in method.net.named_parameters():
        torch.testing.assert_close(p.grad, torch.stack([g[name] for g in each]).mean(0), rtol=1e-3, atol=1e-6)


def test_a_constant_input_stays_finite() -> None:
    """A dead layer of one domain, sigma = 0, would turn the network into NaN."""
    quantizer, x = fitted(3)
    x[quantizer.scope.domain == 1] = 0.0
    quantizer.fit(x)
    x.requires_grad_()
    quantizer.train()(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(quantizer.eval()(x)).all()


def test_statistics_that_diverged_end_the_run() -> None:
    """A layer whose statistics are NaN would be reported with the accuracy of chance."""
    method, data = ready("emaq")
    Loop(method, data).epoch(list(data.train_dataloader())[:1])
    with torch.no_grad():
        next(layer for _, layer in quant_layers(method.net)).act_quantizer.mean.fill_(torch.nan)
    with pytest.raises(RunFailed, match="mean is not finite"):
        method.epoch_losses()


def test_a_domain_without_validation_images(tmp_path: Path) -> None:
    """A small domain whose images all train would end the run, or be asked for its best epoch."""
    method, data = ready("emaq", selection="best_per_domain", epochs=2)
    data.splits["d1"] = Split(data.splits["d1"].train, torch.empty(0, dtype=torch.int64), data.splits["d1"].test)
    data.val_domains = ("d0", "d2")
    train(method, data, tmp_path)
    assert {name for name in method.metrics if name.startswith("val/acc/")} == {"val/acc/d0", "val/acc/d2"}
    assert not (tmp_path / "best-d1.pt").exists()
    assert (tmp_path / "best-d0.pt").exists()
