from __future__ import annotations

import logging
from typing import get_args

import pytest
import torch
from qatbench.bench.freezing import Rule
from qatbench.bench.testing import Loop, MethodContract, ready, same, state
from qatbench.methods.fqat import FQAT
from qatbench.methods.gaqat import GAQAT


class TestGAQAT(MethodContract):
    method = "gaqat"


def test_gaqat_1_is_fqat_with_other_defaults() -> None:
    """The two would differ in more than the table of switches says."""
    ours, theirs = GAQAT.Params().model_dump(), FQAT.Params().model_dump()
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {
        "signal": "task",
        "on": "scales",
        "rule": "low",
        "target": "scale_task_grad",
        "refresh": "window",
        "cap": 1.0,
        "release": 0,
    }
    states = []
    for name in ("gaqat", "fqat"):
        params = {**ours, "window": 2, "low": 0.9}
        method, data = ready(name, params={name: params})
        Loop(method, data).epoch(list(data.train_dataloader()))
        states.append(state(method))
    assert same(*states) == []


def test_gaqat_2_the_task_gradient_of_calm_scales_is_frozen_window_by_window() -> None:
    """Scales would be judged by another gradient, together, or at another time than once a window."""
    method, data = ready("gaqat", params={"gaqat": {"window": 3, "low": 0.6}})
    loop = Loop(method, data)
    batches = list(data.train_dataloader())
    loop.epoch([])
    g1: list[torch.Tensor] = []
    observe = method.freezing.observe
    method.freezing.observe = lambda step, task, mean: (g1.append(task.clone()), observe(step, task, mean))[0]
    before = method.freezing.frozen.clone()
    frozen_once = False
    for step, batch in enumerate(batches[:9]):
        loop.run.batch, method.scope.step = batch, step
        method.step(loop.run)
        if step % 3 == 2 and step >= 5:
            signs = torch.stack(g1[-3:]).sign()
            flips = (signs[1:] * signs[:-1] < 0).float().mean(0)
            torch.testing.assert_close(method.freezing.disorder, flips)
            assert torch.equal(method.freezing.frozen, flips < 0.6)  # however many
            frozen_once = frozen_once or bool(method.freezing.frozen.any())
        else:
            assert torch.equal(method.freezing.frozen, before)
        before = method.freezing.frozen.clone()
    assert frozen_once


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("unfreeze", ["reeval", "duty", "never"])
def test_gaqat_3_every_rule_trains(rule: str, unfreeze: str) -> None:
    """A setting that is offered would crash."""
    method, data = ready("gaqat", params={"gaqat": {"rule": rule, "unfreeze": unfreeze, "window": 2, "low": 0.9}})
    Loop(method, data).epoch(list(data.train_dataloader())[:7])
    assert bool(method.freezing.frozen.any()) <= (rule not in ("none", "alternate"))
    assert all(bool(v.isfinite().all()) for v in state(method).values())


def test_a_method_without_scales_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """gaqat+dorefa would be SAGM without a word."""
    with caplog.at_level(logging.WARNING, "qatbench"):
        method, data = ready("gaqat+dorefa", first_last="fp")
        Loop(method, data).epoch(list(data.train_dataloader())[:2])
    assert [r.message for r in caplog.records] == [
        "gaqat: there are no learned scales, so nothing is ever frozen: this is sagm"
    ]
