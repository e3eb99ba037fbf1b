"""APoT: levels are sums of a few powers of two, and the range is a parameter (Li, Dong and Wang, ICLR 2020)."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, UniformQuantizer
from ..bench.quant.grid import grid_gradients
from ..bench.site import Site
from ..bench.spec import Frozen
from .pact import start_is_given

SMALLEST_CLIP = 1e-6
SMALLEST_STD = 1e-37  # of a weight; still a normal float32


def power_sets(bits: int) -> list[list[int]]:
    """The exponents e of the powers ``2^-e`` in each set; every set holds 0, too. A level is a sum of one term of each set.

    There are ``ceil(bits / 2)`` sets: with three powers each, which is two bits; but the last one of an odd width has one power.
    The powers 1/2, 1/4, 1/8, .. are dealt out to the sets in turn; the set of one bit is served in the second round. For 2 to 4
    bits these are the sets of Eq. 4, for 5 and 6 those of the authors' code, which ends there.
    """
    sets: list[list[int]] = [[] for _ in range((bits + 1) // 2)]
    exponent = itertools.count(1)
    for turn in range(3):
        for powers in sets[: bits // 2]:
            powers.append(next(exponent))
        if turn == 1 and bits % 2:
            sets[-1].append(next(exponent))
    return sets


def apot_levels(bits: int) -> Tensor:
    """The ``2^bits`` levels from 0 up, int64, as multiples of the smallest one; divided by the last they are in [0, 1]."""
    sets = power_sets(bits)
    smallest = max(map(max, sets))
    terms = ([0, *(2 ** (smallest - e) for e in powers)] for powers in sets)
    return torch.tensor(sorted(map(sum, itertools.product(*terms))))


class _ToLevels(torch.autograd.Function):
    """See `AdditivePowers`. It keeps its input and its output, which the layers before and after keep anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, quantizer: AdditivePowers) -> Tensor:
        cells = quantizer.cells(x)
        values = (quantizer.levels * alpha)[quantizer.nearest].to(x.dtype)
        values[-1] = torch.nan  # a run that has diverged must look it
        out = torch.empty_like(cells, dtype=x.dtype)
        # Cells are dense, in whatever layout, so both can be read in the order of memory: five times as fast as ``values[cells]``.
        torch.index_select(values, 0, _in_memory_order(cells), out=_in_memory_order(out))
        ctx.save_for_backward(x, alpha, out)
        ctx.quantizer = quantizer
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, alpha, out = ctx.saved_tensors
        low = -1.0 if ctx.quantizer.signed else -torch.inf
        inside, grad_alpha, _ = grid_gradients(grad, x, alpha, None, out, low, 1.0, False, (True, True, False))
        return inside if ctx.quantizer.clips else grad, grad_alpha.to(alpha.dtype), None


def _in_memory_order(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))


class AdditivePowers(Quantizer):
    """``x_q = alpha * nearest level of clip(x / alpha, 0, 1)`` with alpha a parameter; codes 0 to 2^b - 1 (Eq. 4 and 6).

    A signed input keeps one bit for the sign: it is clipped to [-1, 1], and codes are -(2^(b-1) - 1) to 2^(b-1) - 1. The gradient
    of alpha is ``sign(x)`` beyond alpha and ``(x_q - x) / alpha`` inside (Eq. 7), summed; that of x is 0 beyond alpha, 1 inside.

    All levels are multiples of ``1 / M``, so the nearest one follows from the cell ``floor(M x / alpha)`` by a look-up, without a
    search: halfway between two levels a cell begins, if M counts half units.
    """

    groups = {"alpha": (2.5, 1e-4)}  # noqa: RUF012  a rate of 0.1 beside the weights' 0.04, and its own decay (authors' code)
    clips = True
    """Whether x has no gradient beyond alpha."""
    levels: Tensor
    """Float [codes], the value of each code for alpha = 1."""
    nearest: Tensor
    """int64 [cells], place in ``levels``; the last cell is that of NaN."""

    def __init__(
        self, bits: int, site: Site, scope: Scope, signed: bool, init: float, rule: Literal["paper", "fit"]
    ) -> None:
        super().__init__(bits, site, scope, signed)
        self.qmin = -self.qmax if signed else 0
        self.init, self.rule = init, rule
        sizes = apot_levels(bits - signed)
        all_ = torch.cat([-sizes.flip(0)[:-1], sizes]) if signed else sizes
        self.units = 2 * int(sizes[-1])  # M
        cells = torch.arange(-self.units if signed else 0, self.units + 1)
        nearest = torch.bucketize(cells, all_[1:] + all_[:-1], right=True)
        self.register_buffer("levels", (all_.double() / sizes[-1]).float(), persistent=False)
        self.register_buffer("nearest", torch.cat([nearest, nearest.new_zeros(1)]), persistent=False)
        self.alpha = nn.Parameter(torch.tensor(init))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The paper's starting value, whatever the data; ``rule="fit"``: three times the root mean square of ``x``."""
        rms = x.detach().double().square().mean().sqrt().float()
        self.alpha.copy_(3 * rms if self.rule == "fit" and rms > SMALLEST_CLIP else torch.full_like(rms, self.init))

    def cells(self, x: Tensor) -> Tensor:
        """Cell of each element, int32."""
        cell = (x.detach().to(self.alpha.dtype) * (self.units / self.alpha.detach())).clamp_(
            -self.units if self.signed else 0, self.units
        )
        if self.signed:
            cell += self.units
        return cell.nan_to_num_(nan=len(self.nearest) - 1).int()

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest levels."""
        return _ToLevels.apply(x, self.alpha, self)  # type: ignore[return-value]

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """A code counts the levels from 0; its sign is that of ``x``."""
        values, qmin = self.levels * self.alpha.detach(), self.qmin
        return self.nearest[self.cells(x)].int() + qmin, lambda codes: values[codes - qmin]

    def constants(self) -> int:
        """The scale; the levels are shifts and additions."""
        return 1

    def project(self) -> None:
        """Keep alpha positive."""
        self.alpha.clamp_(min=SMALLEST_CLIP)


class NormalizedPowers(AdditivePowers):
    """The weight is first normalized, ``(w - mean) / std`` of the layer (sec. 2.4); mean and std are constants for the gradient.

    All weights have the full gradient, also those beyond alpha. With ``scale="std"`` the levels are multiplied by std: see `APoT`.
    """

    groups = {"alpha": (0.5, 1e-4)}  # noqa: RUF012  a rate of 0.02 beside the weights' 0.04
    clips = False

    def __init__(self, bits: int, site: Site, scope: Scope, init: float, scale: Literal["std", "none"]) -> None:
        super().__init__(bits, site, scope, True, init, "paper")
        self.scale = scale

    def _normalized(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The weight with mean 0 and variance 1, and its scale (scalar): std or 1."""
        exact = w.detach().double()  # the square of a large float32 is not finite
        std = exact.std(correction=min(1, exact.numel() - 1)).to(w.dtype)  # unbiased, as in the authors' code
        std = torch.where(std > SMALLEST_STD, std, 1.0)  # all weights may be alike
        return (w - exact.mean().to(w.dtype)) / std, std if self.scale == "std" else torch.ones_like(std)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest levels of the normalized weight."""
        normalized, scale = self._normalized(x)
        return super().quantize(normalized) * scale

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """See `AdditivePowers.encode`."""
        normalized, scale = self._normalized(x.detach())
        codes, decode = super().encode(normalized)
        return codes, lambda k: decode(k) * scale


class APoT(Method):
    """Additive powers-of-two quantization (Li et al. 2020, arXiv 1909.13144), after the authors' code for CIFAR.

    Departures. Scale: that code convolves with the normalized weight and leaves its scale to the BatchNorm that follows. Here
    training starts from a float network whose classifier has no norm, so the levels are multiplied by the weight's std again, a
    constant. Before a norm both forms train alike: the gradients of weight and alpha come out the same, too. The mean is not added
    again in either: 0 stays a level, and to a classifier's logits it would only add one number. ``scale="none"``: the code's form.

    First and last layer: their weights of 8 bits are uniform, as in the code, which leaves the inputs of both in float; here they
    have the run's bits, and an input with negative values has levels of both signs. Start: the code goes from float to 4 to 3 to 2
    bits, each from the one before; here every width starts from the float network, whose activations may be far below its alpha of
    8, so that alpha starts at a fit to the probe (``init="paper"``: at ``alpha``). Widths of 7 and 8 bits, which the paper does not
    have, follow `power_sets`.
    """

    name = "apot"
    version = 2  # 2: the range of activations starts at a fit to the probe; the unbiased deviation of weights
    paper = "Li, Dong and Wang, Additive powers-of-two quantization, ICLR 2020, arXiv 1909.13144"
    fidelity = "paper"

    class Params(Frozen):
        """Settings of APoT."""

        alpha: float = Field(
            8.0, gt=0, le=1000, description="starting range of the activations (code: 8 for CIFAR, 6 for ImageNet)"
        )
        weight_alpha: float = Field(
            3.0, gt=0, le=100, description="starting range of the weights, in standard deviations"
        )
        init: Literal["paper", "fit"] = Field(
            "fit", description="activations' range: fit to the probe, or alpha; paper where alpha is given"
        )
        scale: Literal["std", "none"] = Field(
            "std", description="std: weights keep their scale; none: they have variance 1, the paper"
        )

        @model_validator(mode="before")
        @classmethod
        def _alpha_is_meant(cls, values: Any) -> Any:
            return start_is_given(values)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Normalized; uniform in a first or last layer of 8 bits."""
        if site.edge and bits == 8:
            return UniformQuantizer(bits, site, scope, True)
        return NormalizedPowers(bits, site, scope, self.params.weight_alpha, self.params.scale)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Clipped at alpha."""
        return AdditivePowers(bits, site, scope, site.signed_input, self.params.alpha, self.params.init)
