"""FQAT: flat minima for quantized networks; layers whose gradients keep changing sign are frozen (Jiang et al. 2025)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.errors import RunFailed
from ..bench.freezing import Freezing, FreezingParams, how_many
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
    it is not perturbed, and watched all the same. Where one gradient is frozen (``target``) the other one moves the parameter, in
    full instead of by half. A layer without scales, as under DoReFa, is watched at up to 4096 fixed weights. A ``scale`` target
    freezes quantizer by quantizer where all scales are watched, else all of a layer's. Parameters outside a quantized layer and its
    norm never freeze.
    ``alternate`` (g1 for K steps, g2 for K steps) freezes nothing, and has no warm-up.

    ``top``, ``random`` and ``all`` freeze ``cap`` of the units at most, so ``all`` means up to half of them by default.

    Departures from what is known of the paper's runs: they have LSQ with a step for each output channel of a weight, its gradient's
    scale by the size of the whole tensor, which is ``fqat+lsq-channel``, and an input's step from 1.0 on; here any method's
    quantizers train as they do without FQAT. RFQuant's own quantizer (``lsq_rfq``), its optimizer for the scales alone
    (``scale_opt``) and a start in float (``fp_warmup_steps``) are not offered.

    Memory: one copy of the weights, as `SAGM`; for each watched element 17 bytes, and where it is a weight 8 more for each of its
    dimensions; with ``target="flat_only"`` a second gradient of the frozen layers besides.
    """

    name = "fqat"
    version = 3  # 3: what is frozen as a whole is not perturbed
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
        freeze_bn: bool = Field(
            False, description="whether a frozen layer's running statistics stand still, too; for target=layer"
        )

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
        units, steps, params = self.freezing.units, self.scope.steps, self.params
        if self.scope.step or params.rule in ("alternate", "none"):
            return
        if not units:
            log.warning("%s: there are no learned scales, so nothing is ever frozen: this is sagm", self.name)
            return
        first = params.first(steps)
        if first >= steps:
            log.warning(
                "%s: freezing never starts: it waits for %d steps (window=%d, warmup=%g) and the run has %d; %s",
                self.name, first, params.window, params.warmup, steps, self._sooner(steps),
            )  # fmt: skip
            return
        shares = {"cap": params.cap}
        if params.rule in ("top", "random"):
            shares["fraction"] = params.share(first / steps)  # it never grows
        for name, share in shares.items():
            if not how_many(share, units):
                log.warning(
                    "%s: nothing is ever frozen: %g of %d units are less than one; %s.%s=%.2g would do",
                    self.name, share, units, self.name, name, math.ceil(100 / units) / 100,
                )  # fmt: skip

    def _sooner(self, steps: int) -> str:
        """Which settings would let freezing start in a run of so many steps."""
        longest = min(self.params.window, (steps - 1) // 2)
        if longest < 2:
            return "train for longer"
        mend = [] if longest == self.params.window else [f"{self.name}.window={longest} or less would do"]
        if self.params.model_copy(update={"window": longest}).first(steps) >= steps:
            mend.append(f"lower {self.name}.warmup{' besides' if mend else ''}")
        return "; ".join(mend)

    # --- train ---------------------------------------------------------------------------------------------------------------

    def step(self, run: Run) -> None:
        """Two passes; gradients of what is frozen are taken out; one update; then what is frozen next."""
        if self.params.rule == "alternate":
            self._alternate(run)
            return
        frozen = [self.parts[u] for u in self.freezing.frozen.nonzero().flatten().tolist()]
        still = self.params.freeze_bn and self.params.target == "layer"  # else the norm and the weights go on moving
        norms = [unit.norm for unit in frozen if unit.norm is not None] if still else []
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

    def unperturbed(self) -> set[nn.Parameter]:
        """As `SAM`; and what is frozen as a whole."""
        if self.params.target not in ("layer", "scale"):
            return super().unperturbed()
        frozen = self.freezing.frozen.nonzero().flatten().tolist()
        return super().unperturbed() | {p for u in frozen for p in self.parts[u].held}

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
        """One line at the end of an epoch; z in standard deviations of coin flips, where it is known."""
        now, scope = self.freezing, self.scope
        if not now.units or (scope.step + 1) % max(scope.steps // max(scope.epochs, 1), 1):
            return
        z = now.deviation(scope.step)
        disorder = now.disorder if z is None else now.settled
        values = [now.crossed.mean(), now.stall().mean(), *disorder.aminmax(), *(() if z is None else z.aminmax())]
        crossed, stall, low, high, *ends = torch.stack(values).tolist()
        log.info(
            "%s: disorder %.3f to %.3f%s, cross-disorder %.3f, stall index %.3f, frozen %d of %d",
            self.name, low, high, " (z {:.1f} to {:.1f})".format(*ends) if ends else "", crossed, stall,
            int(now.frozen.sum()), now.units,
        )  # fmt: skip
