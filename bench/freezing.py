"""Gradient disorder, how often a gradient changes its sign, and what is frozen by it; what FQAT and GAQAT share."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .seeds import seed_for
from .spec import Frozen

Signal = Literal["mean", "task", "flat", "boundary"]
Rule = Literal["top", "high", "low", "random", "all", "none", "alternate"]
Target = Literal["layer", "scale", "scale_task_grad", "scale_flat_grad", "flat_only"]
Refresh = Literal["step", "window"]


def share_frozen(kind: str, done: float, start: float, end: float) -> float:
    """The share phi_t of units that ``top`` freezes when a share ``done`` (0 to 1) of training has passed.

    ``constant``: ``end``; ``cosine``: from ``start`` to ``end`` along half a cosine.
    """
    return end if kind == "constant" else end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def how_many(share: float, of: int) -> int:
    """``floor(share * of)``; 0.29 of 100 are 29, although their product in floating point is less."""
    return math.floor(share * of + 1e-9)


def highest(score: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores (float [U]); the first of equals."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.argsort(descending=True, stable=True)[:count]] = True
    return mask


def frozen_by(rule: str, disorder: Tensor, threshold: float, count: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Which units a rule freezes (bool [U]), and how much it wants each of them (float [U], for `capped`).

    Args:
        rule: ``top``: the ``count`` most disordered; ``random``: as many at random; ``high``, ``low``: above, below the threshold.
        disorder: float [U].
        threshold: Of ``high`` and ``low``.
        count: Of ``top`` and ``random``.
        draw: float [U], random numbers.
    """
    score = {"low": -disorder, "random": draw}.get(rule, disorder)
    if rule in ("top", "random"):
        return highest(score, count), score
    if rule in ("high", "low"):
        return (disorder > threshold if rule == "high" else disorder < threshold), score
    return torch.full_like(disorder, rule == "all", dtype=torch.bool), score


def capped(mask: Tensor, score: Tensor, most: int) -> Tensor:
    """Of the units in ``mask`` the ``most`` with the highest score."""
    return mask & highest(score.masked_fill(~mask, -math.inf), most)


class FreezingParams(Frozen):
    """Settings of `Freezing`; K is ``window``."""

    signal: Signal = Field(
        "mean",
        description="which gradient is watched: the mean of g1 and g2, g1 (task), g2 (flat); boundary: the weights",
    )
    rule: Rule = Field("top", description="what is frozen, by disorder; alternate: nothing, g1 and g2 take turns")
    target: Target = Field("layer", description="what of it is frozen: everything, scales, or one gradient")
    fraction: float = Field(0.2, ge=0, le=1, description="of units that top and random freeze, at the end")
    fraction_start: float = Field(0.5, ge=0, le=1, description="the same at the start, where the schedule is a cosine")
    schedule: Literal["auto", "constant", "cosine"] = Field(
        "auto", description="of the fraction; auto: constant for target=layer, else cosine"
    )
    window: int = Field(100, ge=2, description="K: steps that disorder is measured over")
    refresh: Refresh = Field("step", description="when it is decided what is frozen: after each step, or each window")
    unfreeze: Literal["reeval", "duty", "never"] = Field(
        "reeval",
        description="reeval: decided anew each time; duty: K steps frozen, then K free; never: frozen for good",
    )
    high: float = Field(0.6, ge=0, le=1, description="threshold of the rule high")
    low: float = Field(0.3, ge=0, le=1, description="threshold of the rule low")
    warmup: float = Field(0.03, ge=0, le=1, description="share of training without freezing, but 2K steps at least")
    cap: float = Field(0.5, ge=0, le=1, description="share of units that is frozen at most")
    release: int = Field(5, ge=0, description="windows frozen in a row before a free one, for reeval alone; 0: no end")

    @model_validator(mode="after")
    def _has_thresholds(self) -> Self:
        if self.signal == "boundary" and self.rule in ("high", "low"):
            raise ValueError(
                f"rule {self.rule} has a threshold for the disorder of gradients, and signal boundary watches weights, "
                "whose score is 1 / bits at most; use rule top"
            )
        return self

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.kind() == "cosine" and self.fraction_start < self.fraction:
            raise ValueError(
                f"fraction_start {self.fraction_start} is below fraction {self.fraction}; the share must not grow"
            )
        return self

    def kind(self) -> str:
        """The schedule of the fraction, by name."""
        auto = "constant" if self.target == "layer" else "cosine"
        return auto if self.schedule == "auto" else self.schedule

    def first(self, steps: int) -> int:
        """The first step, from 0, in which anything may be frozen, of a run of ``steps``."""
        earliest = max(2 * self.window, math.ceil(self.warmup * steps))
        return earliest if self.refresh == "step" else math.ceil(earliest / self.window) * self.window

    def share(self, done: float) -> float:
        """The share of units that ``top`` and ``random`` freeze when a share ``done`` (0 to 1) of training has passed."""
        return share_frozen(self.kind(), done, self.fraction_start, self.fraction)


class Freezing(nn.Module):
    """The gradient disorder of every unit (a layer, or a scale), and which units are frozen; all of it in buffers.

    A unit has sources, its scales or its weights, and a source has elements. The disorder of an element is the share of successive
    steps between which its gradient changed sign; from 0 or to 0 is no change. A source's is the mean of its elements', a unit's of
    its sources'. It is the mean over the window of K steps under way (``refresh="window"``), or a moving average at the rate 1/K
    that starts as a plain mean (``refresh="step"``).

    A unit that showed no two successive signs in the last K steps, since its gradients were 0, has no disorder and is not chosen.

    Args:
        source: int64 [M], the source of each watched element.
        unit: int64 [S], the unit of each source.
        units: How many there are, U.
        params: Settings.
        seed: Of the rule ``random``.
    """

    source: Tensor
    sizes: Tensor
    of_unit: Tensor
    signs: Tensor
    net: Tensor
    gross: Tensor
    held: Tensor
    rest: Tensor
    disorder: Tensor
    """Float [U], 0 to 1."""
    settled: Tensor
    """Float [U]: the disorder of the last window that is complete, or the moving average as it is."""
    unheard: Tensor
    crossed: Tensor
    """Float [U]: how often task and flatness gradient have opposite signs (cross-disorder)."""
    frozen: Tensor
    """Bool [U]: what is frozen in the next step."""

    def __init__(self, source: Tensor, unit: Tensor, units: int, params: FreezingParams, seed: int) -> None:
        super().__init__()
        self.params, self.seed, self.units = params, seed, units
        sizes, of_unit = source.bincount(minlength=len(unit)), unit == torch.arange(units)[:, None]
        for name, value in (("source", source), ("sizes", sizes), ("of_unit", of_unit.float())):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("signs", torch.zeros(len(source), dtype=torch.int8))  # of the step before
        self.register_buffer("net", torch.zeros(len(source)))  # mean of g1 + g2
        self.register_buffer("gross", torch.zeros(len(source)))  # mean of |g1| + |g2|
        self.register_buffer("disorder", torch.full((units,), 0.5))
        self.register_buffer("settled", torch.full((units,), 0.5))
        self.register_buffer("unheard", torch.zeros(units, dtype=torch.int64))  # steps since two successive signs
        self.register_buffer("crossed", torch.zeros(units))
        self.register_buffer("frozen", torch.zeros(units, dtype=torch.bool))
        self.register_buffer("held", torch.zeros(units, dtype=torch.int64))  # steps in a row that it was frozen
        self.register_buffer("rest", torch.zeros(units, dtype=torch.int64))  # steps that it stays released

    def share(self, flags: Tensor) -> Tensor:
        """Float [U] of bool [M]: the mean over a unit's sources of the share of elements that are set. Counted, so exact."""
        counts = torch.zeros_like(self.sizes).index_add_(0, self.source, flags.long())
        return self.of_unit @ (counts / self.sizes) / self.of_unit.sum(1)

    def observe(self, step: int, task: Tensor, mean: Tensor) -> None:
        """Take in the gradients of a step.

        Args:
            step: From 0.
            task: g1 of the watched elements, float [M].
            mean: ``(g1 + g2) / 2`` of them, float [M].
        """
        window, flat = self.params.window, 2 * mean - task
        pairs = step % window if self.params.refresh == "window" else min(step, window)  # of successive steps
        if self.params.signal != "boundary":
            signs = {"mean": mean, "task": task, "flat": flat}[self.params.signal].sign().to(torch.int8)
            self.unheard.add_(1)
            if pairs:
                both = self.signs * signs
                self.disorder.lerp_(self.share(both < 0), 1 / pairs)
                self.unheard.masked_fill_(self.share(both != 0) > 0, 0)
            self.signs.copy_(signs)
            if self.params.refresh == "step" or pairs == window - 1:
                self.settled.copy_(self.disorder)
        rate = 1 / min(pairs + 1, window)
        self.crossed.lerp_(self.share(task.sign() * flat.sign() < 0), rate)
        self.net.lerp_(task + flat, rate)
        self.gross.lerp_(task.abs() + flat.abs(), rate)

    def stall(self) -> Tensor:
        """Float [M]: ``|sum(g1 + g2)| / sum(|g1| + |g2|)``; near 0 where two steady gradients hold each other."""
        return self.net.abs() / self.gross.clamp(min=torch.finfo(torch.float32).tiny)

    def deviation(self, step: int) -> Tensor | None:
        """Float [U]: ``(settled - 1/2) * 2 sqrt(n)``, in standard deviations of what coin flips would give one element.

        n is how many flips have a plain mean of this spread: K - 1 in a window. The moving average's variance, ``1 / 4K`` after the
        K flips of its plain mean, goes on as ``v <- (1 - 1/K)^2 v + 1 / 4K^2`` and comes to rest at ``n = 2K - 1``.

        Args:
            step: The step that was made, from 0.

        Returns:
            None where there is nothing to tell: before the first window is complete, and of weights.
        """
        n, K = step, self.params.window  # noqa: N806
        if self.params.signal == "boundary" or step < (K - 1 if self.params.refresh == "window" else 1):
            return None
        if self.params.refresh == "window":
            n = K - 1
        elif step > K:
            rest = 1 / (2 * K - 1)
            n = 1 / (rest + (1 / K - rest) * (1 - 1 / K) ** (2 * (step - K)))
        return (self.settled - 0.5) * (2 * math.sqrt(n))

    def refresh(self, step: int, steps: int) -> None:
        """Decide, after a step, what is frozen in the next one.

        Args:
            step: The step that was made, from 0.
            steps: How many there will be.
        """
        params, window, done = self.params, self.params.window, step + 1
        self.held.add_(1).mul_(self.frozen)
        self.rest.sub_(1).clamp_(min=0)
        if done < params.first(steps) or not self.units or (params.refresh == "window" and done % window):
            return
        longest = {"duty": window, "never": 0, "reeval": params.release * window}[params.unfreeze]
        if longest:
            self.rest.masked_fill_(self.frozen & (self.held >= longest), window)
        free = self.rest == 0
        kept = self.frozen & free if params.unfreeze != "reeval" else torch.zeros_like(free)
        out = ~free | (self.unheard >= window)
        mask, score = frozen_by(  # what is kept comes first, so that top and random count it
            params.rule,
            self.disorder.masked_fill(out, -1.0).masked_fill(kept, math.inf),
            params.low if params.rule == "low" else params.high,
            how_many(params.share(done / steps), self.units),
            self._draw(done // window).masked_fill(out, -1.0).masked_fill(kept, math.inf),
        )
        wanted, score = (mask & ~out) | kept, score.masked_fill(kept, math.inf)
        self.frozen.copy_(capped(wanted, score, how_many(params.cap, self.units)))

    def _draw(self, window: int) -> Tensor:
        """The random numbers of a window; drawn anew each step, ``random`` would freeze for shorter than the other rules do."""
        generator = torch.Generator().manual_seed(seed_for("freeze", self.seed, window))
        return torch.rand(self.units, generator=generator).to(self.disorder)
