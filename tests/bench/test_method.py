from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import begin, in_second_pass
from qatbench.bench.assemble import assemble
from qatbench.bench.data import DataModule
from qatbench.bench.errors import RunFailed
from qatbench.bench.fit import LAST, read_checkpoint
from qatbench.bench.method import EMA_DECAY, Method, Run, Wrapper, _not_tracking, schedule
from qatbench.bench.quant import QuantLayer, quant_layers
from qatbench.bench.quant.layer import apply_layer
from qatbench.bench.testing import Loop, MethodContract, contract_data, float_net, ready, same, state, train
from qatbench.methods.fp32 import FP32
from qatbench.methods.lsq import LSQ
from torch import Tensor, nn

Plug = Callable[..., Path]


def resume_is_exact(method: str, folder: Path) -> None:
    """The contract's own test, for a method of this file."""
    contract = MethodContract()
    contract.method = method  # type: ignore[misc]
    contract.test_resume_equals_uninterrupted(None, folder)


def first_batches(data: DataModule, n: int = 1) -> list:
    return list(data.train_dataloader())[:n]


# --- a second pass ----------------------------------------------------------------------------------------------------


class Norms(nn.Module):
    """Every kind of BatchNorm setting that a network may have, the last of them switched off by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(3)
        self.average = nn.BatchNorm2d(3, momentum=None)
        self.still = nn.BatchNorm2d(3, momentum=0.0)
        self.frozen = nn.BatchNorm2d(3)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.own = nn.BatchNorm2d(3)
        self.own.track_running_stats = False
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.children():
            x = norm(x)
        if self.fails:
            raise RuntimeError("in the middle")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_without_tracking_moves_nothing_and_restores_each_setting(fails: bool) -> None:
    """A method's second pass would move BatchNorm's statistics (and its count of batches), or leave tracking off for good."""
    net = Norms().train()
    net.frozen.eval()
    net.fails = fails
    before = {k: v.clone() for k, v in net.state_dict().items()}
    settings = {n: (m.track_running_stats, m.momentum, m.training) for n, m in net.named_children()}  # type: ignore[union-attr]
    try:
        with _not_tracking(net):
            net(torch.randn(4, 3, 5, 5))
    except RuntimeError:
        assert fails
    assert [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])] == []
    assert {n: (m.track_running_stats, m.momentum, m.training) for n, m in net.named_children()} == settings  # type: ignore[union-attr]
    net.fails = False
    net(torch.randn(4, 3, 5, 5))
    moved = {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {"plain", "average", "instance"}
    assert not moved & {"frozen", "untracked", "own"}


def test_a_tracked_pass_moves_statistics_once() -> None:
    """Running statistics would never move; or once for each micro-batch that is only looked at."""
    method, data = ready("lsq")
    batch = first_batches(data)[0]
    norm = method.net.bn1
    method.train()
    with torch.no_grad():
        method.compute_losses(batch, track=True)
        assert norm.num_batches_tracked.item() == 1
        method.compute_losses(batch, track=False)
    assert norm.num_batches_tracked.item() == 1
    assert method.scope.track is False


def test_an_untracked_pass_uses_the_batchs_own_statistics() -> None:
    """A sharpness method's second gradient would be that of an eval-mode network."""
    method, data = ready("fp32")
    batch = first_batches(data)[0]
    method.train()
    with torch.no_grad():
        tracked = method.compute_losses(batch, track=True)["task"]
        untracked = method.compute_losses(batch, track=False)["task"]
    assert tracked == untracked


# --- what belongs to the harness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "training_step",
        "validation_step",
        "configure_optimizers",
        "on_train_epoch_start",
        "on_anything",
        "attach",
        "update",
    ],
)
@pytest.mark.parametrize("base", [Method, LSQ, Wrapper])
def test_overriding_what_lightning_calls_is_refused(base: type[Method], name: str) -> None:
    """Lightning calls these on the outermost module only: inside a chain the method would silently lose its override."""
    with pytest.raises(TypeError, match=f"Mine overrides {name}, which belongs to the harness"):
        type("Mine", (base,), {name: lambda self, *a: None})


def test_only_the_outermost_registers_the_network() -> None:
    """The network would be in the checkpoint twice, and be trained twice as fast."""
    method, _ = ready("kd+lsq")
    assert all(name.startswith("net.") for name in method.state_dict())
    assert not hasattr(method.members[0], "net")
    assert method.members[0].spec is method.spec
    assert method.members[0].scope is method.scope
    assert method.members[0].task is method.task


def test_hooks_are_called_on_every_member_the_inner_first(plug: Plug, tmp_path: Path) -> None:
    """A method inside a chain would never start, or its controller would never act."""
    plug("""
    LOG = []
    class Logs:
        def start(self, run, stage): LOG.append(("start", self.name, torch.is_grad_enabled()))
        def epoch_start(self, run): LOG.append(("epoch_start", self.name, torch.is_grad_enabled()))
        def before_update(self, run): LOG.append(("before_update", self.name, torch.is_grad_enabled()))
        def after_update(self, run): LOG.append(("after_update", self.name, torch.is_grad_enabled()))
        def validated(self, run, metrics): LOG.append(("validated", self.name, "val/acc" in metrics))
    class Inner(Logs, LSQ):
        name = "inner"
    class Outer(Logs, Wrapper):
        name = "outer"
    """)
    method, data = ready("outer+inner", epochs=2)
    train(method, data, tmp_path / "run")
    log = __import__("sys").modules["qatbench_plugin_mine"].LOG
    step = [(hook, who, False) for hook in ("before_update", "after_update") for who in ("inner", "outer")]
    start = [("start", "inner", False), ("start", "outer", False)]
    epoch = [("epoch_start", "inner", False), ("epoch_start", "outer", False), *step * data.steps]
    check = [("validated", "inner", True), ("validated", "outer", True)]
    assert log == [*start, *epoch, *check, *epoch, *check]


def test_gradients_are_fresh_at_every_backward() -> None:
    """The second pass of a two-pass method would add its gradient to the first one's."""
    method, data = ready("lsq")
    loop = Loop(method, data)
    loop.run.batch = first_batches(data)[0]
    method.eval()
    loop.run.backward(track=False)
    one = [p.grad.clone() for p in method.net.parameters() if p.grad is not None]
    loop.run.backward(track=False)
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(one, (p for p in method.net.parameters() if p.grad is not None), strict=True)
    )


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts: int) -> None:
    """``accumulate`` would train something else: by a factor, or with a small last part that weighs too much."""
    grads, losses = {}, {}
    for accumulate in (1, parts):
        method, data = ready("kd+lsq", accumulate=accumulate)  # 24 images of 3 domains: 3 parts are of 9, 9 and 6
        loop = Loop(method, data)
        loop.run.batch = first_batches(data)[0]
        method.eval()  # BatchNorm sees the parts, so only without its batch statistics are the two the same
        losses[accumulate] = loop.run.backward(track=False)
        grads[accumulate] = {n: p.grad for n, p in method.named_parameters()}
    for name, whole in grads[1].items():
        torch.testing.assert_close(grads[parts][name], whole, rtol=1e-3, atol=1e-5, msg=name)
    for name, whole in losses[1].items():
        torch.testing.assert_close(losses[parts][name], whole)


def test_clipping_bounds_the_gradient(plug: Plug) -> None:
    """``clip`` would do nothing, or clip before the hooks that change gradients."""
    plug("""
    class Large(LSQ):
        name = "large"
        def before_update(self, run):
            for p in run.net.parameters():
                if p.grad is not None: p.grad.mul_(1000)
        def after_update(self, run):
            self.norm = torch.stack([p.grad.norm() for p in run.net.parameters() if p.grad is not None]).norm()
    """)
    norms = []
    for clip in (None, 0.5):
        method, data = ready("large", clip=clip)
        Loop(method, data).epoch(first_batches(data))
        norms.append(method.norm.item())
    assert norms[0] > 100
    assert norms[1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_parameter_is_in_one_group(optimizer: str, plug: Plug) -> None:
    """A wrapper's own parameter would never be trained, or one would be stepped twice; a group's settings would be lost."""
    plug("""
    class Own(Wrapper):
        name = "own"
        def __init__(self, inner, params=None):
            super().__init__(inner, params)
            self.gain = nn.Parameter(torch.ones(()))
        def losses(self, out, batch):
            return {k: v * self.gain for k, v in self.inner.losses(out, batch).items()}
    """)
    method, data = ready("own+lsq", optimizer=optimizer, weight_decay=0.125)
    groups = method.configure_optimizers().param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    assert {group["weight_decay"] for group in groups} == {0.0, 0.125}
    Loop(method, data).epoch(first_batches(data))
    assert method.gain.item() != 1.0


def test_a_parameter_of_two_modules_is_stepped_once() -> None:
    """A shared slope would move twice as far in each update as the others."""
    net = nn.Sequential(nn.PReLU(), nn.PReLU())
    net[1].weight = net[0].weight
    groups = Method().param_groups(net)
    assert [p for group in groups for p in group["params"]] == [net[0].weight]


def test_a_quantizers_groups_set_its_learning_rate(plug: Plug, tmp_path: Path) -> None:
    """``Quantizer.groups`` would have no effect: a step whose rate shall be a hundredth would diverge."""
    plug("""
    from qatbench.methods.lsq import LearnedStep
    class Slow(LearnedStep):
        groups = {"step": (0.0, 0.0)}
    class SlowLSQ(LSQ):
        name = "slow"
        def weight_quantizer(self, bits, site, scope):
            return Slow(bits, site, scope, True, site.weights)
    """)
    method, data = ready("slow", epochs=1)
    before = {n: p.detach().clone() for n, p in method.net.named_parameters() if n.endswith("step")}
    train(method, data, tmp_path / "run")
    moved = {n for n, p in method.net.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == {n for n in before if "act_quantizer" in n}


# --- what would otherwise be a silent baseline ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nothing", "idle+lsq", "kd+nothing"])
def test_a_method_that_changes_nothing_is_an_error(text: str, plug: Plug) -> None:
    """A row of the table would carry a method's name and the float network's, or another method's, number."""
    plug("""
    class Nothing(LSQ):
        name = "nothing"
        def plan(self, sites, bits, probe):
            return {s.name: Bits(32, 32) for s in sites if s.kind == "layer"}
    class Idle(Wrapper):
        name = "idle"
        changes_net = True
        def replace(self, site, module, scope):
            return module
    """)
    with pytest.raises(RunFailed, match=r"(nothing|idle) changes nothing in resnet8 at w3a3"):
        ready(text)


def test_a_wrapper_that_replaces_is_no_error(plug: Plug) -> None:
    """A wrapper that acts on norms only would be refused."""
    plug("""
    class Norm(Wrapper):
        name = "norm_wrapper"
        changes_net = True
        def replace(self, site, module, scope):
            return nn.Identity() if site.kind == "norm" else module
    """)
    method, _ = ready("norm_wrapper+lsq")
    assert not [m for m in method.net.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_plan_that_leaves_out_a_layer_is_an_error(plug: Plug) -> None:
    """A layer would stay in float while the table says that it has few bits."""
    plug("""
    class Hole(LSQ):
        name = "hole"
        def plan(self, sites, bits, probe):
            plan = super().plan(sites, bits, probe)
            plan.pop("head")
            return plan
    """)
    with pytest.raises(RunFailed, match="the plan of hole leaves out head; give 32 bits"):
        ready("hole")


BREAK_AT_THE_END = """def after_update(self, run):
        if run.scope.step == run.scope.steps - 1:
            run.net.head.weight_quantizer.step.fill_({})"""
BREAKS = {
    "loss": "def losses(self, out, batch): return {'task': super(type(self), self).losses(out, batch)['task'] * float('nan')}",
    "step": BREAK_AT_THE_END.format("0.0"),
    "nan": BREAK_AT_THE_END.format("float('nan')"),
    "weight": BREAK_AT_THE_END.format("1.0") + "; run.net.layer1[0].conv1.weight[0, 0, 0, 0] = float('inf')",
    "norm": BREAK_AT_THE_END.format("1.0") + "; run.net.bn1.running_var[0] = float('inf')",
    "logits": BREAK_AT_THE_END.format("1.0") + "; run.net.head.bias[:] = torch.tensor([3e38, -3e38, 3e38, -3e38])",
}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("loss", "diverged: train/task is nan in epoch 0"),
        ("step", "diverged: step collapsed to zero in head.weight_quantizer in epoch 0"),
        ("nan", "diverged: step is not finite in head.weight_quantizer in epoch 0"),
        ("weight", "diverged: layer1.0.conv1.weight is not finite in epoch 0"),
        ("norm", "diverged: bn1.running_var is not finite in epoch 0"),
        ("logits", "diverged: val/loss is inf in epoch 0"),
    ],
)
def test_a_run_that_diverges_ends_with_its_reason(what: str, reason: str, plug: Plug, tmp_path: Path) -> None:
    """A run of NaN would be recorded as done, with the accuracy of a constant answer."""
    plug(f"class Breaks(LSQ):\n    name = 'breaks'\n    {BREAKS[what]}\n")
    method, data = ready("breaks", epochs=1)
    with pytest.raises(RunFailed) as caught:
        train(method, data, tmp_path / "run")
    assert str(caught.value) == reason


# --- what losses may look at ------------------------------------------------------------------------------------------


def test_taps(plug: Plug) -> None:
    """A feature-distillation or a noise method would see the wrong tensor, or none."""
    plug("""
    class Taps(LSQ):
        name = "taps"
        teacher = "float"
        def taps(self, sites):
            return [s.name for s in sites if s.kind == "layer"] + ["bn1"]
        def losses(self, out, batch):
            self.seen = out
            return super().losses(out, batch)
    class More(Wrapper):
        name = "more"
        def taps(self, sites):
            return [s.name for s in sites if s.kind == "joint"] + ["bn1"]
    """)
    method, data = ready("more+taps")
    batch = first_batches(data)[0]
    method.train()
    method.compute_losses(batch, track=True)
    out = method.inner.seen
    layers = [s for s in method.sites if s.kind == "layer"]
    joints = [s for s in method.sites if s.kind == "joint"]
    assert set(out.taps) == {s.name for s in layers} | {s.name for s in joints} | {"bn1"}
    for site in layers:
        tap, module = out.taps[site.name], method.net.get_submodule(site.name)
        assert torch.equal(tap.quantized, module.act_quantizer(tap.inputs[0]))
        assert tap.step is module.act_quantizer.step
        assert torch.equal(tap.value, module(tap.inputs[0]))
        assert tap.value.requires_grad
        assert tap.quantized.requires_grad
        assert (tap.quantized / tap.step).detach().sub((tap.quantized / tap.step).detach().round()).abs().max() < 1e-3
    assert torch.equal(out.taps["head"].value, out.logits)
    for site in joints:
        tap = out.taps[site.name]
        assert len(tap.inputs) == 2
        assert tap.quantized is None
        assert torch.equal(tap.value, tap.inputs[0] + tap.inputs[1])
    teacher = out.teacher["float"]
    assert set(teacher.taps) == set(out.taps)
    assert all(t.quantized is None and t.step is None and not t.value.requires_grad for t in teacher.taps.values())
    assert not any(m._forward_hooks for m in method.net.modules())


EMA = """
class Ema(LSQ):
    name = "ema_method"
    teacher = "ema"
    def losses(self, out, batch):
        self.seen = out
        mean = out.teacher["ema"].logits
        return {**super().losses(out, batch), "ema": (out.logits - mean).square().mean()}
"""


def test_the_ema_teacher_follows_and_is_never_trained(plug: Plug) -> None:
    """The teacher would stand still, run ahead, be moved by the optimizer, or have gradients."""
    plug(EMA)
    method, data = ready("kd+ema_method")
    loop = Loop(method, data)
    expected = {n: p.detach().clone() for n, p in method.ema.named_parameters()}
    optimized = {id(p) for g in loop.run.opt.param_groups for p in g["params"]}
    assert not optimized & {id(p) for p in method.ema.parameters()}
    for epoch, batch in enumerate(first_batches(data, 3)):
        loop.epoch([batch], epoch)
        for name, p in method.net.named_parameters():
            expected[name] = expected[name] * EMA_DECAY + p.detach() * (1 - EMA_DECAY)
    for name, p in method.ema.named_parameters():
        torch.testing.assert_close(p, expected[name], msg=name)
        assert p.grad is None
        assert not p.requires_grad
    student = dict(method.net.named_parameters())
    assert any(not torch.equal(p, student[n]) for n, p in method.ema.named_parameters())
    buffers = dict(method.net.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in method.ema.named_buffers())
    assert set(method.inner.seen.teacher) == {"float", "ema"}


def test_the_ema_teacher_is_in_eval_mode_while_training(plug: Plug, tmp_path: Path) -> None:
    """The teacher's BatchNorm would move by itself, and its answers would depend on the batch."""
    plug(EMA + "    def before_update(self, run): self.modes = {m.training for m in run.method.ema.modules()}\n")
    method, data = ready("ema_method", epochs=2)
    method.train()  # as anybody may who holds the module
    train(method, data, tmp_path / "run")
    assert method.modes == {False}


def test_the_ema_teacher_survives_a_resume(plug: Plug, tmp_path: Path) -> None:
    """A killed run would go on with a teacher that is the student."""
    plug(EMA)
    resume_is_exact("ema_method", tmp_path)


def test_two_views_are_of_the_same_images(plug: Plug, tmp_path: Path) -> None:
    """A consistency method would compare an image with itself, or with another image."""
    plug("""
    class Views(LSQ):
        name = "two_views"
        views = 2
        def losses(self, out, batch):
            self.seen = batch
            return super().losses(out, batch)
    """)
    method, data = ready("kd+two_views", epochs=1)
    train(method, data, tmp_path / "run")
    batch = method.inner.seen
    assert len(batch.views) == 1
    assert batch.views[0].shape == batch.x.shape
    different = (batch.views[0] != batch.x).flatten(1).any(1)
    assert different.float().mean() > 0.5
    still = DataModule(contract_data(), "mdl", 0, 24, "none", views=2)
    batch = first_batches(still)[0]
    assert torch.equal(batch.views[0], batch.x)


SHOWN = """
class Shown(LSQ):
    name = "shown"
    views = {views}
    def __init__(self, params=None):
        super().__init__(params)
        self.teacher = "{kind}"
    def taps(self, sites):
        return ["conv1"]
    def losses(self, out, batch):
        self.seen = {{kind: teacher.taps["conv1"].inputs[0] for kind, teacher in out.teacher.items()}}
        self.graph = {{kind: teacher.logits.requires_grad for kind, teacher in out.teacher.items()}}
        return super().losses(out, batch)
"""


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["ema", "student"])
def test_which_view_a_teacher_is_shown(kind: str, views: int, plug: Plug) -> None:
    """A consistency target would see the student's own view; or the float network's features would be of other pixels."""
    plug(SHOWN.format(kind=kind, views=views))
    method, data = ready("kd+shown")
    batch = first_batches(data)[0]
    method.train().compute_losses(batch, track=True)
    seen = method.inner.seen
    assert set(seen) == {"float", kind}
    assert torch.equal(seen["float"], batch.x)
    assert torch.equal(seen[kind], batch.x if views == 1 else batch.views[0])
    assert torch.equal(batch.x, seen[kind]) == (views == 1)
    assert method.inner.graph == {"float": False, kind: False}


def test_the_student_as_its_own_teacher_moves_no_statistics(plug: Plug) -> None:
    """BatchNorm's statistics would move twice a step, towards images that the student was not trained on."""
    plug(SHOWN.format(kind="student", views=2))
    taught, data = ready("shown")
    alone, _ = ready("lsq")
    batch = first_batches(data)[0]
    for method in (taught, alone):
        method.train().compute_losses(batch, track=True)
    assert same(state(taught), state(alone)) == []
    assert taught.net.bn1.track_running_stats
    assert taught.net.training
    assert taught.scope.track is True


def test_a_tap_does_not_run_the_quantizer_again(plug: Plug) -> None:
    """A quantizer that draws random numbers would show the loss another feature than the layer used; and each would cost twice."""
    plug("""
    from qatbench.methods.lsq import LearnedStep
    class Noisy(LearnedStep):
        def quantize(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().quantize(x + torch.rand_like(x))
    class Draws(LSQ):
        name = "draws"
        def act_quantizer(self, bits, site, scope):
            return Noisy(bits, site, scope, False, site.inputs)
        def taps(self, sites):
            return [s.name for s in sites if s.kind == "layer"]
        def losses(self, out, batch):
            self.seen = out
            return super().losses(out, batch)
    """)
    method, data = ready("draws")
    layers = dict(quant_layers(method.net))
    for layer in layers.values():
        layer.act_quantizer.calls = 0  # calibration needed one
    method.train().compute_losses(first_batches(data)[0], track=True)
    assert set(method.seen.taps) == set(layers)
    for name, layer in layers.items():
        tap = method.seen.taps[name]
        assert layer.act_quantizer.calls == 1, name
        value = apply_layer(tap.quantized, layer.weight_quantizer(layer.weight), layer.bias, layer.conv)
        assert torch.equal(value, tap.value), name
        assert tap.quantized.requires_grad
    assert not any(m._forward_hooks for m in method.net.modules())


# --- stages and schedules ---------------------------------------------------------------------------------------------

STAGED = """
LOG = []
class Staged(LSQ):
    name = "staged"
    def stages(self, epochs):
        return [Stage("whole", epochs - 2), Stage("head", 2, "class_balanced", 0.1)]
    def start(self, run, stage):
        LOG.append(("start", stage.name, run.method.current_epoch))
        if stage.name == "head":
            run.net.head.weight.mul_(-1)
    def before_update(self, run):
        LOG.append((run.method.data.sampler, run.opt.param_groups[0]["lr"], run.scope.epoch, run.scope.step))
"""


def test_two_stages_have_their_own_sampler_and_schedule(plug: Plug, tmp_path: Path) -> None:
    """Decoupled training would train its classifier on the long tail, or at a learning rate that has decayed to zero."""
    plug(STAGED)
    method, data = ready("staged")
    train(method, data, tmp_path / "run")
    log = __import__("sys").modules["qatbench_plugin_mine"].LOG
    starts = [entry for entry in log if entry[0] == "start"]
    assert starts == [("start", "whole", 0), ("start", "head", 2)]
    steps = [entry for entry in log if entry[0] != "start"]
    assert len(steps) == 4 * data.steps
    assert [entry[3] for entry in steps] == list(range(4 * data.steps))
    for k, (sampler, lr, epoch, _) in enumerate(steps):
        assert epoch == k // data.steps
        second = epoch >= 2
        assert sampler == ("class_balanced" if second else "instance")
        done = (k - 2 * data.steps * second) / (2 * data.steps)
        assert lr == pytest.approx(0.02 * (0.1 if second else 1.0) * 0.5 * (1 + math.cos(math.pi * done)))
    assert (method.scope.epochs, method.scope.steps) == (4, 4 * data.steps)


def test_two_stages_resume_exactly(plug: Plug, tmp_path: Path) -> None:
    """A run killed in its second stage would start that stage twice, or never."""
    plug(STAGED)
    resume_is_exact("staged", tmp_path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("cosine", {0.0: 1.0, 0.25: 0.5 * (1 + math.sqrt(0.5)), 0.5: 0.5, 1.0: 0.0}),
        ("step", {0.0: 1.0, 0.59: 1.0, 0.6: 0.1, 0.79: 0.1, 0.8: 0.01, 1.0: 0.01}),
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    ],
)
def test_schedule(kind: str, values: dict[float, float]) -> None:
    """Every method would be trained at another learning rate than the table says."""
    for done, factor in values.items():
        assert schedule(kind, done) == pytest.approx(factor, abs=1e-12)


# --- precision, checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["fp32", "lsq"])
def test_a_second_pass_in_bf16_sees_moved_weights(inner: str, plug: Plug, tmp_path: Path) -> None:
    """A sharpness method would take its second gradient at the old weights: autocast keeps the bf16 copies that it made."""
    plug("""
    class Moves(Wrapper):
        name = "moves"
        def step(self, run):
            first = run.backward()
            weights = [run.net.head.weight, run.net.head.bias]
            kept = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w in weights: w.zero_()
            second = run.backward(track=False)
            with torch.no_grad():
                for w, k in zip(weights, kept): w.copy_(k)
            run.update()
            self.pair = float(first["task"]), float(second["task"])
    """)
    method, data = ready(f"moves+{inner}", precision="bf16", epochs=1)
    train(method, data, tmp_path / "run")
    first, second = method.pair
    assert second == pytest.approx(math.log(4), rel=1e-2)  # a head of zeros knows nothing of four classes
    assert abs(first - second) > 0.01


def test_bf16_is_used_and_the_weights_stay_in_float32() -> None:
    """``precision=bf16`` would be a label only; or the weights would be rounded to eight bits of precision."""
    logits = {}
    for precision in ("fp32", "bf16"):
        method, data = ready("fp32", precision=precision)
        seen: list[Tensor] = []
        method.net.conv1.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        with torch.no_grad():
            logits[precision] = method.compute_losses(first_batches(data)[0], track=False)["task"]
        assert seen[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert logits["bf16"] == pytest.approx(logits["fp32"].item(), rel=0.05)


def test_a_checkpoint_holds_plain_types_and_rebuilds_the_surgery(tmp_path: Path) -> None:
    """A checkpoint could only be read by unpickling code, or not without the suite that made it."""
    method, data = ready("kd+lsq", epochs=1, bits="w2a4")
    train(method, data, tmp_path)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    assert saved["qatbench"]["spec"] == method.spec.model_dump(mode="json")
    assert saved["qatbench"]["plan"] == {name: list(bits) for name, bits in method.bit_plan.items()}
    assert saved["qatbench"]["plan"]["layer1.0.conv1"] == [2, 4]
    assert set(saved["state_dict"]) == set(state(method))


def test_run_hands_out_unaugmented_training_images(tmp_path: Path, plug: Plug) -> None:
    """A method that measures class statistics would measure augmented images, or miss some."""
    plug("""
    class Counts(LSQ):
        name = "counts"
        def epoch_start(self, run):
            self.count = sum(len(b) for b in run.train_batches())
            self.probe_size = len(run.probe)
    """)
    method, data = ready("counts", epochs=1)
    train(method, data, tmp_path / "run")
    assert method.count == sum(method.task.class_counts) == sum(len(data.splits[d].train) for d in data.task.domains)
    assert method.probe_size == 48


def test_scope_tells_domain_and_labels_only_while_training() -> None:
    """A domain-aware quantizer would use the labels of test images; or would see the last batch's domains."""
    method, data = ready("lsq")
    batch = first_batches(data)[0]
    assert isinstance(method.net.conv1, QuantLayer)
    scope = method.net.conv1.act_quantizer.scope
    assert scope is method.scope
    method.compute_losses(batch, track=True)
    assert torch.equal(scope.domain, batch.domain)
    assert torch.equal(scope.labels, batch.y)
    method._meters = {}
    method._evaluate(batch, "d0")
    assert scope.labels is None
    assert scope.track is False


def test_a_method_without_quantizers_says_so() -> None:
    """A plugin author who forgets one of the two would get a layer in float without a word."""
    with pytest.raises(NotImplementedError, match="fp32 has no weight quantizer"):
        FP32().weight_quantizer(4, None, None)  # type: ignore[arg-type]


def test_a_named_subclass_keeps_its_settings() -> None:
    """``Params`` given to a method would be replaced by its defaults."""
    params = LSQ.Params()
    assert LSQ(params).params is params
    assert isinstance(LSQ().params, LSQ.Params)


def test_the_same_run_twice_in_one_process(tmp_path: Path) -> None:
    """A run's number would depend on what its process did before."""
    states: list[dict[str, Any]] = []
    for folder in ("one", "two"):
        torch.manual_seed(len(states))
        torch.randn(17)
        method, data = ready("kd+lsq", epochs=1)
        train(method, data, tmp_path / folder)
        states.append(state(method))
    assert same(*states) == []
    assert same({k: v for k, v in float_net().state_dict().items()}, float_net(0).state_dict()) == []
    assert isinstance(Run(method).probe.x, Tensor)


def test_killed_between_the_last_checkpoint_and_the_record(tmp_path: Path) -> None:
    """A run that was killed after its last epoch would end with untrained weights, or train its epochs again."""
    whole, data = ready("lsq", epochs=2)
    train(whole, data, tmp_path)
    saved = read_checkpoint(tmp_path / LAST)
    assert saved is not None
    again, data = ready("lsq", epochs=2)
    again = assemble(again.spec, float_net(), data.task, data.probe(48), saved["qatbench"]["plan"])
    train(again, data, tmp_path)
    assert same(state(whole), state(again)) == []


def test_frozen_by_a_plugin_is_not_perturbed_nor_in_the_clipped_norm(plug: Plug) -> None:
    """What another member says of its parameters would hold for its own step only."""
    plug("""
    class Half(Wrapper):
        name = "half"
        def frozen(self, run):
            return [p for name, p in run.net.named_parameters() if not name.startswith("layer1")]
    """)
    method, run = begin("sam+half+lsq", clip=1e-3, optimizer="sgd", momentum=0.0, lr=1.0, weight_decay=0.0)
    before = {p: p.detach().clone() for p in method.net.parameters()}
    at_the_point: list[dict[Any, Tensor]] = []
    in_second_pass(method, lambda: at_the_point.append({p: p.detach().clone() for p in before}))
    method.step(run)
    trained = set(method.net.layer1.parameters())
    assert all(torch.equal(at_the_point[0][p], old) for p, old in before.items() if p not in trained)
    far = sum(float((at_the_point[0][p] - before[p]).norm()) ** 2 for p in trained) ** 0.5
    assert far == pytest.approx(0.02, rel=1e-3)
    moved = sum(float((p.detach() - old).norm()) ** 2 for p, old in before.items()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_all_frozen_is_a_step_of_nothing(plug: Plug) -> None:
    """A norm of no gradients would end the run with a word of torch's."""
    plug("""
    class Still(Wrapper):
        name = "still"
        def frozen(self, run):
            return list(run.net.parameters())
    """)
    method, run = begin("sam+still+lsq")
    before = state(method)
    method.step(run)
    moved = same(before, state(method))
    assert all("running" in name or "batches" in name for name in moved)
