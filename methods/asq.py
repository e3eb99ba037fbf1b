"""ASQ + POST: a small module adapts the step to each image, and weights are powers of the square root of two (Zhou et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method, Run
from ..bench.quant import Decode, Quantizer, Scope, grid_codes, quant_layers, round_to_grid, snap
from ..bench.seeds import seed_for
from ..bench.site import Site, channel_dim
from ..bench.spec import Frozen
from .lsq import LearnedStep

HIDDEN = 16
LARGEST_CHANGE = 0.5  # of the step, relative: s_eff stays positive
SMALLEST_SCALE = 1e-8
LARGEST = 2.0**60  # of a feature, and of a weight over its scale in the scale's gradient: products stay finite


class AdaptiveStep(LearnedStep):
    """LSQ with ``s_eff = s (1 + Delta(x))``, one step a sample, from 0.5 s to 1.5 s.

    ``Delta = tanh(W2 relu(W1 f + b1) + b2) / 2`` of the features f: mean, standard deviation and maximum of each channel of the
    sample, which are constants for the gradient of x. W2 and b2 start at 0, so Delta does, too, and the quantizer starts as LSQ.
    The gradients of x and s_eff are LSQ's; those of s, W and b follow by the chain rule.
    """

    per = "sample"

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool, seed: int) -> None:
        super().__init__(bits, site, scope, signed, site.inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = nn.Sequential(
                nn.Linear(3 * max(site.in_channels, 1), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
            )
        for parameter in self.adapter[2].parameters():
            nn.init.zeros_(parameter)

    def steps(self, x: Tensor) -> Tensor:
        """``s_eff`` of each sample, float [B, 1, ..], in full precision whatever the run's.

        Tensors of another number of channels than the layer's, which no network has, keep the step s.
        """
        with torch.autocast(x.device.type, enabled=False):
            found = features(x.to(self.step.dtype))
            if found.shape[1] != self.adapter[0].in_features:
                delta = found.new_zeros(len(x), 1)
            else:
                delta = LARGEST_CHANGE * self.adapter(found).tanh()
            return (self.step * (1 + delta)).view(-1, *[1] * (x.ndim - 1))

    def quantize(self, x: Tensor) -> Tensor:
        """See `round_to_grid`."""
        return round_to_grid(x, self.steps(x), self, scale=self.grad_scale)

    def redo(self, x: Tensor) -> None:
        """Keeping it is cheaper."""

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``."""
        return grid_codes(x, self.steps(x), self)


@torch.no_grad()
def features(x: Tensor) -> Tensor:
    """Mean, standard deviation and maximum of each channel over all places: float [B, 3C] of [B, C, H, W], [B, T, C] or [B, C].

    With one place the deviation is 0. A vector counts as samples of one channel. They have no gradient.
    """
    x = x.unsqueeze(1) if x.ndim == 1 else x
    x = x.movedim(channel_dim(x), 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    mean = x.mean(2, keepdim=True)
    std = (x - mean).square_().mean(2).sqrt_()  # `torch.std` and, in channels_last, `amax` take five times as long
    return torch.cat([mean.squeeze(2), std, x.max(2).values], 1).clamp_(-LARGEST, LARGEST)


class RootTwoPowers(Quantizer):
    """POST: ``w_q = scale * sign(w) * sqrt(2)^k`` with k from ``-(n - 1)`` to 0, ``n = 2^(b-1) - 1``, or 0; one scale a channel.

    The exponent is the nearest in the logarithm of ``|w| / scale``; below half the smallest level the weight is 0. A code is the
    place of the level counted from 0, and has the sign of w. The gradient of w passes straight through. That of the scale is
    ``w_q / scale - w / scale``, summed over the N weights of the channel, times ``1 / sqrt(N n)`` as in LSQ (``grad="lsq"``).
    """

    per = "channel"
    groups = {"scale": (1.0, 0.0)}  # noqa: RUF012
    levels: Tensor
    """Float [2n + 1], the value of each code for scale 1."""
    edges: Tensor
    """Float [n], where the levels of ``|w| / scale`` change: half the smallest one, then the geometric means of neighbours."""

    def __init__(self, bits: int, site: Site, scope: Scope, grad: Literal["lsq", "plain"]) -> None:
        super().__init__(bits, site, scope, signed=True)
        self.qmin = -self.qmax  # symmetric
        weights = site.weights / site.channels[0]
        self.grad_scale = 1.0 if grad == "plain" else 1.0 / math.sqrt(weights * self.qmax)
        sizes = 2.0 ** (torch.arange(1 - self.qmax, 1, dtype=torch.float64) / 2)
        self.register_buffer("levels", torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes]).float(), persistent=False)
        self.register_buffer(
            "edges", torch.cat([sizes[:1] / 2, (sizes[1:] * sizes[:-1]).sqrt()]).float(), persistent=False
        )
        self.scale = nn.Parameter(torch.ones(site.channels[0]))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``0.9 max |w|`` of each channel."""
        largest = x.detach().float().abs().reshape(len(x), -1).amax(1)
        largest = largest if len(x) == len(self.scale) else largest.max()
        self.scale.copy_(torch.where(largest > 0, 0.9 * largest, 1.0))

    def _scale(self, w: Tensor) -> Tensor:
        """[O, 1, ..]. A tensor of another number of channels than the layer's, which no network has, has one scale."""
        scale = self.scale if len(w) == len(self.scale) else self.scale.amax(0, keepdim=True)
        return scale.view(-1, *[1] * (w.ndim - 1))

    def _codes(self, ratio: Tensor) -> Tensor:
        sizes = torch.bucketize(ratio.abs().contiguous(), self.edges, right=True, out_int32=True)
        return torch.where(ratio < 0, -sizes, sizes)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest levels."""
        scale = self._scale(x)
        ratio = (x / scale).detach()
        level = self.levels[self._codes(ratio) + self.qmax]
        slope = (level - ratio.clamp(-LARGEST, LARGEST)) * self.grad_scale
        return snap(x + scale * slope, level * scale)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes ``-n`` to n, and the look-up."""
        scale, levels, middle = self._scale(x).detach().clone(), self.levels, self.qmax
        return self._codes(x.detach() / scale), lambda codes: levels[codes + middle] * scale

    def constants(self) -> int:
        """One scale a channel; the levels are the same everywhere."""
        return len(self.scale)

    def project(self) -> None:
        """Keep the scales positive."""
        self.scale.clamp_(min=SMALLEST_SCALE)


class ASQ(Method):
    """Adaptive step size quantization and POST (Zhou et al. 2025, arXiv 2504.17263): our reconstruction.

    Only the abstract was available: activation steps that a trained module adapts to the input, and weights on a basis of the
    square root of two, decoded by a table. The module's form is that of a public re-implementation, which also freezes it at the
    start of training (``warmup``). Ours are: that it starts at Delta = 0 and hands no gradient to its input; the range and the zero
    of the weights' levels, their learned scales and the factor on the scales' gradient, without which (``scale_grad="plain"``)
    training goes astray at 2 bits. At 8 bits the levels reach further down than at 5 and are no closer, so the weights of a first
    or last layer of 8 bits, which shall lose next to nothing, have a learned step (LSQ).
    """

    name = "asq"
    paper = "Zhou et al., Precision neural network quantization via learnable adaptive modules, 2025, arXiv 2504.17263"
    version = 2
    fidelity = "reconstruction"

    class Params(Frozen):
        """Settings of ASQ."""

        warmup: float = Field(
            0.1, ge=0, le=1, description="share of training, at the start, in which the modules are frozen"
        )
        scale_grad: Literal["lsq", "plain"] = Field(
            "lsq",
            description="gradient of the weights' scales: times 1 / sqrt(N n), with N the weights of a channel, or as it is",
        )
        module_lr: float = Field(1.0, gt=0, le=100, description="factor on the learning rate of the modules")

    # A quarter of four epochs of ten steps.
    test_params = {"warmup": 0.25}  # noqa: RUF012

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """POST; a learned step in a first or last layer of 8 bits."""
        if site.edge and bits == 8:
            return LearnedStep(bits, site, scope, True, site.weights)
        return RootTwoPowers(bits, site, scope, self.params.scale_grad)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """A step a sample; unsigned after a ReLU."""
        return AdaptiveStep(bits, site, scope, site.signed_input, seed_for("asq", self.spec.seed, site.name))

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """The modules have a rate of their own; they decay as the network does."""
        modules = {id(p) for adapter in adapters(net) for p in adapter.parameters()}
        groups, own = super().param_groups(net), []
        for group in groups:
            own += [p for p in group["params"] if id(p) in modules]
            group["params"] = [p for p in group["params"] if id(p) not in modules]
        return [*groups, {"params": own, "lr_scale": self.params.module_lr, "weight_decay": None}]

    def frozen(self, run: Run) -> Collection[nn.Parameter]:
        """The modules in the warm-up."""
        if self.scope.step >= self.params.warmup * self.scope.steps:
            return ()
        return [p for adapter in adapters(run.net) for p in adapter.parameters()]


def adapters(net: nn.Module) -> list[nn.Module]:
    """The modules that adapt the steps of a network."""
    quantizers = (layer.act_quantizer for _, layer in quant_layers(net))
    return [quantizer.adapter for quantizer in quantizers if isinstance(quantizer, AdaptiveStep)]
