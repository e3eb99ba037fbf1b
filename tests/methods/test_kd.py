from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qatbench.bench.method import Out
from qatbench.bench.testing import Loop, MethodContract, all_train, float_net, logits, ready, same, state, train
from qatbench.methods.kd import distillation_loss
from torch.nn import functional as F


class TestKD(MethodContract):
    method = "kd+lsq"


def two_logits() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_equals_the_papers_formula(temperature: float) -> None:
    """Students would learn from something else than T^2 KL(teacher || student), e.g. from the divergence the other way round."""
    student, teacher = two_logits()

    def soften(v: torch.Tensor) -> np.ndarray:
        e = np.exp(v.double().numpy() / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = soften(teacher), soften(student)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_no_loss_and_no_gradient_if_teacher_and_student_agree(temperature: float) -> None:
    """A perfect student would be pushed away."""
    student, _ = two_logits()
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, student + 3.0, temperature)  # a constant does not change the probabilities
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert leaf.grad.abs().max() < 1e-5


def test_the_gradients_size_does_not_depend_on_the_temperature() -> None:
    """The share of the distillation loss would change with the temperature (sec. 2.1: hence the factor T^2)."""
    student, teacher = two_logits()
    sizes = []
    for temperature in (50.0, 100.0):
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf, teacher, temperature).backward()
        sizes.append(leaf.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    difference = student - teacher
    limit = (difference - difference.mean(1, keepdim=True)) / student.shape[1] / student.shape[0]
    assert sizes[1] == pytest.approx(limit.norm().item(), rel=0.02)


def test_without_weight_it_is_the_inner_method(tmp_path: Path) -> None:
    """The wrapper would change training by being there: by another order of random numbers, or a moved statistic."""
    alone, data = ready("lsq", epochs=1)
    train(alone, data, tmp_path / "alone")
    wrapped, data = ready("kd+lsq", epochs=1, params={"kd": {"weight": 0.0}})
    train(wrapped, data, tmp_path / "wrapped")
    assert same(state(alone), state(wrapped)) == []
    assert wrapped.losses_seen["task"] == alone.losses_seen["task"]
    assert wrapped.losses_seen["kd"] == 0


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_weight_shares_out_the_losses(weight: float) -> None:
    """The two losses would not add up to what the setting says."""
    method, data = ready("kd+lsq", params={"kd": {"weight": weight, "temperature": 2.0}})
    batch = next(iter(data.train_dataloader()))
    student, teacher = torch.randn(len(batch), 4), torch.randn(len(batch), 4)
    losses = method.losses(Out(student, {}, {"float": Out(teacher, {})}), batch)
    assert set(losses) == {"task", "kd"}
    assert losses["task"].item() == pytest.approx((1 - weight) * F.cross_entropy(student, batch.y).item())
    assert losses["kd"].item() == pytest.approx(weight * distillation_loss(student, teacher, 2.0).item())


def test_each_head_is_distilled_on_its_own() -> None:
    """Classes and superclasses would compete in one softmax, and neither head would learn its teacher's probabilities."""
    method, data = ready("kd+lsq", params={"kd": {"weight": 0.25, "temperature": 2.0}})
    method.task = replace(method.task, superclasses=("a", "b"), superclass=(0, 0, 1, 1))
    for member in method.members:
        member.task = method.task
    batch = next(iter(data.train_dataloader()))
    student, teacher = torch.randn(len(batch), 6), torch.randn(len(batch), 6)
    losses = method.losses(Out(student, {}, {"float": Out(teacher, {})}), batch)
    assert set(losses) == {"task", "coarse", "kd"}
    fine = distillation_loss(student[:, :4], teacher[:, :4], 2.0)
    coarse = distillation_loss(student[:, 4:], teacher[:, 4:], 2.0)
    assert losses["kd"].item() == pytest.approx(0.25 * (fine + coarse).item())
    assert losses["coarse"].item() == pytest.approx(0.75 * F.cross_entropy(student[:, 4:], batch.y // 2).item())


def test_the_teacher_is_the_float_network_and_stays_it() -> None:
    """The student would learn from itself; or the teacher would be trained, saved, or lose its statistics."""
    method, data = ready("kd+lsq")
    batch = all_train(data)
    teacher = method._float_teacher[0]
    assert not any("teacher" in name for name in method.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in method.parameters()}
    before = teacher(batch.x)
    torch.testing.assert_close(before, logits(method, float_net(), batch))
    Loop(method, data).epoch(list(data.train_dataloader()))
    assert torch.equal(before, teacher(batch.x))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
