from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from passes import begin, in_second_pass
from qatbench.bench.chain import normal_name
from qatbench.bench.quant import Quantizer
from qatbench.bench.quant.quantizer import step_of
from qatbench.bench.testing import Loop, MethodContract, ready, same, state
from qatbench.methods.asq import adapters
from qatbench.methods.sam import trained
from torch import Tensor, nn


class TestSAM(MethodContract):
    method = "sam"


def test_sam_1_rho_zero_is_the_inner_method() -> None:
    """The wrapper would change training by being there: by moved statistics, or weights that do not come back."""
    states = []
    for name, params in (("lsq", {}), ("sam", {"sam": {"rho": 0.0}})):
        method, data = ready(name, params=params)
        Loop(method, data).epoch(list(data.train_dataloader())[:3])
        states.append(state(method))
    assert same(*states) == []


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_2_the_perturbation_has_norm_rho(adaptive: bool) -> None:
    """Rho would mean something else in every network; or the perturbation would not go up along the gradient."""
    rho = 0.01
    method, run = begin("sam", params={"sam": {"rho": rho, "adaptive": adaptive, "perturb": "weights"}})
    run.backward()
    before = {p: p.detach().clone() for p, _ in trained(run)}
    with method.perturbed(run):
        e = {p: p.detach() - before[p] for p in before}
    inner = sum(float((p.grad * e[p]).sum()) for p in before if p.grad is not None)
    assert inner > 0
    # ASAM: e = theta^2 g rho / ||theta g||, so it is e / theta that has norm rho.
    size = [(e[p] / before[p]).nan_to_num(posinf=0, neginf=0) if adaptive else e[p] for p in before]
    assert torch.cat([s.flatten() for s in size]).norm().item() == pytest.approx(rho, rel=1e-3)
    assert all(bool((e[p] == 0).all()) for p in method.of_quantizers)


@pytest.mark.parametrize("name", ["sam", "sagm", "fqat", "gaqat"])
def test_sam_3_theta_comes_back_to_the_bit(name: str) -> None:
    """Training would drift by roundings; after Ctrl-C in the second pass a checkpoint would hold perturbed weights."""
    method, run = begin(name, params={name: {"rho": 0.5}})
    run.backward()
    before = {p: p.detach().clone() for p, _ in trained(run)}
    with method.perturbed(run):
        assert sum(not torch.equal(p, kept) for p, kept in before.items()) > 20
        run.backward(track=False)
    assert all(torch.equal(p, kept) for p, kept in before.items())

    def interrupt() -> None:
        raise KeyboardInterrupt

    in_second_pass(method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        method.step(run)
    assert all(torch.equal(p, kept) for p, kept in before.items())


@pytest.mark.parametrize("name", ["sam", "sagm"])
def test_sam_4_running_statistics_move_once_a_step(name: str) -> None:
    """BatchNorm would average in what the perturbed network computes, and twice a step."""
    method, run = begin(name)
    alone, single = begin("lsq")
    single.backward()
    method.step(run)
    theirs = dict(alone.net.named_buffers())
    running = [n for n in theirs if "running" in n or "batches" in n]
    assert running
    for n, buffer in method.net.named_buffers():
        assert torch.equal(buffer, theirs[n]), n


def test_sam_5_the_step_is_made_with_the_second_gradient_alone() -> None:
    """Both gradients would be added up; or the second one would be that of the unperturbed network."""
    method, run = begin("sam", momentum=0.0, weight_decay=0.0, params={"sam": {"rho": 0.05}})
    run.backward(track=False)
    before = {p: p.detach().clone() for p, _ in trained(run)}
    first = {p: g.clone() for p, g in trained(run)}
    with method.perturbed(run):
        run.backward(track=False)
    second = {p: g.clone() for p, g in trained(run)}
    method.step(run)
    assert sum(not torch.allclose(first[p], second[p], rtol=1e-3) for p in first) > 20
    for p, theta in before.items():
        torch.testing.assert_close(p.detach(), theta - method.spec.lr * second[p])


def test_sam_6_no_step_falls_below_a_quarter_of_itself() -> None:
    """A large perturbation would turn a grid around, or make its step zero."""
    for name in ("sam", "sam+pact", "sam+lsqplus", "sam+apot"):
        params = {"pact": {"alpha": 1.0}} if name == "sam+pact" else {}
        method, run = begin(name, params={"sam": {"rho": 1000.0}, **params})
        run.backward()
        before = {p: p.detach().clone() for p in method.scales}
        with method.perturbed(run):
            assert any(not torch.equal(p, before[p]) for p in before), name
            assert all(bool((p[before[p] > 0] >= 0.25 * before[p][before[p] > 0]).all()) for p in before), name
            steps = [step_of(m) for m in method.net.modules() if isinstance(m, Quantizer)]
            assert all(bool((step > 0).all()) for step in steps if step is not None), name


@pytest.mark.parametrize(("name", "copies"), [("sam", 1), ("sagm", 2), ("fqat", 2)])
def test_sam_7_memory_is_one_copy_of_the_weights(name: str, copies: int) -> None:
    """The gradients of the first pass would be kept beside those of the second: a network that fits for LSQ would not for SAM.

    Between the passes there are, beside the parameters, their copies and, for sagm, the gradients that the second pass adds to.
    """
    method, run = begin(name)
    shape = max((p for p in method.net.parameters()), key=Tensor.numel).shape
    alike = sum(p.shape == shape for p in method.net.parameters())
    found: list[int] = []

    def count() -> None:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.shape == shape]
        ours = {t.data_ptr() for t in tensors} - known
        found.append(len(ours) // alike)

    gc.collect()
    known = {t.data_ptr() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.shape == shape}
    in_second_pass(method, count)
    method.step(run)
    assert found == [copies]


def test_a_gradient_of_zero_perturbs_nothing() -> None:
    """A batch without a gradient would make all weights NaN."""
    method, run = begin("sam")
    run.backward()
    for _, grad in trained(run):
        grad.zero_()
    before = state(method)
    with method.perturbed(run):
        assert same(before, state(method)) == []


def test_a_network_without_batchnorm_trains() -> None:
    """Something would ask for statistics that are not there."""
    method, data = ready("sam", norm="group")
    assert not [n for n, _ in method.net.named_buffers() if "running" in n]
    before = state(method)
    Loop(method, data).epoch(list(data.train_dataloader())[:2])
    after = state(method)
    assert same(before, after) != []
    assert all(bool(v.isfinite().all()) for v in after.values())


# --- what is frozen has no part in it ---------------------------------------------------------------------------------


def sizes(method: Any, run: Any, frozen: set[nn.Parameter]) -> tuple[float, float]:
    """A step; how far its perturbation moved what trains, and what is frozen."""
    before = {p: p.detach().clone() for p in method.parameters()}
    found: list[tuple[float, float]] = []

    def look() -> None:
        far = {p: float((p.detach() - old).norm()) ** 2 for p, old in before.items()}
        found.append((sum(v for p, v in far.items() if p not in frozen) ** 0.5, sum(far[p] for p in frozen) ** 0.5))

    in_second_pass(method, look)
    method.step(run)
    assert all(p.grad is None and torch.equal(p, before[p]) for p in frozen)
    return found[0]


@pytest.mark.parametrize(
    "chain", ["sam+crt+lsq", "crt+sam+lsq", "sagm+crt+lsq", "fqat+crt+lsq", "gaqat+crt+adq", "sam+crt+pact"]
)
def test_frozen_by_crt_is_not_perturbed(chain: str) -> None:
    """The frozen backbone would take most of rho, and the classifier's flatness would be sought beside another network."""
    outer = next(name for name in chain.split("+") if name in ("sam", "sagm", "fqat", "gaqat"))
    own = {"rho": 0.02} | ({} if outer == "sam" else {"alpha": 0.0})
    method, data = ready(chain, epochs=2, params={"crt": {"share": 0.5}, outer: own}, clip=1.0)
    loop, batches = Loop(method, data), list(data.train_dataloader())[:2]
    loop.epoch(batches)
    loop.epoch([], 1)
    loop.run.batch = batches[0]
    head = set(method.net.head.parameters())
    perturbed, still = sizes(method, loop.run, set(method.net.parameters()) - head)
    assert still == 0.0
    assert perturbed == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("outer", ["sam", "sagm", "fqat"])
def test_frozen_by_asq_is_not_perturbed(outer: str) -> None:
    """In ASQ's warm-up its modules would be moved before each gradient, and the norm be theirs, too."""
    params = {"asq": {"warmup": 0.25}, outer: {"rho": 0.01} | ({} if outer == "sam" else {"alpha": 0.0})}
    method, data = ready(f"{outer}+asq", params=params)
    loop = Loop(method, data)
    loop.epoch([])
    loop.run.batch = next(iter(data.train_dataloader()))
    perturbed, still = sizes(method, loop.run, {p for module in adapters(method.net) for p in module.parameters()})
    assert still == 0.0
    assert perturbed == pytest.approx(0.01, rel=1e-3)
    method.scope.step = method.scope.steps // 2
    loop.run.backward()
    assert any(p.grad is not None for module in adapters(method.net) for p in module.parameters())


def test_emaq_weighs_clients_by_what_is_trained() -> None:
    """In cRT's second stage a client would weigh by layers that stand still."""
    method, data = ready("crt+emaq", epochs=2, params={"crt": {"share": 0.5}, "emaq": {"scope": "layer"}})
    loop, batches = Loop(method, data), list(data.train_dataloader())[:1]
    loop.epoch(batches)
    beta = method.inner.beta
    assert (beta != 1.0).any(0).sum() > 1
    loop.epoch(batches, 1)
    assert (beta[:, :-1] == 1.0).all()
    assert (beta[:, -1] != 1.0).all()


def test_lsq_is_what_it_wraps_by_itself() -> None:
    """`sam` and `sam+lsq` would be two rows of a table."""
    assert normal_name("sam+lsq") == "sam"
