from __future__ import annotations

import pytest
import torch
from passes import begin
from qatbench.bench.testing import Loop, MethodContract, ready, same, state
from qatbench.methods.sagm import SAGM
from qatbench.methods.sam import trained


class TestSAGM(MethodContract):
    method = "sagm"


def test_sagm_1_rho_and_alpha_zero_is_the_inner_method() -> None:
    """The mean of two equal gradients would not be that gradient; or a statistic would move twice."""
    states = []
    for name, params in (("lsq", {}), ("sagm", {"sagm": {"rho": 0.0, "alpha": 0.0}})):
        method, data = ready(name, params=params)
        Loop(method, data).epoch(list(data.train_dataloader())[:3])
        states.append(state(method))
    assert same(*states) == []


def test_sagm_2_the_direction_is_the_mean_of_both_gradients() -> None:
    """The method would be SAM, or its step twice as long."""
    method, run = begin("sagm", params={"sagm": {"rho": 0.05}})
    run.backward(track=False)
    first = {p: g.clone() for p, g in trained(run)}
    with method.perturbed(run):
        run.backward(track=False)
    second = {p: g.clone() for p, g in trained(run)}
    method.step(run)
    assert sum(not torch.allclose(first[p], second[p], rtol=1e-3) for p in first) > 20
    for p, g in trained(run):
        assert torch.equal(g, (first[p] + second[p]) * 0.5)


@pytest.mark.parametrize(("rho", "alpha"), [(0.05, 0.0), (0.05, 0.001), (0.0, 0.001)])
def test_sagm_3_alpha_pulls_the_perturbed_point_back(rho: float, alpha: float) -> None:
    """The term that matches the gradients, ``-alpha g``, would be missing or have the wrong sign."""
    method, run = begin("sagm", params={"sagm": {"rho": rho, "alpha": alpha, "perturb": "weights"}})
    run.backward()
    moving = {p: (p.detach().clone(), g.clone()) for p, g in trained(run) if p not in method.of_quantizers}
    norm = torch.cat([g.flatten() for _, g in moving.values()]).norm()
    with method.perturbed(run):
        for p, (theta, g) in moving.items():
            torch.testing.assert_close(p.detach(), theta + (rho / norm - alpha) * g)


def test_sagm_4_accumulation_gives_the_same_gradients() -> None:
    """The first pass's gradients would be added once for each part of a batch."""
    found = []
    for accumulate in (1, 3):
        method, run = begin("sagm", norm="group", accumulate=accumulate)
        method.step(run)
        found.append({n: p.grad for n, p in method.net.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-5)
    assert isinstance(method, SAGM)
