"""FQAT: flat minima for quantized networks; layers whose gradients keep changing sign are frozen (Jiang et al. 2025)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.errors import RunFailed
from ..bench.freezing import Freezing, FreezingParams
from ..bench.method import Method, Run, Stage
from ..bench.quant import Quantizer, QuantLayer, quant_layers
from ..bench.quant.quantizer import step_of
from ..bench.seeds import seed_for
from ..bench.spec import FLOAT_BITS, Frozen
from ..bench.task import Task
from .sagm import SAGM, halve
from .sam import SAM

log = logging.getLogger("qatbench")

SAMPLE = 4096  # weights of a layer whose gradients are watched
OUTER = 0.375  # a weight further than this from the middle of its rounding bin, in steps, lies near its boundary

On = Literal["weight_scales", "scales", "weights"]


@dataclass
class Unit:
    """What is frozen together: a layer, or the scales of one of its quantizers.

    Attributes:
        watched: Parameters whose gradients are watched.
        held: Parameters that are frozen, or a gradient of theirs.
        layer: The layer.
        norm: The layer's own norm.
    """

    watched: list[nn.Parameter]
    held: list[nn.Parameter]
    layer: QuantLayer
    norm: nn.Module | None


def scales_of(quantizer: Quantizer | None) -> list[nn.Parameter]:
    """A quantizer's own parameters: steps, clipping levels, offsets."""
    return [] if quantizer is None else list(quantizer.parameters(recurse=False))


def near_boundary(layer: QuantLayer) -> Tensor:
    """Share of the latent weights that lie near the boundary of their rounding bin, over the bits (scalar); RFQuant's score."""
    quantizer = layer.weight_quantizer
    step = None if quantizer is None else step_of(quantizer)
    if quantizer is None or step is None:
        raise RunFailed("signal=boundary needs weights on a uniform grid in every layer; use signal=mean")
    v = layer.weight / step
    return ((v - v.round()).abs() > OUTER).float().mean() / quantizer.bits


class FQAT(SAGM):
    """Flatness-oriented QAT (Jiang et al. 2025, arXiv 2509.00859) around any method that trains: our reconstruction.

    The method section was not available. Recovered from the abstract and from reviews of its predecessor `GAQAT`: the update is
    SAGM's, on weights and scales; the gradient disorder of a layer is the share of successive steps between which the gradient of
    its scales changed sign; layers that it marks as unstable are frozen, chosen anew at each step. Not recovered: all thresholds,
    the window, which gradient is watched, what exactly is frozen, and all of FQAT's numbers. The defaults are ours, the other
    readings are settings; ``top``, its share and ``signal="boundary"`` follow the same group's RFQuant (arXiv 2401.01543).

    A frozen layer's parameters, their weight decay and their state in the optimizer stand still, since their gradients are None;
    it is watched all the same. Where one gradient is frozen (``target``) the other one moves the parameter, in full instead of by
    half. A layer without scales, as under DoReFa, is watched at up to 4096 fixed weights. A ``scale`` target freezes quantizer by
    quantizer where all scales are watched, else all of a layer's. Parameters outside a quantized layer and its norm never freeze.
    ``alternate`` (g1 for K steps, g2 for K steps) freezes nothing, and has no warm-up.

    Memory: one copy of the weights, as `SAGM`, and nine bytes for each watched element; with ``target="flat_only"`` a second
    gradient of the frozen layers besides.
    """

    name = "fqat"
    paper = (
        "Jiang et al., Quantization meets OOD: generalizable quantization-aware training from a flatness perspective, "
        "ACM MM 2025, arXiv 2509.00859"
    )
    fidelity = "reconstruction"

    class Params(SAGM.Params, FreezingParams):
        """Settings of FQAT."""

        on: On = Field(
            "weight_scales", description="what of a layer is watched; its weights where it has no such scales"
        )
        freeze_bn: bool = Field(False, description="whether a frozen layer's running statistics stand still, too")

    test_params = {"window": 2, "fraction": 0.4, "release": 1, "freeze_bn": True}  # noqa: RUF012

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        self.first_last = "fp"  # the paper's own

    # --- build ---------------------------------------------------------------------------------------------------------------

    def prepare(self, net: nn.Module) -> None:
        """Find what can be frozen, and make the buffers."""
        super().prepare(net)
        self.parts = list(self._units(net))
        sources = [(u, p) for u, unit in enumerate(self.parts) for p in unit.watched]
        self.watched = [(p, self._sample(p)) for _, p in sources]
        sizes = torch.tensor([len(places[0]) if places else p.numel() for p, places in self.watched], dtype=torch.int64)
        source = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        unit = torch.tensor([u for u, _ in sources], dtype=torch.int64)
        self.freezing = Freezing(source, unit, len(self.parts), self.params, self.spec.seed)
        if self.params.signal == "boundary":
            self._look_at_weights()

    def _units(self, net: nn.Module) -> Iterator[Unit]:
        norms = {site.name: site.norm for site in self.sites if site.kind == "layer" and site.norm is not None}
        for name, layer in quant_layers(net):
            if layer.weight_quantizer is None and layer.act_quantizer is None:
                continue
            norm = net.get_submodule(norms[name]) if name in norms else None
            of_weight, of_input = scales_of(layer.weight_quantizer), scales_of(layer.act_quantizer)
            watched = {"weight_scales": of_weight, "scales": of_weight + of_input, "weights": []}[self.params.on]
            watched = watched or [layer.get_parameter("weight")]
            if not self.params.target.startswith("scale"):
                norms_own = [] if norm is None else list(norm.parameters())
                yield Unit(watched, [*layer.parameters(), *norms_own], layer, norm)
            elif self.params.on == "scales":
                yield from (Unit(own, own, layer, norm) for own in (of_weight, of_input) if own)
            elif of_weight + of_input:
                yield Unit(watched, of_weight + of_input, layer, norm)

    def _sample(self, p: nn.Parameter) -> tuple[Tensor, ...] | None:
        """Where the elements that are watched lie, one index tensor a dimension; None: everywhere."""
        if p in self.of_quantizers:
            return None
        generator = torch.Generator().manual_seed(seed_for("watched", self.spec.seed, p.numel()))
        return torch.unravel_index(torch.randperm(p.numel(), generator=generator)[:SAMPLE].to(p.device), p.shape)

    def skip(self, task: Task) -> str | None:
        """As for every wrapper; or that there is nothing to freeze."""
        if tuple(self.inner.bits) == (FLOAT_BITS,):
            return f"{self.inner.name} has no quantizers, so {self.name} has nothing to freeze; use sagm"
        return super().skip(task)

    def start(self, run: Run, stage: Stage) -> None:
        """Say so if nothing will be frozen."""
        now, steps, window = self.freezing, self.scope.steps, self.params.window
        if self.scope.step or self.params.rule in ("alternate", "none"):
            return
        if not now.units:
            log.warning("%s: there are no learned scales, so nothing is ever frozen: this is sagm", self.name)
        elif now.first(steps) >= steps:
            fits = (steps - 1) // 2
            mend = f"{self.name}.window={fits} or less would do" if 2 <= fits < window else "train for longer"
            log.warning(
                "%s: freezing never starts: it waits for %d steps (window=%d) and the run has %d; %s",
                self.name, now.first(steps), window, steps, mend,
            )  # fmt: skip

    # --- train ---------------------------------------------------------------------------------------------------------------

    def step(self, run: Run) -> None:
        """Two passes; gradients of what is frozen are taken out; one update; then what is frozen next."""
        if self.params.rule == "alternate":
            self._alternate(run)
            return
        frozen = [self.parts[u] for u in self.freezing.frozen.nonzero().flatten().tolist()]
        norms = [unit.norm for unit in frozen if unit.norm is not None] if self.params.freeze_bn else []
        statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        run.backward()
        task, alone = self._watch(), self._second_pass(run, frozen)
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
            self.freezing.observe(self.scope.step, task, self._watch())
        for unit in frozen:
            for p in unit.held:
                p.grad = alone.get(p)
        run.update()
        with torch.no_grad():
            if self.params.signal == "boundary":
                self._look_at_weights()
            self.freezing.refresh(self.scope.step, self.scope.steps)
        self._report()

    def _alternate(self, run: Run) -> None:
        """A window of g1 alone, then one of g2 alone, and so on."""
        if self.scope.step // self.params.window % 2:
            SAM.step(self, run)
        else:
            run.backward()
            run.update()

    def _second_pass(self, run: Run, frozen: list[Unit]) -> dict[nn.Parameter, Tensor]:
        """Make all gradients ``(g1 + g2) / 2``; return the one that moves a parameter whose other gradient is frozen."""
        target = self.params.target
        apart = [] if target in ("layer", "scale") else [p for unit in frozen for p in unit.held]
        first = {p: p.grad for p in apart if p.grad is not None}
        alone: dict[nn.Parameter, Tensor] = {}
        with self.perturbed(run):
            for p in first:
                p.grad = None
            run.backward(track=False, add=True)
        for p, g1 in first.items():
            g2 = torch.zeros_like(p) if p.grad is None else p.grad
            alone[p], p.grad = g2 if target == "scale_task_grad" else g1, g1 + g2
        halve(run)
        return alone

    @torch.no_grad()
    def _watch(self) -> Tensor:
        """Gradients of all watched elements, float [M]; 0 where there is none."""
        found = [self.freezing.net.new_empty(0)]
        for p, places in self.watched:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            found.append(grad[places] if places else grad.reshape(-1))
        return torch.cat(found)

    @torch.no_grad()
    def _look_at_weights(self) -> None:
        for u, unit in enumerate(self.parts):
            self.freezing.disorder[u] = near_boundary(unit.layer)

    def _report(self) -> None:
        """One line at the end of an epoch."""
        now, scope = self.freezing, self.scope
        if not now.units or (scope.step + 1) % max(scope.steps // max(scope.epochs, 1), 1):
            return
        values = [*now.disorder.aminmax(), *now.deviation().aminmax(), now.crossed.mean(), now.stall().mean()]
        log.info(
            "%s: disorder %.3f to %.3f (z %.1f to %.1f), cross-disorder %.3f, stall index %.3f, frozen %d of %d",
            self.name, *torch.stack(values).tolist(), int(now.frozen.sum()), now.units,
        )  # fmt: skip
