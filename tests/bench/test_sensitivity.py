from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qatbench.bench.data import Batch
from qatbench.bench.method import Probe
from qatbench.bench.quant.sensitivity import CHUNK, fisher, hessian_trace, loss_rise, second_order, shares
from qatbench.bench.spec import Budget
from qatbench.bench.testing import float_net, ready
from torch import Tensor, nn
from torch.nn import functional as F


def batch_of(n: int, *shape: int) -> Batch:
    rng = torch.Generator().manual_seed(5)
    return Batch(torch.randn(n, *shape, generator=rng), torch.arange(n) % 3, torch.arange(n) % 2)


def small_net() -> nn.Sequential:
    """Convolutions, a BatchNorm with statistics of its own and a head; every kind of curvature, few enough weights to be exact."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3, 2, groups=3),
        nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    net(torch.randn(32, 2, 6, 6))  # moves the running statistics
    return net.eval()


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in net.named_parameters() if p.ndim > 1}


def loss_of(net: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: F.cross_entropy(net(batch.x), batch.y)


def exact_traces(net: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
    """From the whole Hessian of each weight: its trace, and the deviation of one probe, whose variance is 2 sum H_ij^2, i != j."""
    found = {}
    for name, weight in weights_of(net).items():

        def of(w: Tensor, name: str = name) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, {name: w}, (batch.x,)), batch.y)

        n = weight.numel()
        hessian = torch.as_tensor(torch.autograd.functional.hessian(of, weight.detach().clone())).reshape(n, n)
        couples = hessian - hessian.diag().diag()
        found[name] = float(hessian.trace()), float(2 * couples.square().sum()) ** 0.5
    return found


def test_trace_of_a_diagonal_quadratic_is_exact() -> None:
    """The trace would be off by a factor: one random vector of signs is enough where nothing couples."""
    a, b = torch.randn(5, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    k = torch.arange(1.0, 6.0)
    found = hessian_trace(
        lambda _: 0.5 * (k * a * a).sum() + 3 * (b * b).sum(), batch_of(4, 1), {"a": a, "b": b}, probes=1
    )
    assert found == {"a": pytest.approx(15.0), "b": pytest.approx(36.0)}


def test_trace_of_a_quadratic_form_is_right_on_average() -> None:
    """What couples two weights would be counted as curvature."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=rng)
    matrix = root @ root.T
    x = torch.randn(6, generator=rng).requires_grad_()
    found = hessian_trace(lambda _: 0.5 * x @ matrix @ x, batch_of(4, 1), {"x": x}, probes=4000)
    assert found["x"] == pytest.approx(float(matrix.trace()), rel=0.03)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [40, CHUNK + 20])
def test_trace_equals_that_of_the_whole_hessian(images: int, layout: torch.memory_format) -> None:
    """Plans would be made of a wrong number, for some number of images or in the memory format that training uses."""
    net, batch = small_net().to(memory_format=layout), batch_of(images, 2, 6, 6)
    batch.x = batch.x.contiguous(memory_format=layout)
    expected = exact_traces(net, batch)
    found = hessian_trace(loss_of(net), batch, weights_of(net), probes=400)
    for name, (trace, deviation) in expected.items():
        assert found[name] == pytest.approx(trace, abs=5 * deviation / 20), name
    assert found["3.weight"] == pytest.approx(expected["3.weight"][0], rel=0.05)
    assert found["6.weight"] == pytest.approx(expected["6.weight"][0], rel=0.05)


def test_more_probes_come_closer() -> None:
    """The number of probes would be an option without effect."""
    net, batch = small_net(), batch_of(40, 2, 6, 6)
    expected = exact_traces(net, batch)

    def error(probes: int) -> float:
        found = [hessian_trace(loss_of(net), batch, weights_of(net), probes, seed) for seed in range(8)]
        return sum(abs(f[n] - trace) / deviation for f in found for n, (trace, deviation) in expected.items())

    assert error(64) < 0.5 * error(4)


def test_measuring_leaves_no_trace() -> None:
    """Weights, statistics, gradients or random numbers of the run would depend on whether a plan was made."""
    net, batch = small_net(), batch_of(70, 2, 6, 6)
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():  # the caller's mode is no matter
        one = hessian_trace(loss_of(net), batch, weights_of(net), 4, seed=1)
    assert one == hessian_trace(loss_of(net), batch, weights_of(net), 4, seed=1)
    assert one != hessian_trace(loss_of(net), batch, weights_of(net), 4, seed=2)
    fisher(loss_of(net), batch, weights_of(net))
    loss_rise(loss_of(net), batch, weights_of(net), (2,), lambda name, _: torch.zeros_like(net.get_parameter(name)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_fisher_squares_each_images_gradient() -> None:
    """Gradients of a batch would be squared after their mean, where they cancel: near zero for every trained network."""
    net, batch = small_net(), batch_of(10, 2, 6, 6)
    expected = dict.fromkeys(weights_of(net), 0.0)
    for k in range(10):
        loss = F.cross_entropy(net(batch.x[k : k + 1]), batch.y[k : k + 1])
        for name, g in zip(expected, torch.autograd.grad(loss, list(weights_of(net).values())), strict=True):
            expected[name] += float(g.square().sum()) / 10
    assert fisher(loss_of(net), batch, weights_of(net)) == pytest.approx(expected, rel=1e-4)


def test_loss_rise_is_of_one_layer_at_a_time() -> None:
    """The harm of a layer would include that of the layers before it, or be counted from another loss."""
    net, batch = small_net(), batch_of(CHUNK + 20, 2, 6, 6)
    rises = loss_rise(loss_of(net), batch, weights_of(net), (2, 3), lambda name, b: net.get_parameter(name) * (b - 2))
    with torch.no_grad():
        before = float(loss_of(net)(batch))
        for name, weight in weights_of(net).items():
            assert rises[name][3] == pytest.approx(0, abs=1e-6)
            without = torch.func.functional_call(net, {name: torch.zeros_like(weight)}, (batch.x,))
            assert rises[name][2] == pytest.approx(float(F.cross_entropy(without, batch.y)) - before, abs=1e-5)


def test_loss_rise_puts_the_weight_back_after_an_error() -> None:
    """A quantizer that fails would leave the float network, which may be the teacher, with a quantized layer."""
    weight = nn.Parameter(torch.ones(2))
    values = iter([1.0, torch.inf])

    def loss(_: Batch) -> Tensor:
        value = next(values)
        if value == torch.inf:
            raise RuntimeError("no")
        return torch.tensor(value)

    with pytest.raises(RuntimeError):
        loss_rise(loss, batch_of(3, 1), {"w": weight}, (2,), lambda *_: torch.zeros(2))
    assert weight.tolist() == [1, 1]


def test_second_order_is_average_curvature_times_squared_error() -> None:
    """Large layers would count twice, or not at all; a negative estimate would reward coarse grids."""
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[1.0], [1.0]])}
    found = second_order({"a": 6.0, "b": -1.0}, params, (2, 4), lambda name, b: params[name] - 1 / b)
    assert found == {"a": {2: pytest.approx(3 * 0.5), 4: pytest.approx(3 * 0.125)}, "b": {2: 0.0, 4: 0.0}}


def test_adq_8_shares_sum_to_one() -> None:
    """The log would tell shares that are none."""
    found = shares({"a": 3.0, "b": 1.0, "c": -2.0})
    assert found == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert shares({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


def test_every_method_has_a_plan_under_a_budget() -> None:
    """Mixed precision would be for those methods only that bring a sensitivity of their own."""
    method, _ = ready("lsq", bits="avg3.5")
    inner = [s for s in method.sites if s.kind == "layer" and not s.edge]
    spent = sum(s.weights * method.bit_plan[s.name].w for s in inner) / sum(s.weights for s in inner)
    assert 3.4 < spent <= 3.5
    assert len({method.bit_plan[s.name].w for s in inner}) > 1
    assert {method.bit_plan[s.name].a for s in inner} == {4}
    harm = method.harm(inner, (2, 4, 8), Probe(float_net(), method.probe))
    assert list(harm) == [s.name for s in inner]
    for table in harm.values():
        assert table[2] > table[4] > table[8] > 0 or set(table.values()) == {0.0}
    again = method.plan(method.sites, Budget(3.5, 4), Probe(float_net(), method.probe))
    assert again == method.bit_plan
