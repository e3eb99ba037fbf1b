from __future__ import annotations

import logging
import math
import re
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import begin, in_second_pass
from pydantic import ValidationError
from qatbench.bench.errors import RunFailed
from qatbench.bench.freezing import Freezing, FreezingParams, capped, frozen_by, highest, how_many, share_frozen
from qatbench.bench.quant import QuantLayer, Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import Loop, MethodContract, ready, same, state
from qatbench.methods.fqat import SAMPLE, near_boundary
from qatbench.methods.gaqat import GAQAT
from qatbench.methods.lsq import LearnedStep
from qatbench.methods.sam import trained
from torch import Tensor, nn

SMALL = settings(deadline=None, derandomize=True, database=None, max_examples=25)
UNITS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(torch.tensor)


class TestFQAT(MethodContract):
    method = "fqat"


def single(units: int, **params: Any) -> Freezing:
    """Units of one watched element each."""
    every = torch.arange(units)
    return Freezing(every, every, units, FreezingParams(**params), seed=3)


def fqat(*chosen: int, name: str = "fqat", **settings: Any) -> tuple[Any, Any]:
    """A method at its first step, in which these units are frozen."""
    method, run = begin(name, **settings)
    method.freezing.frozen[list(chosen)] = True
    return method, run


def parameters_of(method: Any, units: list[int]) -> set[nn.Parameter]:
    return {p for u in units for p in method.parts[u].held}


# --- 1: what is frozen stands still --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.01), ("adam", 0.001), ("adamw", 0.001)])
def test_fqat_1_frozen_layers_do_not_move(optimizer: str, lr: float) -> None:
    """Weight decay, momentum or a moment of Adam would go on moving a layer that is said to be frozen."""
    method, run = fqat(2, 5, optimizer=optimizer, lr=lr, weight_decay=0.3, params={"fqat": {}})
    method.freezing.frozen.zero_()
    method.step(run)  # the optimizer has a state now
    method.freezing.frozen[[2, 5]] = True
    still = parameters_of(method, [2, 5])
    assert len(still) == 10  # weight, two steps, BatchNorm's scale and shift
    before = {p: p.detach().clone() for p in method.net.parameters()}
    kept = {p: {k: v.clone() for k, v in run.opt.state[p].items() if v is not None} for p in before}
    assert all(kept.values())
    method.step(run)
    for name, p in method.net.named_parameters():
        if p in still:
            assert p.grad is None
            assert torch.equal(p, before[p]), name
            assert all(torch.equal(run.opt.state[p][k], v) for k, v in kept[p].items()), name
        else:
            assert p.grad is not None
            assert p.grad.any(), name
            assert not torch.equal(p, before[p]), name


@pytest.mark.parametrize("params", [{"rule": "none"}, {"window": 100}, {"target": "scale_task_grad"}])
def test_fqat_1_nothing_frozen_is_sagm(params: dict[str, Any]) -> None:
    """The ablation "no freezing" would be another method than the baseline of this name."""
    states = []
    for name, own in (("sagm", {"sagm": {}}), ("fqat", {"fqat": params})):
        method, data = ready(name, params=own)
        Loop(method, data).epoch(list(data.train_dataloader())[:4])
        states.append(state_of_net(method))
    assert same(*states) == []


def state_of_net(method: Any) -> dict[str, Tensor]:
    return {name: value for name, value in state(method).items() if name.startswith("net.")}


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_fqat_1_all_frozen_moves_nothing(freeze_bn: bool) -> None:
    """A parameter of a layer would be left out of freezing; or frozen statistics would move."""
    method, run = fqat(params={"fqat": {"freeze_bn": freeze_bn}}, weight_decay=0.3)
    method.freezing.frozen.fill_(True)
    before = state_of_net(method)
    method.step(run)
    moved = same(before, state_of_net(method))
    assert all("running" in name or "batches" in name for name in moved)
    assert bool(moved) == (not freeze_bn)


@pytest.mark.parametrize("target", ["scale", "scale_task_grad", "flat_only"])
def test_fqat_1_freeze_bn_goes_with_the_whole_layer(target: str) -> None:
    """Statistics would stand still while the weights that they are of go on training."""
    method, run = fqat(params={"fqat": {"freeze_bn": True, "target": target}})
    method.freezing.frozen.fill_(True)
    before = state_of_net(method)
    method.step(run)
    moved = same(before, state_of_net(method))
    assert {name for name in before if "running" in name} <= set(moved)


def test_fqat_1_a_frozen_layer_is_watched_all_the_same() -> None:
    """A frozen layer would keep the disorder that it was frozen for."""
    method, run = fqat(params={"fqat": {}})
    method.freezing.frozen.fill_(True)
    for _ in range(2):
        method.step(run)
        assert method.freezing.signs.any()
        method.scope.step += 1
    assert (method.freezing.disorder != 0.5).all()


# --- 2: one gradient of two ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fqat", "gaqat"])
def test_fqat_2_a_frozen_scale_moves_by_g2_alone(name: str) -> None:
    """The task gradient would still move the scales that it is said to be frozen for."""
    moved = []
    for replaced in (False, True):
        params = {
            name: {"target": "scale_task_grad", "on": "scales", "perturb": "weights"}
        }  # e does not see scales' g1
        method, run = fqat(1, 4, name=name, params=params)
        still = parameters_of(method, [1, 4])
        assert len(still) == 2
        backward = run.backward

        def other(
            *args: Any, backward: Any = backward, still: Any = still, replaced: bool = replaced, **kwargs: Any
        ) -> Any:
            losses = backward(*args, **kwargs)
            for p in still if replaced and not kwargs.get("add") else ():
                p.grad = torch.full_like(p, 7.0)
            return losses

        run.backward = other
        before = {p: p.detach().clone() for p in still}
        method.step(run)
        assert all(p.grad is not None and p.grad.any() for p in still)
        moved.append([p.detach() - before[p] for p in before])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


@pytest.mark.parametrize("target", ["layer", "scale", "scale_task_grad", "scale_flat_grad", "flat_only"])
def test_fqat_2_what_a_target_leaves_of_the_gradients(target: str) -> None:
    """Two settings would do the same, or a setting not what its name says."""
    method, run = fqat(3, params={"fqat": {"target": target}})
    run.backward(track=False)
    first = {p: g.clone() for p, g in trained(run)}
    with method.perturbed(run):
        run.backward(track=False)
    second = {p: g.clone() for p, g in trained(run)}
    method.step(run)
    layer = method.parts[3].layer
    scales = {layer.weight_quantizer.step, layer.act_quantizer.step}
    held = parameters_of(method, [3])
    assert held == scales if target.startswith("scale") else held > scales | {layer.weight}
    left = {"scale_task_grad": second, "scale_flat_grad": first, "flat_only": first}.get(target)
    for p in first:
        if p not in held:
            assert torch.equal(p.grad, (first[p] + second[p]) * 0.5)
        elif left is None:
            assert p.grad is None
        else:
            assert torch.equal(p.grad, left[p])


def test_alternate_takes_the_gradients_in_turn() -> None:
    """The baseline would be SAGM, or SAM."""
    method, run = begin("fqat", params={"fqat": {"rule": "alternate", "window": 2, "on": "weights"}})
    for step, perturbed in enumerate([False, False, True, True, False]):
        method.scope.step = step
        run.backward(track=False)
        expected = {p: g.clone() for p, g in trained(run)}
        if perturbed:
            with method.perturbed(run):
                run.backward(track=False)
            expected = {p: g.clone() for p, g in trained(run)}
        passes: list[int] = []
        in_second_pass(method, lambda passes=passes: passes.append(1))
        method.step(run)
        assert len(passes) == int(perturbed)
        assert all(torch.equal(p.grad, g) for p, g in expected.items())
    assert not method.freezing.frozen.any()


# --- 3: disorder -----------------------------------------------------------------------------------------------------------


def watch(now: Freezing, gradients: Tensor) -> Tensor:
    """The disorder after these gradients (float [steps, M])."""
    for step, u in enumerate(gradients):
        now.observe(step, u, u)
    return now.disorder


@pytest.mark.parametrize("refresh", ["step", "window"])
def test_fqat_3_disorder_of_known_sequences(refresh: str) -> None:
    """Thresholds would mean something else than a share of steps."""
    K = 100  # noqa: N806
    steps = torch.arange(K)
    alternating, constant, zero = 1.0 - 2.0 * (steps % 2), torch.full((K,), -3.0), torch.zeros(K)
    every_other = torch.where(steps % 2 == 0, 0.0, alternating)  # to 0 and from 0 is no flip
    sequences = torch.stack([alternating, constant, zero, every_other], 1)
    disorder = watch(single(4, refresh=refresh, window=K), sequences)
    assert disorder.tolist() == [1.0, 0.0, 0.0, 0.0]
    half = torch.stack([1.0 - 2.0 * (steps // 2 % 2)], 1)
    assert watch(single(1, refresh=refresh, window=K), half).item() == pytest.approx(49 / 99)


@pytest.mark.parametrize("K", [50, 100, 200])
def test_fqat_3_disorder_of_coin_flips(K: int) -> None:  # noqa: N803
    """The choice of a threshold would go by another spread than that of chance."""
    n = 2000
    gradients = torch.randn(K, n, generator=torch.Generator().manual_seed(K))
    disorder, sd = watch(single(n, refresh="window", window=K), gradients), 0.5 / math.sqrt(K - 1)
    assert abs(disorder.mean().item() - 0.5) < 4 * sd / math.sqrt(n)
    assert abs(disorder.std().item() - sd) < 4 * sd / math.sqrt(2 * n)


@pytest.mark.parametrize("steps", [4, 20, 21, 30, 47, 59, 200])
@pytest.mark.parametrize("refresh", ["step", "window"])
def test_fqat_3_z_of_coin_flips_has_deviation_1(refresh: str, steps: int) -> None:
    """The log would call chance a sign: of a window of two steps, or of an average that is steadier than a window."""
    K, n = 20, 4000  # noqa: N806
    now = single(n, refresh=refresh, window=K)
    watch(now, torch.randn(steps, n, generator=torch.Generator().manual_seed(steps)))
    z = now.deviation(steps - 1)
    assert (z is None) == (refresh == "window" and steps < K)
    if z is not None:
        assert z.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
        assert z.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * n))
    if refresh == "step" and steps == 200:
        torch.testing.assert_close(z, (now.disorder - 0.5) * 2 * math.sqrt(2 * K - 1), rtol=1e-3, atol=1e-3)


def test_fqat_3_there_is_no_z_of_weights() -> None:
    """A share of weights near a boundary would be held against coin flips."""
    now = single(3, signal="boundary")
    watch(now, torch.ones(9, 3))
    assert now.deviation(8) is None


@pytest.mark.parametrize("refresh", ["step", "window"])
@pytest.mark.parametrize("rule", ["top", "low", "random", "all"])
def test_fqat_3_without_gradients_nothing_is_chosen(rule: Any, refresh: Any) -> None:
    """Where scales have no gradient yet, as in qt-dog's float phase, the first layers would be frozen for nothing."""
    now = single(8, rule=rule, refresh=refresh, window=5, fraction=0.25, low=0.7, cap=1.0)
    gradients = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    gradients[:40] = 0
    gradients[:, 1] = 0
    found = []
    for step, u in enumerate(gradients):
        now.observe(step, u, u)
        now.refresh(step, 80)
        found.append(now.frozen.clone())
    frozen = torch.stack(found)
    assert not frozen[:41].any()  # one sign alone has not changed
    assert frozen[45:].any(1).float().mean() > 0.5
    assert not frozen[:, 1].any()


def test_fqat_over_qt_dog_waits_for_gradients() -> None:
    """All through qt-dog's float phase the first layers would stand still."""
    settings = {"fqat": {"window": 2, "warmup": 0.0}, "qt-dog": {"start": 0.5}}
    method, data = ready("fqat+qt-dog+lsq", bits="w4a32", params=settings)
    loop, frozen = Loop(method, data), []
    loop.epoch([])
    steps = method.scope.steps
    for step, batch in zip(range(steps), cycle(list(data.train_dataloader())), strict=False):
        loop.run.batch, method.scope.step = batch, step
        method.step(loop.run)
        frozen.append(int(method.freezing.frozen.sum()))
    assert set(frozen[: steps // 2]) == {0}
    assert frozen[-1] > 0


@SMALL
@given(st.integers(0, 1000), st.sampled_from(["step", "window"]), st.sampled_from(["mean", "task", "flat"]))
def test_fqat_3_disorder_is_a_share_and_knows_no_scale(seed: int, refresh: str, signal: str) -> None:
    """A layer would count as unstable because its gradients are large."""
    generator = torch.Generator().manual_seed(seed)
    source, unit = torch.tensor([0, 0, 0, 1, 2, 2, 3]), torch.tensor([0, 0, 1, 1])  # sources of 3, 1, 2 and 1 elements
    gradients = torch.randint(-1, 2, (2, 23, 7), generator=generator).float()
    factors = 2.0 ** torch.randint(-20, 20, (23, 1), generator=generator)
    params = FreezingParams(refresh=refresh, window=10, signal=signal)  # type: ignore[arg-type]
    found = []
    for factor in (torch.ones(23, 1), factors):
        now = Freezing(source, unit, 2, params, 0)
        for step in range(23):
            task, flat = gradients[:, step] * factor[step]
            now.observe(step, task, (task + flat) / 2)
            assert bool(((now.disorder >= 0) & (now.disorder <= 1)).all())
            assert bool(((now.stall() >= 0) & (now.stall() <= 1 + 1e-6)).all())
        found.append((now.disorder, now.crossed))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_fqat_3_a_unit_is_the_mean_of_its_scales() -> None:
    """A scale of many channels would outvote a layer's other one."""
    source, unit = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0])
    now = Freezing(source, unit, 1, FreezingParams(window=3, refresh="window"), 0)
    flips = torch.tensor([[1.0, 1, 1, 1], [-1, 1, 1, -1], [1, 1, 1, -1]])  # 2 of 6, and 1 of 2
    assert watch(now, flips).item() == pytest.approx((2 / 6 + 1 / 2) / 2)


def test_the_diagnostics_are_what_they_are_called() -> None:
    """The log would speak of conflict where there is none."""
    now = single(3, window=4, refresh="window")
    for step in range(4):
        noise = 1.0 - 2 * (step % 2)
        task, flat = torch.tensor([1.0, noise, 2.0]), torch.tensor([-1.0, noise, 1.0])
        now.observe(step, task, (task + flat) / 2)
    assert now.crossed.tolist() == [1.0, 0.0, 0.0]
    assert now.stall().tolist() == pytest.approx([0.0, 0.0, 1.0])


# --- 4, 5 and 7: the step ------------------------------------------------------------------------------------------------


def test_fqat_4_theta_comes_back_with_layers_frozen() -> None:
    """Frozen layers would drift by what they are perturbed by."""
    method, run = fqat(0, 1, 2, params={"fqat": {"rho": 10.0, "target": "flat_only"}})
    for group in run.opt.param_groups:
        group["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in method.net.named_parameters()}
    seen: list[int] = []
    in_second_pass(
        method, lambda: seen.append(sum(not torch.equal(p, before[n]) for n, p in method.net.named_parameters()))
    )
    method.step(run)
    assert seen[0] > 20
    assert [n for n, p in method.net.named_parameters() if not torch.equal(p, before[n])] == []


@pytest.mark.parametrize("name", ["fqat", "gaqat"])
def test_fqat_5_running_statistics_move_once_a_step(name: str) -> None:
    """BatchNorm would average in what the perturbed network computes."""
    method, run = fqat(0, 1, name=name, params={name: {}})
    alone, single_pass = begin("lsq")
    single_pass.backward()
    method.step(run)
    theirs = dict(alone.net.named_buffers())
    assert theirs
    assert [n for n, b in method.net.named_buffers() if not torch.equal(b, theirs[n])] == []


def test_fqat_7_steps_stay_positive_and_are_not_decayed() -> None:
    """A grid would turn around, or be pulled to zero."""
    method, data = ready("gaqat", weight_decay=0.5, params={"gaqat": {"rho": 100.0, "window": 2}})
    steps = {p for n, p in method.net.named_parameters() if n.endswith("quantizer.step")}
    assert steps
    smallest: list[float] = []
    in_second_pass(method, lambda: smallest.append(min(p.item() for p in steps)))
    loop = Loop(method, data)
    loop.epoch(list(data.train_dataloader()))
    assert min(smallest) > 0
    assert min(p.item() for p in steps) > 0
    for group in loop.run.opt.param_groups:
        assert group["weight_decay"] == (0.0 if steps & set(group["params"]) else 0.5)


# --- 6: rules ------------------------------------------------------------------------------------------------------------


def by(rule: str, disorder: Tensor, threshold: float = 0.5, count: int = 0) -> Tensor:
    return frozen_by(rule, disorder, threshold, count, torch.zeros_like(disorder))[0]


@SMALL
@given(UNITS, st.floats(0, 1, width=32))
def test_fqat_6_high_and_low_are_complementary(disorder: Tensor, threshold: float) -> None:
    """A layer would be both calm and restless, or neither."""
    high, low = by("high", disorder, threshold), by("low", disorder, threshold)
    assert torch.equal(high | low, disorder != threshold)
    assert not (high & low).any()


@SMALL
@given(UNITS, st.floats(0, 1))
def test_fqat_6_top_is_a_fixed_share_of_the_highest(disorder: Tensor, share: float) -> None:
    """The share of frozen layers would depend on how disorder is scaled; or a calmer layer be frozen before a wilder one."""
    count = how_many(share, len(disorder))
    mask = by("top", disorder, count=count)
    assert mask.sum() == count
    if 0 < count < len(disorder):
        assert disorder[mask].min() >= disorder[~mask].max()
    ranks = disorder.unique(return_inverse=True)[1].float()  # an increasing map that keeps equals equal
    assert torch.equal(mask, by("top", ranks.exp(), count=count))


def test_fqat_6_counts_are_floors() -> None:
    """0.29 of 100 layers would be 28, since floating point says 28.999999999999996."""
    assert [how_many(s, n) for s, n in ((0.29, 100), (0.2, 10), (0.2, 9), (0.5, 21), (0.0, 5), (1.0, 7))] == [
        29,
        2,
        1,
        10,
        0,
        7,
    ]


def test_fqat_6_the_share_falls_along_a_cosine() -> None:
    """Freezing would grow towards the end, or be constant where the group's own schedule is not."""
    cosine = [share_frozen("cosine", k / 50, 0.5, 0.2) for k in range(51)]
    assert cosine[0] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0.2)
    assert cosine[25] == pytest.approx(0.35)
    assert all(a >= b for a, b in pairwise(cosine))
    assert share_frozen("constant", 0.1, 0.5, 0.2) == 0.2
    assert [FreezingParams(target=t).kind() for t in ("layer", "scale", "flat_only")] == [
        "constant",
        "cosine",
        "cosine",
    ]  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="fraction_start"):
        FreezingParams(schedule="cosine", fraction=0.5, fraction_start=0.2)


@SMALL
@given(UNITS, st.integers(0, 20))
def test_fqat_6_the_cap_keeps_the_most_wanted(score: Tensor, most: int) -> None:
    """More than half of a network would stand still; or the cap would free those that the rule wants most."""
    mask = score > 0.3
    kept = capped(mask, score, most)
    assert kept.sum() == min(int(mask.sum()), most)
    assert not (kept & ~mask).any()
    if kept.any() and (mask & ~kept).any():
        assert score[kept].min() >= score[mask & ~kept].max()


@pytest.mark.parametrize("rule", ["all", "high", "low", "top", "random"])
@pytest.mark.parametrize("unfreeze", ["reeval", "duty", "never"])
def test_fqat_6_a_rule_that_would_freeze_everything_hits_the_cap(rule: Any, unfreeze: Any) -> None:
    """A run would stand still to its end, and look like one that has converged."""
    now = single(9, rule=rule, unfreeze=unfreeze, window=2, fraction=1.0, fraction_start=1.0, high=0.0, low=1.0)
    most = 0
    for step in range(60):
        now.observe(step, *[torch.where(torch.arange(9) % 2 == step % 2, 1.0, -1.0) * (step % 3 > 0)] * 2)
        now.refresh(step, 60)
        assert now.frozen.sum() <= 4  # of 9
        most = max(most, int(now.frozen.sum()))
        assert step >= 3 or not most  # 2K steps of warm-up
    assert most == 4


def trace(now: Freezing, steps: int, seed: int = 0) -> Tensor:
    """What is frozen in each step under random gradients, bool [steps, U]."""
    gradients = torch.randn(steps, now.units, generator=torch.Generator().manual_seed(seed))
    found = []
    for step, u in enumerate(gradients):
        found.append(now.frozen.clone())
        now.observe(step, u, u)
        now.refresh(step, steps)
    return torch.stack(found)


def test_fqat_6_one_seed_freezes_the_same_layers_again() -> None:
    """A run could not be reproduced; or every seed would freeze the same layers."""
    one, again = (trace(single(10, rule="random", window=5), 100) for _ in range(2))
    assert torch.equal(one, again)
    assert one[10:].sum(1).eq(2).all()
    every = torch.arange(10)
    other = Freezing(every, every, 10, FreezingParams(rule="random", window=5), seed=4)
    assert not torch.equal(one, trace(other, 100))
    assert len({tuple(row.tolist()) for row in one[10:]}) > 5
    changes = (one[1:] != one[:-1]).any(1).nonzero().flatten() + 1
    assert all(step % 5 == 0 for step in changes.tolist())


def test_fqat_6_what_was_frozen_for_long_is_released() -> None:
    """One wild layer would never be trained again."""
    now = single(4, rule="top", fraction=0.25, window=3, release=2)
    wild = torch.tensor([1.0, 0, 0, 0])
    found = []
    for step in range(60):
        found.append(now.frozen.clone())
        u = torch.where(wild > 0, 1.0 - 2 * (step % 2), 1.0)
        now.observe(step, u, u)
        now.refresh(step, 60)
    first = torch.stack(found)[:, 0].tolist()
    assert first[:6] == [False] * 6
    assert first[6:24] == ([True] * 6 + [False] * 3) * 2
    assert torch.stack(found)[6:].sum(1).eq(1).all()  # the next one takes its place


@pytest.mark.parametrize(("window", "warmup", "start"), [(5, 0.03, 10), (5, 0.5, 50), (2, 0.041, 5)])
def test_fqat_6_the_warm_up(window: int, warmup: float, start: int) -> None:
    """Layers would be frozen by a disorder of two or three steps."""
    found = trace(single(8, rule="all", window=window, warmup=warmup), 100).any(1)
    assert found.tolist() == [step >= start for step in range(100)]


# --- 8: two optima -------------------------------------------------------------------------------------------------------


def toy(noise: float = 0.3, steps: int = 6000, seeds: int = 30, **params: Any) -> dict[str, Tensor]:
    """One scale with a task optimum at 0 and a flat one at 2, by GAQAT's defaults; every seed is a unit, all are run at once."""
    every, gaqat = torch.arange(seeds), GAQAT.Params(**params)
    now = Freezing(every, every, seeds, gaqat, seed=3)
    joint = Freezing(every, every, seeds, gaqat.model_copy(update={"signal": "mean"}), seed=3)
    noises = noise * torch.randn(steps, seeds, generator=torch.Generator().manual_seed(1))
    s, path, frozen, task_disorder, joint_disorder = torch.ones(seeds), [], [], [], []
    for step, n in enumerate(noises):
        g1, g2 = s + n, s - 2 + n
        mean = (g1 + g2) / 2
        now.observe(step, g1, mean)
        joint.observe(step, g1, mean)
        s = s - 5e-3 * torch.where(now.frozen, g2, mean)
        path.append(s)
        frozen.append(now.frozen.clone())
        if step % 100 == 99:
            task_disorder.append(now.disorder.clone())
            joint_disorder.append(joint.disorder.clone())
        now.refresh(step, steps)
    names = ("s", "frozen", "task", "joint")
    found = dict(zip(names, map(torch.stack, (path, frozen, task_disorder, joint_disorder)), strict=True))
    return {**found, "stall": now.stall()}


def test_fqat_8_without_freezing_the_scale_is_stuck_between_the_optima() -> None:
    """Disorder would not show the conflict that GAQAT is built on."""
    found = toy(rule="none")
    assert (found["s"][-1000:].mean(0) - 1).abs().max() < 0.05
    assert (found["s"][-1] - 1).abs().max() < 0.1
    assert found["task"][2:].mean() < 0.05
    assert 0.45 < found["joint"][2:].mean() < 0.55
    assert found["stall"].mean() < 0.05
    assert not found["frozen"].any()


def test_fqat_8_freezing_the_task_gradient_lets_it_go_to_the_flat_optimum() -> None:
    """``low`` would not do what it is for; or would unlock itself, which the reading of the paper says it does not."""
    found = toy(rule="low")
    assert (found["s"][-1000:].mean(0) - 2).abs().max() < 0.05
    assert found["frozen"].float().mean() > 0.95
    assert found["stall"].min() > 0.5


def test_fqat_8_duty_shares_the_time() -> None:
    """A scale would stay locked at the flat optimum under the setting that is there to prevent it."""
    found = toy(rule="low", unfreeze="duty")
    share = found["frozen"].float().mean()
    assert 0.4 < share <= 0.51
    assert found["s"][-4000:].mean().item() == pytest.approx(1.5, abs=0.1)


def test_fqat_8_noise_hides_the_conflict() -> None:
    """``low`` would freeze scales that are only noisy."""
    found = toy(rule="low", noise=3.0)
    assert found["frozen"].float().mean() < 0.05


def test_fqat_6_the_share_counts_what_is_kept() -> None:
    """In an ablation of ``unfreeze`` its variants would freeze more layers than the rule that they are held against."""
    for rule in ("top", "random"):
        for unfreeze in ("reeval", "duty", "never"):
            for refresh in ("step", "window"):
                for release in (0, 2):
                    own = {"rule": rule, "unfreeze": unfreeze, "refresh": refresh, "release": release}
                    counts = trace(single(12, window=8, fraction=0.25, cap=1.0, **own), 300).sum(1)
                    assert counts.max() == 3, own


# --- 9: how long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["step", "window"])
@pytest.mark.parametrize("rule", ["low", "high", "top", "random"])
def test_fqat_9_never_only_adds(rule: Any, refresh: Any) -> None:
    """A variant of the paper's ablation would be another one."""
    found = trace(single(12, rule=rule, refresh=refresh, unfreeze="never", window=8, low=0.5, high=0.5), 300)
    assert not (found[:-1] & ~found[1:]).any()
    assert 1 <= found[-1].sum() <= 6
    assert (found.sum(1) > 0).any()


@pytest.mark.parametrize("refresh", ["step", "window"])
def test_fqat_9_duty_never_freezes_two_windows_in_a_row(refresh: Any) -> None:
    """A frozen window would not be followed by a free one."""
    K = 8  # noqa: N806
    found = trace(single(12, rule="low", refresh=refresh, unfreeze="duty", window=K, low=0.7), 400)
    assert found.any()
    for unit in found.T.tolist():
        runs, length = [], 0
        for before, now in zip([False, *unit], [*unit, False], strict=True):
            if before != now:
                runs.append((before, length))
                length = 0
            length += 1
        frozen = [n for kind, n in runs if kind]
        between = [n for kind, n in runs[1:-1] if not kind]
        assert all(n == K for n in frozen[:-1])
        assert all(n >= K for n in between)


# --- composition, and what cannot be done --------------------------------------------------------------------------------


def test_without_scales_the_weights_are_watched() -> None:
    """fqat+dorefa would never see a gradient; or be slowed down by watching all weights."""
    method, run = fqat(1, name="fqat+dorefa", params={"fqat": {}})
    assert [p.ndim > 1 for p, _ in method.watched] == [True] * len(method.parts)
    assert all(min(p.numel(), SAMPLE) == len(places[0]) for p, places in method.watched)
    method.step(run)
    weight = method.parts[0].layer.weight
    places = method.watched[0][1]
    assert torch.equal(method.freezing.signs[: weight.numel()], weight.grad[places].sign().to(torch.int8))
    assert method.parts[1].layer.weight.grad is None
    large = nn.Parameter(torch.zeros(40, 30, 3, 3))
    chosen = method._sample(large)
    assert [len(c) for c in chosen] == [SAMPLE] * 4
    assert len(set(zip(*[c.tolist() for c in chosen], strict=True))) == SAMPLE
    assert all(torch.equal(a, b) for a, b in zip(chosen, method._sample(large), strict=True))


@pytest.mark.parametrize(
    ("on", "target", "sources", "units"),
    [
        ("weight_scales", "layer", 10, 10),
        ("scales", "layer", 20, 10),
        ("weights", "layer", 10, 10),
        ("weight_scales", "scale", 10, 10),
        ("scales", "scale", 20, 20),
        ("scales", "scale_task_grad", 20, 20),
    ],
)
def test_what_is_watched_and_what_a_unit_is(on: str, target: str, sources: int, units: int) -> None:
    """A scale would be frozen for another one's disorder."""
    method, _ = ready("fqat", params={"fqat": {"on": on, "target": target}})
    assert (len(method.watched), len(method.parts)) == (sources, units)
    assert method.freezing.units == units
    held = [p for part in method.parts for p in part.held]
    assert len(held) == len(set(held))


def test_signal_boundary_looks_at_the_weights() -> None:
    """RFQuant's score would be another number; or freezing would follow gradients all the same."""
    layer = QuantLayer(nn.Linear(8, 1), LearnedStep(3, Site("layer", "layer", (1,), weights=8), Scope(), True, 1), None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.3, 0.37, 0.38, 0.5, 1.45, -0.6, -1.7]]) * 0.5)
        layer.weight_quantizer.step.fill_(0.5)
    assert near_boundary(layer).item() == pytest.approx(4 / 8 / 3)
    method, run = begin("fqat", params={"fqat": {"signal": "boundary"}})
    assert torch.equal(method.freezing.disorder, torch.stack([near_boundary(p.layer) for p in method.parts]).detach())
    method.step(run)
    assert torch.equal(method.freezing.disorder, torch.stack([near_boundary(p.layer) for p in method.parts]).detach())
    with pytest.raises(RunFailed, match="use signal=mean"):
        ready("fqat+dorefa", params={"fqat": {"signal": "boundary"}})


@pytest.mark.parametrize("rule", ["high", "low"])
def test_signal_boundary_has_no_threshold(rule: Any) -> None:
    """``high`` would never freeze anything, and ``low`` everything, since the score is 1 / bits at most."""
    with pytest.raises(ValidationError, match="use rule top"):
        FreezingParams(signal="boundary", rule=rule)


def test_a_window_longer_than_the_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A run of plain SAGM would stand in the table as FQAT, and nobody would know why they agree."""
    with caplog.at_level(logging.INFO, "qatbench"):
        method, data = ready("fqat", params={"fqat": {"window": 100}})
        Loop(method, data).epoch(list(data.train_dataloader())[:2])
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    steps = method.scope.steps
    fits = (steps - 1) // 2
    assert (
        f"waits for 200 steps (window=100, warmup=0.03) and the run has {steps}; fqat.window={fits} or less would do"
        in warnings[0]
    )
    caplog.clear()
    for window, told in ((fits, False), (fits + 1, True)):
        with caplog.at_level(logging.WARNING, "qatbench"):
            method, data = ready("fqat", params={"fqat": {"window": window}})
            Loop(method, data).epoch([])
        assert bool(caplog.records) == told
        caplog.clear()
    now = single(4, rule="all", window=fits)
    assert trace(now, steps).any()


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"window": 2}, None),
        ({"window": 2, "warmup": 1.0}, "freezing never starts: .*; lower fqat.warmup$"),
        ({"window": 99, "warmup": 1.0}, "fqat.window=.* or less would do; lower fqat.warmup besides$"),
        ({"window": 5, "warmup": 0.9, "refresh": "window"}, "waits for 30 steps .* has 28; lower fqat.warmup$"),
        ({"window": 5, "warmup": 0.8, "refresh": "window"}, None),
        ({"window": 2, "fraction": 0.09}, "0.09 of 10 units are less than one; fqat.fraction=0.1 would do"),
        ({"window": 2, "fraction": 0.0, "fraction_start": 0.5, "target": "scale"}, None),
        ({"window": 2, "cap": 0.0, "rule": "high"}, "0 of 10 units are less than one; fqat.cap=0.1 would do"),
        ({"window": 2, "fraction": 0.0, "rule": "high"}, None),
        ({"window": 2, "cap": 0.0, "rule": "none"}, None),
    ],
)
def test_settings_that_freeze_nothing_are_told(
    params: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of plain SAGM would stand in the table as FQAT; or advice that does not help would be given."""
    with caplog.at_level(logging.WARNING, "qatbench"):
        method, data = ready("fqat", params={"fqat": params})
        Loop(method, data).epoch([])
    assert method.scope.steps == 28
    assert len(caplog.records) == (told is not None)
    assert told is None or re.search(told, caplog.records[0].message), caplog.records[0].message


def test_a_window_that_ends_after_the_run_freezes_nothing() -> None:
    """The warning would come for runs that do freeze, or miss some that do not."""
    for window in range(2, 12):
        for warmup in (0.0, 0.5, 0.8, 0.9, 0.99):
            for refresh in ("step", "window"):
                now = single(4, rule="all", window=window, warmup=warmup, refresh=refresh, cap=1.0)
                first, frozen = now.params.first(24), trace(now, 24).any(1)
                assert frozen.any() == (first < 24), (window, warmup, refresh)
                assert not frozen.any() or int(frozen.float().argmax()) == first


def test_the_log_has_one_line_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    """A user could not see how much was frozen, or the log would be flooded."""
    method, data = ready("fqat")
    loop = Loop(method, data)
    with caplog.at_level(logging.INFO, "qatbench"):
        for epoch in range(2):
            loop.epoch(list(data.train_dataloader()), epoch)
    lines = [r.message for r in caplog.records]
    assert len(lines) == 2
    assert "disorder 0." in lines[1]
    assert "of 10" in lines[1]


def test_the_float_network_has_nothing_to_freeze() -> None:
    """A sweep would train SAGM and call it FQAT."""
    method, data = ready("fqat+fp32")
    assert "nothing to freeze" in str(method.skip(data.task))


def test_distillation_around_freezes_the_same_parts() -> None:
    """Inside a chain the norms of the layers would not be found, and stay trained."""
    inner = ready("kd+fqat+lsq")[0].inner
    alone = ready("fqat")[0]
    assert [len(p.held) for p in inner.parts] == [len(p.held) for p in alone.parts]
    assert all(p.norm is not None for p in inner.parts[:-1])


def test_a_network_without_batchnorm_trains() -> None:
    """Freezing statistics would fail where there are none."""
    method, data = ready("fqat", norm="group")
    loop = Loop(method, data)
    loop.epoch(list(data.train_dataloader())[:8])
    assert method.freezing.frozen.any()
    assert all(bool(v.isfinite().all()) for v in state(method).values())


def test_ties_go_to_the_first() -> None:
    """Ranks of a distributed run might order equals differently."""
    assert highest(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
