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

HIDDEN = 16  # of the bounded module
RATIO = 4  # of channels to hidden units
LARGEST_CHANGE = 0.5  # of the step, relative, by the bounded module
SMALLEST_FACTOR = 1e-8
SMALLEST_SCALE = 1e-8
PERCENTILE = 0.99  # of a channel's |w|, where its scale starts
LARGEST = 2.0**60  # of a feature: products stay finite
LARGEST_MEAN = 2.0**20  # the same where the gradient is not scaled down

Form = Literal["code", "bounded"]


class AdaptiveStep(LearnedStep):
    """LSQ with ``s_eff = s beta(x)``, one step a sample, where a small module makes beta of the input.

    ``code``: ``beta = max(relu(W2 relu(W1 m + b1) + b2), 1e-8)`` of the channels' means m, with a quarter as many hidden units as
    channels (below 8 channels without a hidden layer). W2 starts as N(0, 0.01) and b2 at 1, so beta starts near 1. x has a gradient
    through the module; LSQ's factor g is on the gradient of s alone.

    ``bounded``: ``beta = 1 + tanh(W2 relu(W1 f + b1) + b2) / 2`` of the features f: mean, deviation and maximum of each channel,
    which are constants for the gradient of x. W2 and b2 start at 0; s_eff is within 0.5 s and 1.5 s; g is on all gradients.
    """

    per = "sample"

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool, seed: int, form: Form = "code") -> None:
        super().__init__(bits, site, scope, signed, site.inputs)
        self.form, channels = form, max(site.in_channels, 1)
        self.channels = channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = nn.Sequential(*self._module(channels))
            last = self.adapter[-1]
            assert isinstance(last, nn.Linear)
            if form == "bounded":
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            else:
                nn.init.normal_(last.weight, std=0.01)
                nn.init.ones_(last.bias)

    def _module(self, channels: int) -> list[nn.Module]:
        if self.form == "bounded":
            return [nn.Linear(3 * channels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)]
        hidden = channels // RATIO if channels >= 2 * RATIO else 0
        return [nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 1)] if hidden else [nn.Linear(channels, 1)]

    def factor(self, x: Tensor) -> Tensor:
        """Beta of each sample, float [B, 1]; 1 for a tensor of other channels than the layer's, which no network has."""
        places = by_channel(x.to(self.step.dtype))
        if places.shape[1] != self.channels:
            return self.step.new_ones(len(places), 1)
        if self.form == "bounded":
            return 1 + LARGEST_CHANGE * self.adapter(features(places)).tanh()
        means = places.mean(2).clamp(-LARGEST_MEAN, LARGEST_MEAN)
        return self.adapter(means).relu().clamp(min=SMALLEST_FACTOR)

    def steps(self, x: Tensor) -> Tensor:
        """``s_eff`` of each sample, float [B, 1, ..], in full precision whatever the run's."""
        with torch.autocast(x.device.type, enabled=False):
            step = self.step if self.form == "bounded" else snap(self.step * self.grad_scale, self.step)
            return (step * self.factor(x)).view(-1, *[1] * (x.ndim - 1))

    def quantize(self, x: Tensor) -> Tensor:
        """See `round_to_grid`."""
        return round_to_grid(x, self.steps(x), self, scale=self.grad_scale if self.form == "bounded" else 1.0)

    def redo(self, x: Tensor) -> None:
        """Keeping it is cheaper."""

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``."""
        return grid_codes(x, self.steps(x), self)


def by_channel(x: Tensor) -> Tensor:
    """[B, C, places] of [B, C, H, W], [B, T, C] or [B, C]; a vector counts as samples of one channel."""
    x = x.unsqueeze(1) if x.ndim == 1 else x
    return x.movedim(channel_dim(x), 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)


@torch.no_grad()
def features(places: Tensor) -> Tensor:
    """Mean, standard deviation and maximum of each channel, float [B, 3C] of [B, C, places], without a gradient.

    With one place the deviation is 0.
    """
    mean = places.mean(2, keepdim=True)
    std = (places - mean).square_().mean(2).sqrt_()  # `torch.std` and, in channels_last, `amax` take five times as long
    return torch.cat([mean.squeeze(2), std, places.max(2).values], 1).clamp_(-LARGEST, LARGEST)


ScaleGrad = Literal["code", "lsq", "plain"]


class RootTwoPowers(Quantizer):
    """POST: ``w_q = scale * sign(w) * sqrt(2)^k`` with k from ``-(n - 1)`` to 0, ``n = 2^(b-1) - 1``, or 0; one scale a channel.

    A weight takes the nearest level, and has no gradient beyond the scale. A code is the place of the level counted from 0, and has
    the sign of w. The scale's gradient is ``w_q / scale - w / scale``, beyond the scale the sign of w, summed over the N weights of
    the channel, times ``1 / sqrt(N)`` (``grad="code"``), LSQ's ``1 / sqrt(N n)`` (``lsq``) or 1 (``plain``).
    """

    per = "channel"
    groups = {"scale": (1.0, 0.0)}  # noqa: RUF012
    levels: Tensor
    """Float [2n + 1], the value of each code for scale 1."""
    edges: Tensor
    """Float [n], where the levels of ``|w| / scale`` change: half the smallest one, then the middles of neighbours."""

    def __init__(self, bits: int, site: Site, scope: Scope, grad: ScaleGrad) -> None:
        super().__init__(bits, site, scope, signed=True)
        self.qmin = -self.qmax  # symmetric
        weights = site.weights / site.channels[0]
        self.grad_scale = {"plain": 1.0, "code": weights**-0.5, "lsq": (weights * self.qmax) ** -0.5}[grad]
        sizes = 2.0 ** (torch.arange(1 - self.qmax, 1, dtype=torch.float64) / 2)
        self.register_buffer("levels", torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes]).float(), persistent=False)
        middles = torch.cat([sizes[:1], sizes[1:] + sizes[:-1]]) / 2
        self.register_buffer("edges", middles.float(), persistent=False)
        self.scale = nn.Parameter(torch.ones(site.channels[0]))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The 99th percentile of ``|w|`` in each channel, between two weights by interpolation."""
        size = x.detach().abs().to(self.scale.dtype)
        size = size.reshape(len(self.scale) if len(x) == len(self.scale) else 1, -1).sort(1).values
        place = PERCENTILE * (size.shape[1] - 1)
        low = size[:, math.floor(place)]
        found = low.lerp(size[:, math.ceil(place)], place - math.floor(place))
        found = torch.where(found > 0, found, size[:, -1])  # nearly all may be zero
        self.scale.copy_(torch.where(found > 0, found, 1.0))

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
        inside = ratio.abs() <= 1
        slope = (level - torch.where(inside, ratio, 0.0)) * self.grad_scale
        return snap(torch.where(inside, x, x.detach()) + scale * slope, level * scale)

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
    """Adaptive step size quantization and POST (Zhou et al. 2025, arXiv 2504.17263): our reconstruction after public code.

    Of the paper the abstract was available: activation steps that a trained module adapts to the input, and weights on a basis of
    the square root of two, decoded by a table. All else is as in the public code SENGEL13/ASQ-POST, which calls itself official
    (who wrote it could not be verified): the module, its start and its gradient, one scale a channel for the weights, where it
    starts, and the nearest level by plain distance. First and last layer have 8 bits there, too.

    Departures: 2^b - 1 levels for b bits, where the code has ``2^b + 1``, and the basis sqrt 2, which the published file has as 2
    with the root in a comment; N in LSQ's factor for activations is the features of one image, as in `LSQ`, where the code counts
    the batch; steps and scales do not decay. Ours are ``adapter="bounded"``, with which no step can collapse or run away, and a
    ``warmup`` that freezes the modules (from a third party's code). At 8 bits the levels reach further down than at 5 and are no
    closer, so the weights of a first or last layer of 8 bits, which shall lose next to nothing, have a learned step (LSQ), as the
    classifier of the code does. Measured once (optdigits, w2a2, ResNet-8, six epochs, two seeds): 59.2 and 50.1 %, with the bounded
    module 55.9 and 47.9 %.
    """

    name = "asq"
    paper = "Zhou et al., Precision neural network quantization via learnable adaptive modules, 2025, arXiv 2504.17263"
    version = 3  # 3: module, gradients, start and levels' edges of the public code
    fidelity = "reconstruction"

    class Params(Frozen):
        """Settings of ASQ."""

        adapter: Form = Field(
            "code", description="the module: as in the public code, or with a factor on the step from 0.5 to 1.5"
        )
        warmup: float = Field(
            0.0, ge=0, le=1, description="share of training, at the start, in which the modules are frozen"
        )
        scale_grad: ScaleGrad = Field(
            "code",
            description="factor on the gradient of the weights' scales: 1 / sqrt(N), N the weights of a channel; lsq: "
            "1 / sqrt(N n), n the levels of a sign; plain: 1",
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
        return AdaptiveStep(
            bits, site, scope, site.signed_input, seed_for("asq", self.spec.seed, site.name), self.params.adapter
        )

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
