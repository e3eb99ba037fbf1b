from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.quant import CdfQuantizer, Quantizer, QuantLayer, RunningCdfQuantizer, Scope, audit
from qatbench.bench.quant.cdf import MOMENTUM, SMALLEST_STD, _place, normal_fit
from qatbench.bench.site import Site
from qatbench.bench.testing import check_codes
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
KINDS = [CdfQuantizer, RunningCdfQuantizer]


def normal(n: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * std + mean


def make(kind: type[CdfQuantizer], bits: int, x: Tensor, **settings: object) -> CdfQuantizer:
    """Fitted, in eval mode."""
    quantizer = kind(bits, SITE, Scope(), **settings)  # type: ignore[arg-type]
    quantizer.fit(x)
    return quantizer.eval()


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(2, 8), st.floats(-100, 100), st.floats(0.001, 1000), st.integers(0, 10**6))
@SMALL
def test_emaq_4_at_most_2_to_the_m_levels(
    kind: type[CdfQuantizer], bits: int, mean: float, std: float, seed: int
) -> None:
    """A width would be a claim: the paper's own grid has 2^m + 1 levels or more."""
    x = normal(4000, seed, mean, std)
    quantizer = make(kind, bits, x)
    check_codes("cdf", quantizer, x)
    assert quantizer(x).unique().numel() <= 2**bits
    grid = quantizer.encode(x)[1](torch.arange(2**bits))
    torch.testing.assert_close(grid.diff(), quantizer.step.expand(2**bits - 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(grid[[0, -1]] / grid[-1], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "mean", "std"), [(2, 0.0, 1.0), (3, -5.0, 0.02), (4, 100.0, 30.0)])
def test_emaq_5_the_codes_of_normal_data_are_used_equally(
    kind: type[CdfQuantizer], bits: int, mean: float, std: float
) -> None:
    """The projection would not make the tensor uniform: some codes would stand for most of it."""
    x = normal(200_000, 1, mean, std)
    share = make(kind, bits, x).encode(x)[0].bincount(minlength=2**bits) / len(x)
    n = 2**bits - 1
    expected = torch.full((2**bits,), 1 / n)
    expected[[0, -1]] /= 2  # rounding gives the two end codes half a bin
    assert (share - expected).abs().max() < 0.004
    assert -(share * share.log2()).sum() > 0.9 * bits


@pytest.mark.parametrize("kind", KINDS)
def test_emaq_1_the_projection_is_uniform(kind: type[CdfQuantizer]) -> None:
    """Domains with other means and spreads would not be aligned."""
    for k, (mean, std) in enumerate([(0.0, 1.0), (3.0, 0.05), (-40.0, 7.0)]):
        x = normal(100_000, k, mean, std)
        quantizer = make(kind, 8, x)
        place = _place(x, *quantizer.statistics(x), 255).sort().values / 255
        kolmogorov_smirnov = (place - torch.linspace(0, 1, len(place))).abs().max()
        assert kolmogorov_smirnov < 1.63 / len(x) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(2, 8), st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 10**6))
@SMALL
def test_emaq_2_scale_and_shift_keep_the_codes(
    kind: type[CdfQuantizer], bits: int, a: float, b: float, seed: int
) -> None:
    """The same network with other units would be quantized otherwise."""
    x = normal(3000, seed).double()
    one, other = make(kind, bits, x).double(), make(kind, bits, a * x + b).double()
    one.fit(x)
    other.fit(a * x + b)
    differ = one.encode(x)[0] != other.encode(a * x + b)[0]
    assert differ.double().mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(2, 8), st.integers(0, 10**6))
@SMALL
def test_emaq_3_monotone_and_within_alpha(kind: type[CdfQuantizer], bits: int, seed: int) -> None:
    """A larger weight would get a smaller code, or leave the target range."""
    x = (normal(2000, seed) * normal(2000, seed + 1)).sort().values
    quantizer = make(kind, bits, x, alpha=1.5)
    codes = quantizer.encode(x)[0]
    assert bool((codes.diff() >= 0).all())
    edge = 1.5 if kind is CdfQuantizer else 1.5 * float(x.std())
    assert quantizer(x).abs().max() <= edge * (1 + 1e-5)


def test_the_gradient_is_2_alpha_phi() -> None:
    """Weights would be trained by another gradient than the projection's own (EmaQ, Eq. 9)."""
    x = normal(500, 2, 0.3, 0.05).double().requires_grad_()
    grad = normal(500, 3).double()
    quantizer = CdfQuantizer(4, SITE, Scope(), alpha=1.7)
    quantizer(x).backward(grad)
    mean, std = x.detach().mean(), x.detach().std()
    phi = torch.exp(-((x.detach() - mean) ** 2) / (2 * std**2)) / (std * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(x.grad, grad * 2 * float(quantizer.alpha) * phi)


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_statistics_if_asked(kind: type[CdfQuantizer]) -> None:
    """AlignQ's gradient, which knows that mu and sigma are those of the tensor, would be EmaQ's, or the other way round."""
    grad = normal(300, 3).double()
    leaf = normal(300, 2, 0.3, 0.05).double().requires_grad_()
    mean, std = leaf.mean(), leaf.std()
    y = torch.special.ndtr((leaf - mean) / std)
    q = (y.detach() * 15).round() / 15 + y - y.detach()
    ((2 * q - 1) * 2.0 * (std if kind is RunningCdfQuantizer else 1.0)).backward(grad)
    for through in (True, False):
        x = leaf.detach().clone().requires_grad_()
        quantizer = kind(4, SITE, Scope(), 2.0, through).double().train()
        quantizer(x).backward(grad)
        assert torch.allclose(x.grad, leaf.grad, rtol=1e-6, atol=1e-9) is through


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (6, 7), (6,)])
@pytest.mark.parametrize("domains", [1, 3])
def test_the_fused_gradient_is_that_of_autograd(shape: tuple[int, ...], domains: int) -> None:
    """The fast path would train AlignQ, and EmaQ with its gradient, by another rule than the plain formulas."""
    scope = Scope()
    scope.domain = torch.arange(6) % domains
    grad, gradients = normal(torch.Size(shape).numel(), 3).view(shape).double(), []
    for fused in (True, False):
        quantizer = RunningCdfQuantizer(3, SITE, scope, through=True, domains=domains).double().train()
        quantizer.fused = fused
        x = (normal(torch.Size(shape).numel(), 2, 0.3, 1.5).view(shape)).double()
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        quantizer(x).backward(grad)
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.0, -(2.0**100), 2.0**-100])
@pytest.mark.parametrize("count", [1, 7])
def test_a_constant_tensor_stays_finite(kind: type[CdfQuantizer], value: float, count: int) -> None:
    """A dead channel, or a layer that starts at zero, would turn the network into NaN."""
    x = torch.full((count,), value, requires_grad=True)
    for through in (False, True):
        quantizer = make(kind, 3, x.detach(), through=through).train()
        out = quantizer(x)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(x.grad).all()
        assert out.unique().numel() == 1
        assert quantizer.step > 1e-8


def test_large_values_have_their_own_spread() -> None:
    """The variance would overflow, and every value get the code in the middle."""
    x = normal(1000)
    mean, std = normal_fit(x * 2.0**100)
    torch.testing.assert_close(mean / 2.0**100, x.mean())
    torch.testing.assert_close(std / 2.0**100, x.std())
    assert normal_fit(torch.ones(3))[1].item() == pytest.approx(SMALLEST_STD)


def test_running_statistics_follow_the_batches_and_rest_in_use() -> None:
    """A number would depend on how often one looked; or a second pass over a batch would move the averages twice."""
    probe = normal(2000, 0, 1.0, 2.0)
    quantizer = make(RunningCdfQuantizer, 4, probe)
    assert float(quantizer.mean) == pytest.approx(float(probe.mean()), rel=1e-5)
    x = normal(2000, 1, 5.0, 3.0)
    before = copy.deepcopy(quantizer.state_dict())
    first = quantizer(x)
    quantizer.scope.track = False
    quantizer.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    quantizer.scope.track = True
    quantizer(x)
    for name, batch in (("mean", x.mean()), ("std", x.std())):
        torch.testing.assert_close(quantizer.state_dict()[name], before[name].lerp(batch, MOMENTUM))
    assert not torch.equal(quantizer.eval()(x), first)


def test_training_sees_the_batch_and_use_the_averages() -> None:
    """Training would not be on the batch's own distribution, as the paper has it; or one image's code depend on the others'."""
    quantizer = make(RunningCdfQuantizer, 4, normal(2000, 0))
    x = normal(2000, 1, 30.0, 5.0)
    assert quantizer.train()(x).unique().numel() == 16
    quantizer.eval()
    torch.testing.assert_close(quantizer(x)[:10], quantizer(x[:10]))
    assert quantizer(x).unique().numel() == 1  # far from what was averaged


def test_the_state_loads_and_what_is_constant_is_not_saved() -> None:
    """A resumed run would go on with other averages; or a checkpoint would bring another alpha back."""
    one, other = make(RunningCdfQuantizer, 4, normal(100, 0, 3.0)), RunningCdfQuantizer(4, SITE, Scope())
    assert set(one.state_dict()) == {"mean", "std"}
    assert not CdfQuantizer(4, SITE, Scope()).state_dict()
    other.load_state_dict(one.state_dict())
    x = normal(50, 1)
    assert torch.equal(one(x), other.eval()(x))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 7), (9,)])
@pytest.mark.parametrize("kind", KINDS)
def test_under_bfloat16_the_codes_are_those_of_float32(kind: type[CdfQuantizer], shape: tuple[int, ...]) -> None:
    """Eight bits would be fewer under autocast."""
    x = normal(1000)[: torch.Size(shape).numel()].view(shape).to(torch.bfloat16)
    quantizer = make(kind, 8, x)
    out = quantizer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantizer(x.float()).to(torch.bfloat16))
    assert torch.equal(quantizer.encode(x)[0], quantizer.encode(x.float())[0])


def test_a_layer_with_both_passes_the_audit() -> None:
    """Weights and activations could not be used together in a network."""
    quantizers: list[Quantizer] = [CdfQuantizer(2, SITE, Scope()), RunningCdfQuantizer(3, SITE, Scope())]
    net = nn.Sequential(QuantLayer(nn.Conv2d(3, 4, 3), *quantizers))
    x = normal(4 * 3 * 64).view(4, 3, 8, 8)
    quantizers[1].fit(x)
    assert audit(net.eval(), x)["0"] == (4, 8)
