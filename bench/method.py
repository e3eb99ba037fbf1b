"""The plugin contract: what a method is, what it is handed, and the training loop that belongs to the harness.

A method is one class in one file. It overrides what differs from plain quantization-aware training and nothing else; the harness
owns the loop and hands out the pass (`Run.backward`, `Run.update`). See README.md for a worked example.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .edges import Edge, Edges, edge_bits, edge_words
from .errors import Diverged, RunFailed
from .hooks import OF_METHOD, guard
from .quant import Bits, Budget, Quantizer, QuantLayer, Scope, deployed, quant_layers
from .quant.allocate import Costs, allocate
from .quant.layer import BATCH_NORMS
from .quant.quantizer import finite_state, step_of
from .quant.sensitivity import second_order
from .seeds import seed_for
from .site import Site
from .spec import FLOAT_BITS, Frozen, RunSpec
from .task import Task, combine
from .traces import Traces

if TYPE_CHECKING:
    from .data import Batch, DataModule

TeacherKind = Literal["float", "ema", "student"]
EMA_DECAY = 0.999  # of the `ema` teacher, per optimizer step (Tarvainen and Valpola 2017, arXiv 1703.01780)


@dataclass(frozen=True)
class Tap:
    """A feature that `Method.losses` asked for.

    Attributes:
        value: What the named module returned.
        quantized: What the module's activation quantizer made of its input, if it is a layer that has one.
        step: That quantizer's grid spacing, if it has one.
        inputs: What the module was given.
    """

    value: Tensor
    quantized: Tensor | None
    step: Tensor | None
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Out:
    """One forward pass: logits (float [B, classes]), the taps asked for, and the same of each teacher, by its kind.

    The ``float`` teacher saw the student's own view, so its features are of the same pixels. ``ema`` (the mean of the network over
    the past steps) and ``student`` (the network itself, without gradients) saw `Batch.views[0]`, where a batch has a second view.
    """

    logits: Tensor
    taps: Mapping[str, Tap]
    teacher: Mapping[str, Out] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A part of training with its own schedule. Most methods have one; decoupled training has two.

    Attributes:
        name: For logs.
        epochs: How many.
        sampler: ``instance`` (every image equally often) or ``class_balanced`` (every class equally often).
        lr: Factor on the run's learning rate.
    """

    name: str
    epochs: int
    sampler: Literal["instance", "class_balanced"] = "instance"
    lr: float = 1.0


@dataclass(frozen=True)
class Probe:
    """What `Method.plan` may measure: the float network and a batch of unaugmented training images.

    Attributes:
        net: The float network; `dataclasses.replace` gives a probe of another one.
        batch: The images.
        kept: Where Hessian traces that were measured are kept.
    """

    net: nn.Module
    batch: Batch
    kept: Traces = field(default_factory=Traces)

    def loss(self, task: Task) -> Callable[[Batch], Tensor]:
        """The float network's mean loss on a batch, in eval mode: a function that `bench.quant.sensitivity` takes."""
        net = self.net.eval()
        return lambda batch: torch.stack(list(task.losses(net(batch.x), batch).values())).sum()

    def weights(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The float weight of each of these layers."""
        return {site.name: self.net.get_parameter(f"{site.name}.weight") for site in sites}

    def hessian_traces(self, task: Task, sites: Sequence[Site], seed: int, probes: int = 50) -> dict[str, float]:
        """Trace of the Hessian of `loss` in the weight of each of these layers, measured once a float network (`Traces`).

        Args:
            task: Whose loss.
            sites: The layers.
            seed: Of the run; all runs of one seed share the random vectors.
            probes: Random vectors.
        """
        seed = seed_for("sensitivity", seed)
        return self.kept.of(self.net, self.loss(task), self.batch, self.weights(sites), probes, seed)


class Run:
    """One training run as a method sees it.

    Attributes:
        net: The quantized network.
        opt: The optimizer; None outside training.
        probe: The batch that calibrated the network (unaugmented training images).
        batch: The batch in flight.
        scope: Shared with all quantizers; it holds step and epoch.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.net: nn.Module = method.net
        self.scope = method.scope
        self.probe = method.probe
        self.batch: Batch = method.probe
        self.opt: Any = None

    def backward(self, batch: Batch | None = None, track: bool = True, add: bool = False) -> dict[str, Tensor]:
        """Fresh gradients of the *outermost* method's losses on ``batch`` (default: the batch in flight).

        Gradient accumulation over micro-batches happens in here. What a member has `Method.frozen` has no gradient afterwards.

        Args:
            batch: Any batch or part of one.
            track: Whether running statistics may move; False for a second pass over the same images.
            add: Whether the gradients are added to those that are there, which then need not be kept elsewhere.

        Returns:
            The losses, detached, each a mean over the batch.
        """
        if not add:
            self.opt.zero_grad(set_to_none=True)
        whole = batch or self.batch
        totals: dict[str, Tensor] = {}
        for part in whole.chunk(self.method.spec.accumulate):
            losses = self.method.compute_losses(part, track)
            share = len(part) / len(whole)  # parts differ by an image if the batch does not divide
            loss = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
            self.method.manual_backward(loss if share == 1 else loss * share)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.detach() * share
        for member in self.method.members:
            for parameter in member.frozen(self):
                parameter.grad = None
        self.method.record_losses(totals)
        return totals

    def update(self) -> None:
        """Clip the gradients, step optimizer and schedule, and bring quantizers back into range."""
        self.method.update(self)

    def train_batches(self) -> Iterator[Batch]:
        """One pass over the unaugmented training images."""
        return self.method.data.train_batches(self.method.spec.batch)

    def val_batches(self) -> Iterator[Batch]:
        """One pass over the validation images, domain after domain: what a method may select its own settings on."""
        return itertools.chain.from_iterable(self.method.data.val_dataloader())


# Lightning calls these on the outermost module only, so a method inside a chain would silently lose them.
_FINAL = (
    "training_step",
    "validation_step",
    "test_step",
    "configure_optimizers",
    "compute_losses",
    "record_losses",
    "update",
    "attach",
    "use",
)


class Method(L.LightningModule):
    """Plain quantization-aware training, and the base of every method.

    A subclass sets the class attributes and overrides what differs. State that must survive a resume is a buffer or a parameter.
    """

    name: ClassVar[str] = ""
    """The name in suites and tables; setting it makes the class known to the registry."""
    paper: ClassVar[str] = ""
    """Authors, title, year, arXiv id."""
    version: ClassVar[int] = 1
    """Goes up by hand when the numbers move; the identity of every run of this method then changes."""
    fidelity: ClassVar[Literal["paper", "reconstruction", "baseline"]] = "baseline"
    trains: bool = True
    changes_net: bool = True
    bits: Sequence[int] = range(2, 9)
    """Widths it can quantize to; ``(32,)`` for a float method."""
    first_last: Edge | Edges = "8bit"
    """Its own policy, where the run asks for ``native``: ``8bit``, ``fp`` or ``same``, or two of them, for the first and the last
    layer."""
    weights_only: bool = False
    """Whether inputs stay in float, whatever a run asks; its bits are then wXa32."""
    views: int = 1
    """How many augmented views of each image a batch carries (`Batch.x`, `Batch.views`)."""
    teacher: TeacherKind | None = None
    """Whose outputs on the same images `losses` finds in `Out.teacher`."""
    alters: ClassVar[frozenset[str]] = frozenset()
    """Of logits, loss, joint, head, norm, step: what cannot be altered twice in one chain."""
    test_params: ClassVar[Mapping[str, Any]] = {}
    """Settings under which every mechanism fires within 20 steps."""

    # Set by the harness on every member of a chain ...
    spec: RunSpec
    task: Task
    scope: Scope
    sites: list[Site]
    edges: Edges
    """The run's policy for the first and the last layer, ``native`` resolved to the outermost method's own."""
    # ... and on the outermost one.
    net: nn.Module
    ema: nn.Module
    probe: Batch
    bit_plan: dict[str, Bits]
    run_in_progress: Run
    test_domains: list[str]
    tested: dict[str, dict[str, float]]
    per_class: dict[str, list[float | None]]

    class Params(Frozen):
        """The method's own settings, with defaults and bounds."""

    def __init__(self, params: Frozen | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.params: Any = params if params is not None else self.Params()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = [n for n in vars(cls) if n in _FINAL or n.startswith("on_")]
        if taken and cls.__module__ != __name__:
            raise TypeError(
                f"{cls.__name__} overrides {taken[0]}, which belongs to the harness; see start, epoch_start, step, losses"
            )
        guard(cls, Method, OF_METHOD)

    # --- build: called once, the inner method first where it says so ----------------------------------------------------------

    @property
    def candidates(self) -> Sequence[int]:
        """Widths that a mixed-precision plan may choose from."""
        return self.bits

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """Bits of every layer. Default: ``bits`` everywhere but in the first and the last layer, as `edges` says.

        Under a budget the widths are those that keep the average and do the least `harm`, by exact dynamic programming.

        Args:
            sites: The network's sites, in order of execution.
            bits: What the run asks for; a budget is shared by all layers but those of first and last whose policy is not ``same``.
            probe: Float network and probe batch, to measure sensitivity.
        """
        layers = [site for site in sites if site.kind == "layer"]
        words = edge_words(layers, self.edges)
        free = [site for site in layers if words.get(site.name, "same") == "same"]
        if isinstance(bits, Budget):
            harm = self.harm(free, self.candidates, probe)
            widths = self.allocate(harm, {site.name: site.weights for site in free}, bits.w)
            chosen = {name: Bits(width, bits.a) for name, width in widths.items()}
        else:
            chosen = {site.name: bits for site in free}
        return {s.name: chosen[s.name] if s.name in chosen else edge_bits(words[s.name], bits) for s in layers}

    def harm(self, sites: Sequence[Site], widths: Sequence[int], probe: Probe) -> dict[str, dict[int, float]]:
        """Layer -> width -> how much the loss minds, in any one unit.

        Default: the average Hessian trace of the float network x the squared error of the method's own quantizer (HAWQ-V2).

        Args:
            sites: The layers that share the budget.
            widths: The candidates.
            probe: Float network and probe batch.
        """
        traces = probe.hessian_traces(self.task, sites, self.spec.seed)
        return second_order(traces, probe.weights(sites), widths, self.quantized(sites, probe))

    def quantized(self, sites: Sequence[Site], probe: Probe) -> Callable[[str, int], Tensor]:
        """A function of a layer's name and a width: the float weight as the method's own quantizer makes it at the start."""
        by_name, weights = {site.name: site for site in sites}, probe.weights(sites)

        @torch.no_grad()
        def at_width(name: str, width: int) -> Tensor:
            quantizer = self.weight_quantizer(width, by_name[name], self.scope).to(weights[name].device).eval()
            quantizer.fit(weights[name])
            return quantizer(weights[name])

        return at_width

    def allocate(self, harm: Costs, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
        """Width of each layer under a budget. Default: the least harm, exactly; see `bench.quant.allocate`.

        Args:
            harm: What `harm` returned.
            sizes: Weights of each layer.
            budget: Average bits a weight.
        """
        return allocate(harm, sizes, budget)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The quantizer of a layer's weight; not called at 32 bits."""
        raise NotImplementedError(f"{self.name} has no weight quantizer")

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The quantizer of a layer's input; not called at 32 bits. ``site.signed_input`` says whether it has negative values."""
        raise NotImplementedError(f"{self.name} has no activation quantizer")

    def replace(self, site: Site, module: nn.Module, scope: Scope) -> nn.Module:
        """What stands at a norm, joint or head, before quantizers are placed. Called on all of a chain, the inner first."""
        return module

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        """Names of the modules whose features `losses` wants. Called on every method of a chain."""
        return ()

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups of the network's parameters: ``params``, ``lr_scale``, ``weight_decay`` (None: the run's)."""
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = {}
        seen: set[nn.Parameter] = set()  # two modules may share one
        for module in net.modules():
            special = module.groups if isinstance(module, Quantizer) else {}
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    groups.setdefault(special.get(name, (1.0, None)), []).append(parameter)
        return [{"params": ps, "lr_scale": scale, "weight_decay": wd} for (scale, wd), ps in groups.items()]

    def prepare(self, net: nn.Module) -> None:
        """Make buffers and parameters of the method's own whose shape depends on task or network.

        Called on every method of a chain, the inner first, when the network is quantized and calibrated, and before a checkpoint
        is loaded or the optimizer made.
        """

    def stages(self, epochs: int) -> list[Stage]:
        """How the epochs are spent."""
        return [Stage("train", epochs)]

    # --- train: called on every method of a chain, the inner first, without gradients -----------------------------------------

    def start(self, run: Run, stage: Stage) -> None:
        """A stage begins. Not called again on resume."""

    def epoch_start(self, run: Run) -> None:
        """An epoch begins."""

    def frozen(self, run: Run) -> Collection[nn.Parameter]:
        """Parameters that stand still in this step, whatever their gradients. Default: none.

        Asked for after each backward pass. The harness drops their gradients there, before any member of the chain takes a norm or
        moves along them; without a gradient the optimizer leaves a parameter, its decay and its own state alone.
        """
        return ()

    def before_update(self, run: Run) -> None:
        """Gradients are there; the optimizer has not stepped. What shall stand still is said by `frozen`."""

    def after_update(self, run: Run) -> None:
        """The optimizer has stepped."""

    def validated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The validation split was measured."""

    # --- train: the outermost decides ----------------------------------------------------------------------------------------

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """Named losses; their sum is minimised. Default: the task's."""
        return self.task.losses(out.logits, batch)

    def step(self, run: Run) -> None:
        """One training step."""
        run.backward()
        run.update()

    # --- use -----------------------------------------------------------------------------------------------------------------

    def predict(self, net: nn.Module, batch: Batch) -> Tensor:
        """Logits, float [B, classes], when the network is used."""
        return net(batch.x)

    def deploy(self, run: Run) -> nn.Module:
        """The network in the form in which it would be shipped: weights as integer codes, whatever only trained folded away."""
        return deployed(run.net)

    def skip(self, task: Task) -> str | None:
        """Why this method cannot be run on this task, or None."""
        return None

    # --- what belongs to the harness (final) -------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Method]:
        """The methods of the chain that this method is the outermost of, the inner first."""
        return [self]

    def attach(self, net: nn.Module, parts: Parts) -> None:
        """Give the outermost method its network and every member what it may know."""
        for member in self.members:
            member.spec, member.task, member.scope, member.sites = parts.spec, parts.task, parts.scope, parts.sites
        self.net = net
        self.probe, self.bit_plan = parts.probe, parts.plan
        self.tap_names = tuple(dict.fromkeys(name for m in self.members for name in m.taps(parts.sites)))
        self._teachers = kinds = {m.teacher for m in self.members} - {None}
        # The float teacher stays outside the module tree: it is neither trained nor saved.
        self._float_teacher = [parts.float_net.eval().requires_grad_(False)] if "float" in kinds else []
        for member in self.members:
            member.prepare(net)
        if "ema" in kinds:
            self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self._quantizers = [m for m in net.modules() if isinstance(m, Quantizer)]
        self._stages = self.stages(parts.spec.epochs)
        self.losses_seen: dict[str, Tensor] = {}
        self.steps_seen = self.updates_seen = 0
        self.metrics: dict[str, float] = {}

    def train(self, mode: bool = True) -> Self:
        """As in torch; the `ema` teacher stays in eval mode, whoever asks."""
        super().train(mode)
        if hasattr(self, "ema"):
            self.ema.eval()
        return self

    @property
    def data(self) -> DataModule:
        """The data module of the run in progress."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def compute_losses(self, batch: Batch, track: bool) -> dict[str, Tensor]:
        """The outermost method's losses on one micro-batch, with what its taps and teachers see."""
        self.scope.domain, self.scope.labels, self.scope.track = batch.domain, batch.y, track
        with self._autocast():
            with _tracking(self.net, track):
                out = _forward(self.net, batch.x, self.tap_names)
            if self._teachers:
                out = Out(out.logits, out.taps, self._teach(batch))
            losses = self.losses(out, batch)
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses.values()):
            raise RunFailed(f"{self.name}.losses returned losses without a gradient, so nothing can be trained")
        return losses

    def _teach(self, batch: Batch) -> dict[str, Out]:
        # What the student shall agree with whatever the augmentation is shown the other view. The float network is not: what it
        # says of an image is the target for that image, and its features are compared with the student's place by place.
        other = batch.views[0] if batch.views else batch.x
        shown: dict[str, tuple[nn.Module, Tensor]] = {}
        if self._float_teacher:
            shown["float"] = self._float_teacher[0], batch.x
        if hasattr(self, "ema"):
            shown["ema"] = self.ema, other
        if "student" in self._teachers:
            shown["student"] = self.net, other
        track, self.scope.track = self.scope.track, False
        with torch.no_grad(), _tracking(self.net, "student" not in self._teachers):
            outs = {kind: _forward(net, x, self.tap_names) for kind, (net, x) in shown.items()}
        self.scope.track = track
        return outs

    def _autocast(self) -> contextlib.AbstractContextManager:
        # Entered for each pass rather than once a step: autocast caches the bf16 copies of the weights until it is left, and a
        # method that moves the weights between two passes would see the old ones.
        if self.spec.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def record_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add to the epoch's sums, without waiting for the device."""
        for name, value in losses.items():
            seen = self.losses_seen.get(name)
            self.losses_seen[name] = value.clone() if seen is None else seen.add_(value)
        self.steps_seen += 1

    def epoch_losses(self) -> dict[str, float]:
        """Mean of each loss over the epoch so far; refuses to go on from what is not finite.

        Raises:
            Diverged: A loss, a metric, a parameter or a buffer is not finite, or a quantizer's step has collapsed.
        """
        means = {f"train/{name}": float(value) / self.steps_seen for name, value in self.losses_seen.items()}
        epoch = f"in epoch {self.current_epoch}"
        for called, what in ((self.steps_seen, "backward"), (self.updates_seen, "update")):
            if not called:
                raise RunFailed(f"{self.name}.step has never called run.{what}() {epoch}, so nothing was trained")
        for name, value in means.items():
            if not math.isfinite(value):
                raise Diverged(f"diverged: {name} is {value} {epoch}")
        for name, module in self.net.named_modules():
            wrong = finite_state(module) if isinstance(module, Quantizer) else None
            if wrong:
                raise Diverged(f"diverged: {wrong} in {name} {epoch}")
        state = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([v.isfinite().all() for v in state.values()]).tolist()  # the device is asked once
        if not all(finite):
            name = list(state)[finite.index(False)].removeprefix("net.")
            raise Diverged(f"diverged: {name} is not finite {epoch}")
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"diverged: {name} is {value} {epoch}")
        return means

    def update(self, run: Run) -> None:
        """See `Run.update`."""
        with torch.no_grad():
            for member in self.members:
                member.before_update(run)
        if self.spec.clip is not None:
            nn.utils.clip_grad_norm_((p for p in self.parameters() if p.grad is not None), self.spec.clip)
        run.opt.step()
        self.updates_seen += 1
        with torch.no_grad():
            for quantizer in self._quantizers:
                quantizer.project()
            if hasattr(self, "ema"):
                _follow(self.ema, self.net)
            for member in self.members:
                member.after_update(run)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer: the network's groups as the method says, then the chain's own parameters."""
        spec = self.spec
        groups = self.param_groups(self.net)
        known = {id(p) for group in groups for p in group["params"]}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        if own:
            groups.append({"params": own, "lr_scale": 1.0, "weight_decay": None})
        for group in groups:
            group["weight_decay"] = spec.weight_decay if group["weight_decay"] is None else group["weight_decay"]
        fused = self.device.type in ("cpu", "cuda")
        if spec.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=fused)
        kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=spec.lr, fused=fused)

    def on_fit_start(self) -> None:
        """Make the run and bring the teacher to the device."""
        for net in self._float_teacher:
            net.to(self.device)
        self.run_in_progress = Run(self)
        self.scope.epochs = sum(stage.epochs for stage in self._stages)
        self.scope.steps = self.scope.epochs * self.data.steps

    def _stage(self, epoch: int) -> tuple[Stage, int]:
        """The stage of an epoch, and how many epochs of it have passed."""
        for stage in self._stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        return self._stages[-1], self._stages[-1].epochs

    def on_train_epoch_start(self) -> None:
        """Reseed everything from (seed, epoch), so that a resumed run draws what an uninterrupted one draws."""
        run, epoch = self.run_in_progress, self.current_epoch
        stage, passed = self._stage(epoch)
        torch.manual_seed(seed_for("epoch", self.spec.seed, epoch))
        self.data.epoch, self.data.sampler = epoch, stage.sampler
        self.scope.epoch, self.scope.step = epoch, epoch * self.data.steps
        self.losses_seen, self.steps_seen, self.updates_seen = {}, 0, 0
        run.opt = self.optimizers()
        with torch.no_grad():
            if passed == 0:
                for member in self.members:
                    member.start(run, stage)
            for member in self.members:
                member.epoch_start(run)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate, and hand the step to the outermost method."""
        run = self.run_in_progress
        run.batch = batch
        stage, passed = self._stage(self.current_epoch)
        done = (passed * self.data.steps + batch_idx) / max(stage.epochs * self.data.steps, 1)
        lr = self.spec.lr * stage.lr * schedule(self.spec.schedule, done)
        for group in run.opt.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.step(run)
        self.scope.step += 1

    def use(self, batch: Batch) -> Tensor:
        """The prediction that a run measures: the network's logits (float [B, outputs]) in the run's own precision."""
        self.scope.domain, self.scope.labels, self.scope.track = batch.domain, None, False
        with self._autocast():
            return self.predict(self.net, batch)

    def _evaluate(self, batch: Batch, domain: str) -> None:
        logits = self.use(batch)
        if domain not in self._meters:
            self._meters[domain] = self.task.meter(self.device)
        self._meters[domain].update(logits, batch.y)

    def on_validation_epoch_start(self) -> None:
        """Fresh meters."""
        self._meters: dict[str, Any] = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch of one validation domain."""
        self._evaluate(batch, self.data.val_domains[dataloader_idx])

    def on_validation_epoch_end(self) -> None:
        """Metrics of the validation split, to `metrics` and to every method of the chain."""
        self.metrics = combine({domain: meter.compute() for domain, meter in self._meters.items()}, "val")
        if self.trainer.state.fn == TrainerFn.FITTING:  # `trainer.training` is False while Lightning validates
            for member in self.members:
                member.validated(self.run_in_progress, self.metrics)

    def on_test_epoch_start(self) -> None:
        """Fresh meters."""
        self._meters = {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch of one test domain."""
        self._evaluate(batch, self.test_domains[dataloader_idx])

    def on_test_epoch_end(self) -> None:
        """Leave what was measured in `tested`, domain -> metrics, and in `per_class`, domain -> recall of each class."""
        self.tested = {domain: meter.compute() for domain, meter in self._meters.items()}
        self.per_class = {domain: meter.per_class() for domain, meter in self._meters.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The plan and the spec travel with the weights, as plain types, and rebuild the surgery."""
        checkpoint["qatbench"] = {
            "spec": self.spec.model_dump(mode="json"),
            "plan": {name: list(bits) for name, bits in self.bit_plan.items()},
        }


class Wrapper(Method):
    """Adds to any other method; what it does not override is the inner method's.

    ``replace``, ``taps``, ``prepare`` and the hooks (``start`` to ``validated``) are called on every member of a chain, so a
    wrapper overrides them without calling the inner method's; everything else it overrides may call ``self.inner``.

    Args:
        inner: The method that is wrapped; it may be a wrapper itself.
        params: The wrapper's own settings.
    """

    default_inner: ClassVar[str | None] = None
    """What it wraps when it is named alone."""
    changes_net = False

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(params)
        self.inner = inner
        self.trains, self.bits, self.views = inner.trains, inner.bits, max(self.views, inner.views)
        self.first_last = inner.first_last
        self.weights_only = self.weights_only or inner.weights_only

    @property
    def members(self) -> list[Method]:
        """The inner method's members, then this wrapper."""
        return [*self.inner.members, self]

    @property
    def candidates(self) -> Sequence[int]:
        """The inner method's."""
        return self.inner.candidates

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """The inner method's."""
        return self.inner.plan(sites, bits, probe)

    def harm(self, sites: Sequence[Site], widths: Sequence[int], probe: Probe) -> dict[str, dict[int, float]]:
        """The inner method's."""
        return self.inner.harm(sites, widths, probe)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's."""
        return self.inner.weight_quantizer(bits, site, scope)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's."""
        return self.inner.act_quantizer(bits, site, scope)

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """The inner method's."""
        return self.inner.param_groups(net)

    def stages(self, epochs: int) -> list[Stage]:
        """The inner method's."""
        return self.inner.stages(epochs)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's."""
        return self.inner.losses(out, batch)

    def step(self, run: Run) -> None:
        """The inner method's."""
        self.inner.step(run)

    def predict(self, net: nn.Module, batch: Batch) -> Tensor:
        """The inner method's."""
        return self.inner.predict(net, batch)

    def deploy(self, run: Run) -> nn.Module:
        """The inner method's."""
        return self.inner.deploy(run)

    def skip(self, task: Task) -> str | None:
        """The inner method's reason; or that there is no training to add to."""
        if not self.inner.trains:
            return f"{self.inner.name} does not train, so {self.name} has nothing to add to"
        return self.inner.skip(task)


@dataclass
class Parts:
    """What `bench.assemble` hands to `Method.attach`."""

    spec: RunSpec
    task: Task
    scope: Scope
    probe: Batch
    sites: list[Site]
    plan: dict[str, Bits]
    float_net: nn.Module


def schedule(kind: str, done: float) -> float:
    """Factor on the learning rate when a share ``done`` (0 to 1) of a stage's steps has passed."""
    if kind == "cosine":  # without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983), to zero
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if kind == "step":
        return 0.1 ** ((done >= 0.6) + (done >= 0.8))
    return 1.0


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@contextlib.contextmanager
def _not_tracking(net: nn.Module) -> Iterator[None]:
    # Their own switch, not the momentum: with momentum 0 a BatchNorm still counts batches.
    batch = [m for m in net.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    # In training an InstanceNorm moves its statistics whatever its switch says; it does not need them to compute.
    instance = [
        (m, m.running_mean, m.running_var) for m in net.modules() if isinstance(m, _INSTANCE_NORMS) and m.training
    ]
    try:
        for norm in batch:
            norm.track_running_stats = False
        for norm, _, _ in instance:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm in batch:
            norm.track_running_stats = True
        for norm, mean, var in instance:
            norm.running_mean, norm.running_var = mean, var


def _tracking(net: nn.Module, on: bool) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if on else _not_tracking(net)


def _forward(net: nn.Module, x: Tensor, tap_names: Iterable[str]) -> Out:
    taps: dict[str, Tap] = {}
    handles = [handle for name in tap_names for handle in _record(taps, name, net.get_submodule(name))]
    try:
        logits = net(x)
    finally:
        for handle in handles:
            handle.remove()
    return Out(logits, taps)


def _record(taps: dict[str, Tap], name: str, module: nn.Module) -> list[RemovableHandle]:
    """Hooks that leave the module's tap when it runs."""
    quantizer = module.act_quantizer if isinstance(module, QuantLayer) else None
    on_grid: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        on_grid.append(output)

    def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        step = None if quantizer is None else step_of(quantizer)
        taps[name] = Tap(output, on_grid.pop() if on_grid else None, step, inputs)

    handles = [module.register_forward_hook(record)]
    if quantizer is not None:  # called a second time it would cost as much again, and may draw other random numbers
        handles.append(quantizer.register_forward_hook(keep))
    return handles


def _follow(teacher: nn.Module, student: nn.Module) -> None:
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs.detach(), 1.0 - EMA_DECAY)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def has_effect(method: Method, net: nn.Module, replaced: Mapping[str, int]) -> str | None:
    """The name of the first member that claims to change the network and did not, or None.

    Args:
        method: The outermost method.
        net: The network after surgery.
        replaced: Member's name -> how many modules it replaced.
    """
    quantized = any(layer.weight_quantizer or layer.act_quantizer for _, layer in quant_layers(net))
    for member in method.members:
        places = type(member).weight_quantizer, type(member).act_quantizer
        quantizes = places != (Wrapper.weight_quantizer, Wrapper.act_quantizer)
        if member.changes_net and not replaced.get(member.name) and not (quantizes and quantized):
            return member.name
    return None


__all__ = ["FLOAT_BITS", "Method", "Out", "Parts", "Probe", "Run", "Stage", "Tap", "Wrapper", "has_effect", "schedule"]
