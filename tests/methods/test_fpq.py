from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qatbench.bench.errors import RunFailed
from qatbench.bench.method import Method, Out, Tap
from qatbench.bench.quant import Quantizer, QuantLayer, Scope, UniformQuantizer, quant_layers
from qatbench.bench.quant.layer import apply_layer
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, all_train, logits, ready, same, state, train
from qatbench.methods.fpq import EPS, channel_wise_distance, noise, perturb
from qatbench.methods.lsq import LearnedStep
from torch import Tensor, nn

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)
SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)


class TestFPQ(MethodContract):
    method = "fpq+lsq"


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, 4, 4, generator=rng), torch.randn(6, 5, 4, 4, generator=rng)


def act_quantizer() -> LearnedStep:
    quantizer = LearnedStep(3, SITE, Scope(), False, 72)
    quantizer.fit(features()[0].relu())
    return quantizer


def perturbed(quantizer: Quantizer, x: Tensor, p: float = 1.0) -> Tensor:
    """What the quantizer sees."""
    changed = perturb(p, quantizer, (x,))
    return x if changed is None else changed


# --- stochastic feature perturbation ------------------------------------------------------------------------------------


@given(st.floats(2.0**-40, 2.0**40), st.sampled_from([(), (1, 5, 1, 1), (16, 1, 1, 1)]), st.integers(0, 10**6))
@SMALL
def test_fpq_1_noise_is_at_most_half_a_step_and_zero_on_average(size: float, shape: tuple, seed: int) -> None:
    """A value could be moved by more than one code, or all of them would be moved in one direction."""
    torch.manual_seed(seed)
    x = torch.zeros(16, 5, 16, 16)
    step = torch.rand(shape) * size + size
    delta = noise(x, step) / step
    assert delta.abs().max() <= 0.5
    assert delta.abs().max() > 0.49
    assert abs(delta.mean().item()) < 5 * 12**-0.5 * x.numel() ** -0.5  # of a uniform distribution's mean: 5 deviations
    assert delta.var().item() == pytest.approx(1 / 12, rel=0.03)


def test_fpq_2_without_noise_and_distillation_it_is_lsq(tmp_path: Path) -> None:
    """The wrapper would change training by being there: by a random number that is drawn, or a tap that leaves something behind."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = ready("fpq+lsq", epochs=1, params={"fpq": {"p": 0.0, "csd": 0.0}})
    train(wrapped, data, tmp_path / "wrapped")
    assert same(state(alone), state(wrapped)) == []
    assert set(wrapped.losses_seen) == {"task"}
    assert wrapped.tap_names == ()
    assert wrapped._float_teacher == []


def test_fpq_3_evaluation_is_unperturbed() -> None:
    """The network would be measured, deployed and calibrated with noise on its features."""
    alone, data = ready("lsq")
    wrapped, _ = ready("fpq+lsq", params={"fpq": {"p": 1.0}})
    batch = all_train(data)
    before = torch.get_rng_state()
    assert same(state(alone), state(wrapped)) == []  # calibrated alike
    assert torch.equal(logits(alone, alone.net, batch), logits(wrapped, wrapped.net, batch))
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert not torch.equal(alone.net.train()(batch.x), wrapped.net.train()(batch.x))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_p_is_the_share_of_the_passes_with_noise(p: float) -> None:
    """Noise would be added to a share of the elements, or always; the paper's best p is 0.1."""
    torch.manual_seed(0)
    quantizer, (x, _) = act_quantizer(), features()
    moved = [float((perturbed(quantizer, x, p) != x).float().mean()) for _ in range(1000)]
    assert set(np.round(moved, 1)) <= {0.0, 1.0}  # the whole map or nothing of it
    assert np.mean(np.round(moved)) == pytest.approx(p, abs=5 * (p * (1 - p) / 1000) ** 0.5)


def test_the_noise_is_on_every_convolutions_input_and_before_its_quantizer() -> None:
    """Noise after the quantizer leaves the grid; noise on the classifier's input is not the paper's."""
    method, data = ready("fpq+lsq", params={"fpq": {"p": 1.0}})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for site in [s for s in method.sites if s.kind == "layer"]:
        layer = method.net.get_submodule(site.name)
        layer.register_forward_pre_hook(lambda _m, i, name=site.name: seen.update({name: (i[0], i[0])}))
        layer.act_quantizer.register_forward_pre_hook(
            lambda _m, i, name=site.name: seen.update({name: (seen[name][0], i[0])})
        )
    method.net.train()(next(iter(data.train_dataloader())).x)
    assert len(seen) == 10
    for name, (given_to_layer, given_to_quantizer) in seen.items():
        step = method.net.get_submodule(name).act_quantizer.step
        distance = (given_to_quantizer - given_to_layer).abs().max()
        assert distance <= 0.501 * step, name
        assert bool(distance > 0.4 * step) == (name != "head"), name


def test_without_a_uniform_step_nothing_is_added() -> None:
    """There is no half step to draw from, so another quantizer's noise would have to be made up."""
    x = features()[0].relu()
    assert perturbed(Quantizer(3, SITE, Scope(), False), x) is x
    assert perturbed(UniformQuantizer(3, SITE, Scope(), False), x) is not x


def test_the_step_gets_no_gradient_through_the_noise() -> None:
    """The step would be trained to shrink the noise."""
    quantizer, (x, _) = act_quantizer(), features()
    leaf = x.requires_grad_()
    perturbed(quantizer, leaf).sum().backward()
    assert quantizer.step.grad is None
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_a_tap_is_what_the_layer_computed_with() -> None:
    """A loss on the quantized feature would see other noise than the convolution did."""
    method, data = ready("fpq+lsq", params={"fpq": {"p": 1.0}})
    batch, out = next(iter(data.train_dataloader())), []
    inner = method.inner.losses
    method.inner.losses = lambda o, b: out.append(o) or inner(o, b)
    method.train().compute_losses(batch, track=True)
    for name, tap in out[0].taps.items():
        layer = method.net.get_submodule(name)
        value = apply_layer(tap.quantized, layer.weight_quantizer(layer.weight), layer.bias, layer.conv)
        assert torch.equal(value, tap.value), name
        without_noise = layer.act_quantizer.quantize(tap.inputs[0])
        assert torch.equal(tap.quantized, without_noise) == (name == "head"), name


# --- channel-wise standardised distillation ---------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.5, 2**6), st.floats(-50, 50))
@SMALL
def test_fpq_4_distance_is_invariant_to_scale_and_offset_of_a_channel(seed: int, a: float, b: float) -> None:
    """The student would be drawn to the float network's scales and offsets, which the norm after each convolution takes away."""
    student, teacher = features(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    scale = 0.5 + a * torch.rand(1, 5, 1, 1, generator=rng)
    offset = b * torch.randn(1, 5, 1, 1, generator=rng)
    plain = channel_wise_distance(student, teacher, "mean")
    assert plain > 0.5
    torch.testing.assert_close(
        channel_wise_distance(scale * student + offset, teacher, "mean"), plain, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        channel_wise_distance(student, scale * teacher + offset, "mean"), plain, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(channel_wise_distance(-student, student, "mean"), torch.tensor(4.0), rtol=1e-3, atol=0)


def test_distance_equals_the_papers_formula() -> None:
    """Statistics over other axes, or another reduction, would be another loss than Eq. 17."""
    student, teacher = features()
    z = []
    for feature in (student, teacher):
        f = feature.double().numpy()
        mean, var = f.mean((0, 2, 3), keepdims=True), f.var((0, 2, 3), keepdims=True)
        z.append((f - mean) / np.sqrt(var + EPS))
    expected = ((z[1] - z[0]) ** 2).sum()
    assert channel_wise_distance(student, teacher, "sum").item() == pytest.approx(expected, rel=1e-5)
    assert channel_wise_distance(student, teacher, "mean").item() == pytest.approx(expected / student.numel(), rel=1e-5)
    assert channel_wise_distance(student, student, "sum") == 0
    assert torch.isfinite(channel_wise_distance(torch.zeros_like(student), teacher, "mean"))


def outs(method: Method) -> tuple[Out, float]:
    """A pass with one made feature for every layer, and the distances of the convolutions' added up."""
    layers = [s for s in method.sites if s.kind == "layer"]
    taps: list[dict[str, Tap]] = [{}, {}]
    total = 0.0
    for k, site in enumerate(layers):
        pair = features(k)
        pair = pair if site.name != "head" else (pair[0][..., 0, 0], pair[1][..., 0, 0])
        total += 0.0 if site.name == "head" else float(channel_wise_distance(*pair, "mean"))
        for side, value in zip(taps, pair, strict=True):
            side[site.name] = Tap(value, None, None, (value,))
    x = torch.zeros(24, 4)
    return Out(x, taps[0], {"float": Out(x, taps[1])}), total


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_distances_of_all_convolutions_are_added_to_the_inner_losses(weight: float) -> None:
    """A layer would be left out, the classifier would be distilled twice in kd+fpq, or the task's loss would be scaled."""
    method, data = ready("fpq+lsq", params={"fpq": {"csd": weight}})
    out, total = outs(method)
    batch = next(iter(data.train_dataloader()))
    losses = method.losses(out, batch)
    assert set(losses) == {"task", "csd"}
    assert losses["csd"].item() == pytest.approx(weight * total, rel=1e-5)
    assert torch.equal(losses["task"], data.task.losses(out.logits, batch)["task"])


def test_the_sum_is_that_of_the_batch() -> None:
    """``reduction="sum"`` would not be the paper's plain sum."""
    big, data = ready("fpq+lsq", params={"fpq": {"reduction": "sum"}})
    out, total = outs(big)
    found = big.losses(out, next(iter(data.train_dataloader())))["csd"].item()
    assert found == pytest.approx(total * features()[0].numel(), rel=1e-5)


def test_a_network_without_convolutions_is_refused() -> None:
    """Training would end in an error that says nothing of the method; or run without what its name says."""
    method, data = ready("fpq+lsq")
    out, _ = outs(method)
    method.layers = ["head"]
    with pytest.raises(RunFailed, match=r"has none; set fpq\.csd=0"):
        method.losses(out, next(iter(data.train_dataloader())))


def test_the_distance_is_to_the_float_network_and_trains_the_student_alone() -> None:
    """The teacher would be trained, or the student compared with itself."""
    method, data = ready("fpq+lsq", bits="w2a2")
    losses = method.train().compute_losses(next(iter(data.train_dataloader())), track=True)
    assert losses["csd"] > 0.1
    losses["csd"].backward()
    assert method.net.conv1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in method._float_teacher[0].parameters())


def test_a_perturbed_input_is_not_made_again_in_the_backward_pass() -> None:
    """With compiled kernels the weight's gradient would be that of the clean input, not of the perturbed one that was used."""
    torch.manual_seed(0)
    method, _ = ready("fpq+lsq")
    noisy = [layer.act_quantizer for _, layer in quant_layers(method.net)]
    assert noisy
    assert all(quantizer is not None and quantizer.random for quantizer in noisy)
    calm, _ = ready("fpq+lsq", params={"fpq": {"p": 0.0}})
    assert not any(layer.act_quantizer.random for _, layer in quant_layers(calm.net))  # type: ignore[union-attr]


def test_a_layer_keeps_the_perturbed_input() -> None:
    """The mark that says so would have no effect."""
    quantizer = act_quantizer()
    quantizer.redo = lambda x: lambda: torch.zeros_like(x)  # type: ignore[method-assign]  # what compiled kernels offer
    quantizer.random = True
    layer = QuantLayer(nn.Linear(4, 2), None, quantizer)
    x = features()[0].relu()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, quantizer(x).detach().flatten(0, 2).sum(0).expand(2, 4))
