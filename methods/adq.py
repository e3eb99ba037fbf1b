"""ADQ: weights on a codebook of each layer's own that follows them, and more bits where quantizing hurts (Jia et al. 2025)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator

from ..bench.method import Method, Probe, Run
from ..bench.quant import Bits, Budget, Quantizer, Scope, UniformQuantizer, quant_layers
from ..bench.quant.allocate import Costs, allocate, closed_form, greedy, uniform
from ..bench.quant.codebook import Codebook, CodebookParams
from ..bench.quant.sensitivity import fisher, loss_rise, second_order, shares
from ..bench.seeds import seed_for
from ..bench.site import Site
from ..bench.spec import FLOAT_BITS
from .n2uq import LearnedThresholds

log = logging.getLogger("qatbench")

ALLOCATIONS = {"dp": allocate, "greedy": greedy, "closed": closed_form, "uniform": uniform}


class ADQ(Method):
    """Adaptive distribution-aware quantization (Jia et al. 2025, arXiv 2510.19760): our reconstruction.

    The body of the paper was not available. Known are its parts: activation thresholds that are learned (N2UQ, with G-STE), a
    codebook from the quantiles of the weights of each sign, with 0, that follows the weights by a moving average; bits by
    sensitivity; distillation as an option (here ``kd+adq``; in the recipe of N2UQ's code, ``kd.temperature=1`` and ``kd.weight=1``,
    the teacher's soft cross-entropy is the only loss). All else is ours: the quantiles, the form and rate of the average, and the
    plan by average Hessian trace and exact dynamic programming, after the same group's HMQAT and HAWQ-V2. First and last layer are
    in float by default; where the run asks for 8 bits there, their weights have an even grid, since a codebook of 255 entries can
    be larger than the layer.
    """

    name = "adq"
    paper = "Jia et al., Adaptive distribution-aware quantization for mixed-precision neural networks, 2025, arXiv 2510.19760"
    fidelity = "reconstruction"
    first_last = "fp"

    class Params(CodebookParams):
        """Settings of ADQ: of its codebooks, and of the plan under a budget."""

        period: int = Field(10, ge=1, description="optimizer steps between two updates of the codebooks")
        freeze: float = Field(
            0.1, ge=0, le=1, description="share of training, at the end, in which codebooks stay as they are"
        )
        sens: Literal["hessian", "hmqat", "fisher", "acc_drop"] = Field(
            "hessian", description="what decides a layer's bits"
        )
        probes: int = Field(50, ge=1, le=10_000, description="random vectors for the Hessian's traces")
        candidates: tuple[int, ...] = Field(
            (2, 3, 4), min_length=1, description="widths that a budget may be shared out in"
        )
        allocation: Literal["dp", "greedy", "closed", "uniform"] = Field(
            "dp", description="how a budget is shared out; uniform: the same width everywhere"
        )
        act_bits: Literal["round", "layer"] = Field(
            "round", description="activation bits under a budget: the run's, or those of the layer's own weight"
        )

        @field_validator("candidates")
        @classmethod
        def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if min(value) < 2 or max(value) > 8:
                raise ValueError(f"candidates {value} are not widths of 2 to 8 bits")
            return tuple(sorted(set(value)))

    test_params = {"period": 2, "freeze": 0.5, "dead_after": 4, "clip": 3.0, "decay": 0.9, "probes": 4}  # noqa: RUF012

    @property
    def candidates(self) -> Sequence[int]:
        """The setting of this name."""
        return self.params.candidates

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """As for every method; with ``act_bits="layer"`` an input of a budgeted run has the bits of its layer's weight."""
        plan = super().plan(sites, bits, probe)
        if self.params.act_bits == "layer" and isinstance(bits, Budget) and bits.a < FLOAT_BITS:
            return {name: Bits(width.w, width.w) for name, width in plan.items()}
        return plan

    def allocate(self, harm: Costs, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
        """By the rule that ``allocation`` names."""
        widths = ALLOCATIONS[self.params.allocation](harm, sizes, budget)
        parts = shares({name: harm[name][min(harm[name])] for name in widths})
        told = ", ".join(f"{name} {width} ({100 * parts[name]:.1f} %)" for name, width in widths.items())
        log.info("bits of each layer (and its share of the harm if all had the fewest): %s", told)
        return widths

    def harm(self, sites: Sequence[Site], widths: Sequence[int], probe: Probe) -> dict[str, dict[int, float]]:
        """The rise of the loss expected of each layer at each width, as ``sens`` says.

        ``hessian``: average Hessian trace x squared error of the weight (HAWQ-V2). ``fisher``: the same with squared gradients.
        ``hmqat``: trace x 4^-b, without a look at the weights. ``acc_drop``: measured, one layer at a time.
        """
        if self.params.allocation == "uniform":
            return {site.name: dict.fromkeys(widths, 0.0) for site in sites}
        loss, weights, quantized = probe.loss(self.task), probe.weights(sites), self.quantized(sites, probe)
        if self.params.sens == "acc_drop":
            return loss_rise(loss, probe.batch, weights, widths, quantized)
        if self.params.sens == "fisher":
            curvature = fisher(loss, probe.batch, weights)
        else:
            curvature = probe.hessian_traces(self.task, sites, self.spec.seed, self.params.probes)
        if self.params.sens == "hmqat":
            return {name: {b: max(trace, 0.0) * 4.0**-b for b in widths} for name, trace in curvature.items()}
        return second_order(curvature, weights, widths, quantized)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """A codebook; an even grid in a first or last layer of 8 bits."""
        if site.edge and bits == 8:
            return UniformQuantizer(bits, site, scope, True)
        quantizer = Codebook(bits, site, scope, self.params, seed_for("codebook", self.spec.seed, site.name))
        if quantizer.constants() > site.weights:
            log.warning(
                "%s has %d weights and at %d bits a codebook of %d entries, most of them unused; give it fewer bits",
                site.name, site.weights, bits, quantizer.constants(),
            )  # fmt: skip
        return quantizer

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Learned thresholds."""
        return LearnedThresholds(bits, site, scope, site.signed_input)

    def after_update(self, run: Run) -> None:
        """Every ``period`` steps, and until the last part of training, the codebooks follow the weights."""
        done, params = self.scope.step + 1, self.params
        if params.update == "static" or done % params.period or done > (1 - params.freeze) * self.scope.steps:
            return
        for _, layer in quant_layers(run.net):
            # A weight without a gradient has not moved: somebody has frozen the layer, and its codebook is a part of it.
            if isinstance(layer.weight_quantizer, Codebook) and layer.weight.grad is not None:
                layer.weight_quantizer.follow(layer.weight, params.period)
