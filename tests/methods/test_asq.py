from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, check_codes, ready
from qatbench.methods.asq import AdaptiveStep, Form, RootTwoPowers, adapters, by_channel, features
from qatbench.methods.lsq import LearnedStep
from torch import Tensor

WIDE = Site("layer", "layer", (4,), weights=36, inputs=9 * 8 * 8, in_channels=9)
SITE = Site("layer", "layer", (4,), weights=36, inputs=5 * 8 * 8, in_channels=5)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
SHAPES = [(6, 5, 8, 8), (6, 7, 5), (6, 5)]  # a convolution's input, tokens, a classifier's


class TestASQ(MethodContract):
    method = "asq"


def adaptive(
    bits: int, signed: bool = False, seed: int | None = None, form: Form = "code", site: Site = SITE
) -> AdaptiveStep:
    """A quantizer whose module is at its start, or (``seed``) somewhere else."""
    quantizer = AdaptiveStep(bits, site, Scope(), signed, 1, form)
    if seed is not None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in quantizer.adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return quantizer


def inputs(shape: tuple[int, ...], signed: bool, seed: int = 0) -> Tensor:
    """Samples of different sizes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) * torch.linspace(0.3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return x if signed else x.relu()


@pytest.mark.parametrize("form", ["code", "bounded"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asq_beta_1_is_lsq(bits: int, signed: bool, layout: torch.memory_format, form: Form) -> None:
    """The method would not start as LSQ, or train its step and its inputs by other gradients than LSQ's."""
    x = inputs(SHAPES[0], signed).to(memory_format=layout)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    found = []
    one = adaptive(bits, signed, form=form)
    with torch.no_grad():
        one.adapter[-1].weight.zero_()
    for quantizer in (one, LearnedStep(bits, SITE, Scope(), signed, SITE.inputs)):
        quantizer.fit(x)
        leaf = x.detach().requires_grad_()
        out = quantizer(leaf)
        out.backward(grad)
        found.append((out.detach(), leaf.grad, quantizer.step.grad))
    (ours, our_x, our_step), (theirs, their_x, their_step) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(our_x, their_x)
    torch.testing.assert_close(our_step, their_step, rtol=1e-4, atol=1e-5)
    assert ours.stride() == our_x.stride() == x.stride()


@given(st.integers(2, 8), st.booleans(), st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(1e-6, 1e6))
@SMALL
def test_asq_s_eff_is_positive(bits: int, signed: bool, seed: int, shape: tuple[int, ...], size: float) -> None:
    """A grid would be turned around or collapse, for an image that the module has not seen the like of."""
    quantizer = adaptive(bits, signed, seed, "bounded")
    x = inputs(shape, signed, seed) * size
    quantizer.fit(x)
    with torch.no_grad():
        quantizer.adapter[2].weight.mul_(1e6)
        steps = quantizer.steps(x)
    assert steps.shape == (len(x), *[1] * (x.ndim - 1))
    assert bool((steps >= 0.5 * quantizer.step).all())
    assert bool((steps <= 1.5 * quantizer.step).all())


@given(st.integers(2, 8), st.booleans(), st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(1e-6, 1e6))
@SMALL
def test_asq_code_s_eff_is_never_zero(bits: int, signed: bool, seed: int, shape: tuple[int, ...], size: float) -> None:
    """An image for which the module says 0 would be divided by it."""
    quantizer = adaptive(bits, signed, seed)
    x = inputs(shape, signed, seed) * size
    quantizer.fit(x)
    with torch.no_grad():
        quantizer.adapter[-1].weight.mul_(-1e6)
        steps, out = quantizer.steps(x), quantizer(x)
    assert steps.shape == (len(x), *[1] * (x.ndim - 1))
    assert bool((steps >= 0.99e-8 * quantizer.step).all())
    assert torch.isfinite(out).all()


def textbook(quantizer: AdaptiveStep, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Input, output and parameters, float64, out of ordinary operations, as a re-implementation would write it."""
    p = {name: value.detach().double().requires_grad_() for name, value in quantizer.named_parameters()}
    leaf = x.detach().double().contiguous().requires_grad_()
    g = quantizer.grad_scale

    def slow(s: Tensor) -> Tensor:
        return s * g + (s - s * g).detach()

    def module(f: Tensor) -> Tensor:
        for k in range(0, len(quantizer.adapter), 2):
            f = (f.relu() if k else f) @ p[f"adapter.{k}.weight"].T + p[f"adapter.{k}.bias"]
        return f

    if quantizer.form == "code":
        beta = module(leaf.mean((2, 3))).relu().clamp(min=1e-8)
        s = (slow(p["step"]) * beta).view(-1, 1, 1, 1)
    else:
        places = leaf.detach().flatten(2)
        f = torch.cat([places.mean(2), places.std(2, correction=0), places.amax(2)], 1)
        s = slow((p["step"] * (1 + 0.5 * module(f).tanh())).view(-1, 1, 1, 1))
    v = (leaf / s).clamp(quantizer.qmin, quantizer.qmax)
    hard = (v.round() - v).detach() + v
    return leaf, hard * s, p


@pytest.mark.parametrize("site", [SITE, WIDE])
@pytest.mark.parametrize("form", ["code", "bounded"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (8, True)])
def test_gradients_equal_autograds(
    bits: int, signed: bool, layout: torch.memory_format, form: Form, site: Site
) -> None:
    """Step, module or input would be trained by another gradient than LSQ's for the step that each sample really has."""
    quantizer = adaptive(bits, signed, seed=3, form=form, site=site).double()
    with torch.no_grad():
        if form == "code":
            quantizer.adapter[-1].bias.fill_(1.5)
    x = inputs((6, site.in_channels, 8, 8), signed).double()
    quantizer.fit(x)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    theirs, out, p = textbook(quantizer, x)
    out.backward(grad)
    ours = x.to(memory_format=layout).requires_grad_()
    value = quantizer(ours)
    value.backward(grad)
    assert len(value.detach().flatten(1).abs().amax(1).unique()) == len(x)  # every sample has its own step
    torch.testing.assert_close(value, out.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-6, atol=1e-9)


def test_the_module_of_the_public_code() -> None:
    """The module would be another one: its width, its start, or its gradient, which is without LSQ's factor there."""
    for channels, widths in ((3, [1]), (7, [1]), (8, [2, 1]), (64, [16, 1])):
        site = Site("layer", "layer", (4,), weights=36, inputs=128, in_channels=channels)
        module = adaptive(4, site=site).adapter
        layers = [layer for layer in module if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers] == widths
        assert layers[0].in_features == channels
        assert layers[-1].bias.tolist() == [1.0]
        assert float(layers[-1].weight.detach().abs().max()) < 0.05
    quantizer = adaptive(4, site=Site("layer", "layer", (4,), weights=36, inputs=128, in_channels=2))
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    quantizer.fit(x)
    quantizer.zero_grad()
    quantizer(x).sum().backward()
    beta = float(quantizer.factor(x).detach())
    step = float(quantizer.step.detach())
    of_beta = float(quantizer.adapter[-1].bias.grad) / step  # both are sums of the same over the features
    assert of_beta / (float(quantizer.step.grad) / beta) == pytest.approx(43.8178, rel=1e-4)  # 1 / g, 128 features


@pytest.mark.parametrize("shape", SHAPES)
def test_features_of_every_kind_of_input(shape: tuple[int, ...]) -> None:
    """Tokens would be taken for channels; or the one place of a classifier's input would have a deviation that is NaN."""
    x = inputs(shape, signed=True)
    places = (x.movedim(2, 1) if x.ndim == 3 else x).reshape(len(x), 5, -1)
    expected = torch.cat([places.mean(2), places.std(2, correction=0), places.amax(2)], 1)
    torch.testing.assert_close(by_channel(x), places)
    torch.testing.assert_close(features(by_channel(x)), expected)
    assert x.ndim > 2 or not features(by_channel(x))[:, 5:10].any()
    assert torch.isfinite(features(by_channel(torch.full(shape, 2.0**100)))).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, True), (8, False)])
def test_common_codes_of_activations(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    """A sample would have more than 2^b values, or what is deployed would have another step than what was measured."""
    quantizer = adaptive(bits, signed, seed=5).eval()
    x = inputs(shape, signed)
    quantizer.fit(x)
    check_codes("activation", quantizer, x)
    out = quantizer(x)
    assert torch.equal(out, quantizer(x))
    assert max(len(sample.unique()) for sample in out.detach().flatten(1)) <= 2**bits
    codes, decode = quantizer.encode(x)
    grid = decode(torch.arange(quantizer.qmin, quantizer.qmax + 1).view(-1, 1, *[1] * (x.ndim - 1)))
    assert grid.shape == (2**bits, *quantizer.steps(x).shape)
    assert bool((grid.diff(dim=0) > 0).all())
    order = x.flatten(1).argsort(1)
    assert bool((out.flatten(1).gather(1, order).diff() >= 0).all())
    again = decode(
        torch.div(out, quantizer.steps(x)).round().int()
    )  # the same steps: Q(Q(x)) = Q(x) for fixed parameters
    assert torch.equal(again, out)
    assert codes.dtype == torch.int32


@pytest.mark.parametrize("bits", range(2, 9))
def test_post_consecutive_level_ratio_is_root_2(bits: int) -> None:
    """The basis of the levels would not be the square root of two, or there would be more or fewer of them than bits allow."""
    quantizer = RootTwoPowers(bits, SITE, Scope(), "plain")
    n = 2 ** (bits - 1) - 1
    levels = quantizer.levels.double()
    assert len(levels) == len(levels.unique()) == 2 * n + 1
    positive = levels[n + 1 :]
    assert positive[-1] == 1
    torch.testing.assert_close(positive[1:] / positive[:-1], torch.full((n - 1,), math.sqrt(2)).double())
    assert torch.equal(levels, -levels.flip(0))
    assert levels[n] == 0


@given(st.integers(2, 8), st.integers(0, 10**6))
@SMALL
def test_post_takes_the_nearest_level(bits: int, seed: int) -> None:
    """Weights would be rounded in another measure than the public code's, clipped elsewhere than at the scale, or never be zero."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 300, generator=rng).double() * torch.tensor([1.0, 0.01, 30.0, 1e-6]).view(-1, 1)
    w *= 2.0 ** (-40 * torch.rand(w.shape, generator=rng))  # over all exponents
    quantizer = RootTwoPowers(bits, SITE, Scope(), "plain").double()
    quantizer.fit(w)
    torch.testing.assert_close(quantizer.scale.detach(), w.abs().quantile(0.99, dim=1), rtol=1e-6, atol=0)
    u = w / quantizer.scale.detach().view(-1, 1)
    n = 2 ** (bits - 1) - 1
    sizes = 2.0 ** (torch.arange(1 - n, 1).double() / 2)
    levels = torch.cat([-sizes, torch.zeros(1).double(), sizes])
    got = (quantizer(w) / quantizer.scale.view(-1, 1)).detach()
    torch.testing.assert_close((got - u).abs(), (levels - u[..., None]).abs().amin(-1), rtol=1e-5, atol=1e-7)


@given(st.integers(2, 8), st.integers(0, 10**6))
@SMALL
def test_common_few_values_monotone_idempotent_weights(bits: int, seed: int) -> None:
    """A width would be a claim, a larger weight be smaller than a smaller one, or a value on a level be moved to another."""
    w = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.1
    w[1] *= 50
    quantizer = RootTwoPowers(bits, SITE, Scope(), "plain").eval()
    quantizer.fit(w)
    check_codes("weight", quantizer, w)
    out = quantizer(w)
    assert torch.equal(quantizer(out), out)
    for channel, values in zip(w.flatten(1), out.detach().flatten(1), strict=True):
        assert len(values.unique()) <= 2**bits - 1
        assert bool((values[channel.argsort()].diff() >= 0).all())
    codes, decode = quantizer.encode(w)
    grid = torch.stack(
        [decode(torch.full((4, 1, 1, 1), k)).flatten() for k in range(quantizer.qmin, quantizer.qmax + 1)], 1
    )
    picked = grid.gather(1, (codes - quantizer.qmin).flatten(1).long())
    assert torch.equal(picked.view_as(w), out)


def test_a_filter_of_zeros_has_a_scale() -> None:
    """A pruned filter would be divided by zero."""
    w = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    quantizer = RootTwoPowers(3, SITE, Scope(), "lsq")
    quantizer.fit(w)
    assert bool((quantizer.scale > 0).all())
    assert not quantizer(w)[2].any()


def test_the_scales_gradient_has_lsqs_factor() -> None:
    """Scales would learn as many times too fast as there are weights in a filter: at 2 bits training goes astray."""
    grads = []
    for rule in ("code", "plain", "lsq"):
        one, _ = ready("asq", bits="w3a3", params={"asq": {"scale_grad": rule}})
        layer = one.net.get_submodule("layer2.0.conv2")
        layer.weight_quantizer(layer.weight).square().sum().backward()
        grads.append(layer.weight_quantizer.scale.grad)
    weights = layer.weight[0].numel()
    torch.testing.assert_close(grads[0], grads[1] / math.sqrt(weights))
    torch.testing.assert_close(grads[2], grads[1] / math.sqrt(weights * 3))
    assert bool((grads[1] != 0).all())


def test_weight_gradients_are_the_public_code_s() -> None:
    """Weights beyond the scale would have a gradient; or scales another one than w_q/s - w/s, there the sign, over the channel."""
    w = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    grad = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    quantizer = RootTwoPowers(4, SITE, Scope(), "plain").double()
    quantizer.fit(w)
    with torch.no_grad():
        quantizer.scale.mul_(torch.tensor([0.5, 1.0, 1.1, 2.0]))  # also with weights beyond the largest level
    leaf = w.clone().requires_grad_()
    out = quantizer(leaf)
    out.backward(grad)
    s = quantizer.scale.detach().view(-1, 1, 1, 1)
    inside = w.abs() <= s
    assert 0.3 < float(inside.double().mean()) < 1
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.where(inside, grad, 0.0))
    slope = torch.where(inside, out.detach() / s - w / s, w.sign())
    torch.testing.assert_close(quantizer.scale.grad, (grad * slope).sum((1, 2, 3)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_finite(bits: int) -> None:
    """One strange tensor, a dead channel or a pruned filter would turn the network into NaN."""
    for value in (0.0, 2.0**100, -(2.0**100), 1e-30):
        for quantizer, x in (
            (adaptive(bits, True, seed=1), torch.full(SHAPES[0], value)),
            (adaptive(bits, True, seed=1, form="bounded"), torch.full(SHAPES[0], value)),
            (adaptive(bits, True, seed=1), torch.full((9,), value)),  # fits no layer: plain LSQ
            (RootTwoPowers(bits, SITE, Scope(), "plain"), torch.full((4, 5, 3, 3), value)),
            (RootTwoPowers(bits, SITE, Scope(), "plain"), torch.full((9,), value)),
        ):
            quantizer.fit(x)
            leaf = x.clone().requires_grad_()
            out = quantizer(leaf)
            out.mean().backward()
            grads = [leaf.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)]
            assert all(bool(torch.isfinite(t).all()) for t in (out, *grads)), (type(quantizer), value)


def test_what_is_nan_stays_visible() -> None:
    """A run whose weights or activations have become NaN would go on with levels in their place, and be recorded as done."""
    x = inputs(SHAPES[1], True)
    x[1, 2, 3] = torch.nan
    assert torch.isnan(adaptive(4, True, seed=0)(x)[1]).all()  # its step is NaN, too
    w = torch.randn(4, 6)
    w[2, 3] = torch.nan
    assert torch.isnan(RootTwoPowers(4, SITE, Scope(), "plain")(w)).nonzero().tolist() == [[2, 3]]


def test_bfloat16_keeps_its_type() -> None:
    """Activations would grow to float32 in the middle of a bf16 run."""
    x = inputs(SHAPES[0], False).bfloat16().requires_grad_()
    quantizer = adaptive(4, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps, out = quantizer.steps(x), quantizer(x)
    out.sum().backward()
    assert (steps.dtype, out.dtype, x.grad.dtype, quantizer.step.grad.dtype) == (
        torch.float32,
        *[torch.bfloat16] * 2,
        torch.float32,
    )


def test_modules_are_frozen_in_the_warm_up_and_learn_after_it() -> None:
    """The modules would learn while the steps are still far off; or never."""
    method, data = ready("asq", params={"asq": {"warmup": 0.25}}, weight_decay=0.1)
    loop, batches = Loop(method, data), list(data.train_dataloader())
    modules = adapters(method.net)
    assert len(modules) == len([s for s in method.sites if s.kind == "layer"])

    def look() -> list[Tensor]:
        return [p.detach().clone() for m in modules for p in m.parameters()]

    start = look()
    loop.epoch(batches)  # of four
    assert all(torch.equal(a, b) for a, b in zip(start, look(), strict=True))
    loop.epoch(batches, 1)
    assert not any(torch.equal(a, b) for a, b in zip(start, look(), strict=True))


def test_steps_and_scales_are_not_decayed_and_modules_have_their_own_rate() -> None:
    """Weight decay would pull steps and scales to zero; ``module_lr`` would have no effect."""
    method, _ = ready("asq", weight_decay=0.5, params={"asq": {"module_lr": 0.3}})
    expected = {id(p): (0.3, 0.5) for adapter in adapters(method.net) for p in adapter.parameters()}
    for name, parameter in method.net.named_parameters():
        if name.endswith(("quantizer.step", "quantizer.scale")):
            expected[id(parameter)] = (1.0, 0.0)
    seen = []
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert (group["lr_scale"], group["weight_decay"]) == expected.get(id(parameter), (1.0, 0.5))
            seen.append(id(parameter))
    assert sorted(seen) == sorted(id(p) for p in method.net.parameters())


def test_a_negative_scale_is_brought_back() -> None:
    """A filter's levels would be turned around after one large step."""
    quantizer = RootTwoPowers(3, SITE, Scope(), "plain")
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
        quantizer.project()
    assert bool((quantizer.scale > 0).all())


def test_a_module_sees_the_channels_of_its_layers_input() -> None:
    """A layer's module would be built for another number of channels, and Delta be 0 for ever."""
    method, data = ready("asq")
    for site in (s for s in method.sites if s.kind == "layer"):
        quantizer = method.net.get_submodule(site.name).act_quantizer
        assert quantizer.adapter[0].in_features == site.in_channels
        with torch.no_grad():
            quantizer.adapter[-1].weight.zero_()
            quantizer.adapter[-1].bias.fill_(1.7)
    seen = []
    for _, module in method.net.named_modules():
        if isinstance(module, AdaptiveStep):
            module.register_forward_pre_hook(lambda q, args: seen.append((q.steps(args[0]) / q.step).mean().item()))
    method.eval()
    with torch.no_grad():
        method.net(data.probe(8).x)
    assert seen == pytest.approx([1.7] * len(seen))
    assert seen


def test_first_and_last_weights_have_a_learned_step_at_8_bits() -> None:
    """The layers that are kept at 8 bits to lose nothing would lose up to a fifth of each weight."""
    method, _ = ready("asq")
    edges = [s.name for s in method.sites if s.kind == "layer" and s.edge]
    assert [type(method.net.get_submodule(n).weight_quantizer) for n in edges] == [LearnedStep] * 2
    same, _ = ready("asq", first_last="same")
    assert [type(same.net.get_submodule(n).weight_quantizer) for n in edges] == [RootTwoPowers] * 2
