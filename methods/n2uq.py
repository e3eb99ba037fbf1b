"""N2UQ: activations through learned thresholds onto evenly spaced levels, weights scaled filter by filter (Liu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Decode, Quantizer, Scope, snap
from ..bench.site import Site
from ..bench.spec import Frozen

SMALLEST = 1e-3  # of a width, as in the authors' code, and of the two scales
RANGE = 2.0  # the levels cover [0, 2], or [-1, 1] of a signed input
COVERED = 0.999  # share of a probe inside the range
MOST_CELLS = 2**14
CHUNK = 2**16  # elements worked on at once, on a CPU
LANES = 4  # sums a place: two additions in a row to one number would wait for each other


def edge_counter(edges: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that tells how many of the ``edges`` (increasing, the last infinite) are at most x: int32 [N] of float [N].

    For NaN it is all of them. This is `torch.bucketize`, whose binary search takes 13 ns an element. Cells of one width, each with
    one edge at most, take 2: the edges up to an element's cell are counted once, and the element is compared with that one edge.
    The edges' cells come out of the same arithmetic, so no rounding can put an element on the wrong side.
    """
    if edges.device.type == "cpu":  # elsewhere the search is fast, and reading the edges would wait for the device
        low, span = edges[0], edges[-2] - edges[0]
        cells = float(span / edges[:-1].diff().amin()) * 1.01 + 1
        per_unit = cells / span
        if cells <= MOST_CELLS and bool(
            per_unit.isfinite()
        ):  # edges of denormal size are too near for any number of cells
            last = int(cells) + 2  # the infinite edge has the last cell

            def cell_of(x: Tensor) -> Tensor:
                return x.sub(low).mul_(per_unit).clamp_(0, last).int()

            cell = cell_of(edges)
            upto = (
                torch.bincount(cell, minlength=last + 1).cumsum(0).to(edges)
            )  # float: the types of one operation agree
            edge = torch.full((last + 1,), -math.inf, dtype=edges.dtype).index_put((cell,), edges)

            def count(x: Tensor) -> Tensor:
                x = x.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
                cell = cell_of(x)
                return upto.index_select(0, cell).sub_(x.lt_(edge.index_select(0, cell))).int()

            return count
    return lambda x: torch.bucketize(x, edges, right=True, out_int32=True)


class GSTE(torch.autograd.Function):
    """The hard steps forward, and the generalized straight-through estimator backward (sec. 3.2).

    With ``u = beta1 x / unit``, widths a, ``e_j = start + a_1 + .. + a_j``, ``D = 2 / n`` and code k from 0 to n::

        out = beta2 unit (k D + offset),         k = how many thresholds T_j = (e_(j-1) + e_j) / 2 are at most u
        soft = (j - 1) D + (D / a_j) (u - e_(j-1))    in segment j, where e_(j-1) <= u < e_j;   0 to the left, 2 to the right

    The gradients are those of ``beta2 unit (soft + offset)``; beta2's is that of the hard steps. e and T alternate, so one look-up
    in ``e_0 < T_1 < e_1 < .. < T_n < e_n`` gives both code and segment. It keeps the input and one small integer an element, and
    works chunk by chunk, so that what lies between is still in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, widths: Tensor, beta1: Tensor, beta2: Tensor, unit: Tensor, offset: float
    ) -> Tensor:
        """x: float, any shape. widths: [n]. The others: scalars."""
        places = 2 * len(widths) + 3
        level = beta2 * unit * ((torch.arange(places, device=x.device) // 2).to(start) * (RANGE / len(widths)) + offset)
        level[-1] = math.nan  # of an input that is NaN or infinite: a run that has diverged must look it
        count = edge_counter(_edges(start, widths) * (unit / beta1))
        flat = _flat(x, x)
        out, place = torch.empty_like(flat), torch.empty_like(flat, dtype=torch.uint8 if places <= 256 else torch.int16)
        values = level.to(x.dtype)
        for x_part, out_part, place_part in _chunks(flat, out, place):
            found = count(x_part.to(start.dtype))
            torch.index_select(values, 0, found, out=out_part)
            place_part.copy_(found)
        ctx.save_for_backward(x, place, start, widths, beta1, beta2, unit, level)
        return _shaped(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Sums of g and of g x over each place, then a few numbers a segment."""
        x, place, start, widths, beta1, beta2, unit, level = ctx.saved_tensors
        n, places, slope = len(widths), len(level), RANGE / len(widths) / widths
        inside = torch.cat([slope.new_zeros(1), slope.repeat_interleave(2), slope.new_zeros(2)]) * (beta1 * beta2)
        flat, grad = _flat(x, x), _flat(grad, x)
        grad_x = torch.empty_like(flat)
        lane = (torch.arange(_chunk_size(x), device=x.device) % LANES * places).int()
        totals = torch.zeros(2, places, dtype=torch.float64, device=x.device)
        for x_part, g, place_part, grad_part in _chunks(flat, grad.to(start.dtype), place, grad_x):
            at = place_part.int()
            torch.mul(inside.index_select(0, at), g, out=grad_part)
            at += lane[: len(at)]
            for total, value in zip(totals, (g, g * x_part), strict=True):
                total += torch.bincount(at, value, LANES * places).view(LANES, places).sum(0)
        g0, g1 = totals[:, 1:-2].view(2, n, 2).sum(2)  # of g and of g x in each segment
        edge = start + widths.double().cumsum(0) - widths
        moved = slope * g0  # d soft / d e_(j-1), but for the sign; a_i moves the e of all later segments
        grad_widths = -(slope / widths * (beta1 / unit * g1 - edge * g0) + moved.flip(0).cumsum(0).flip(0) - moved)
        grad_beta1, grad_beta2 = beta2 * (slope * g1).sum(), totals[0, :-1] @ level[:-1].double() / beta2
        small = -beta2 * unit * moved.sum(), beta2 * unit * grad_widths, grad_beta1, grad_beta2
        return _shaped(grad_x, x), *(value.to(start.dtype) for value in small), None, None


def _edges(start: Tensor, widths: Tensor) -> Tensor:
    """``e_0, T_1, e_1, .., T_n, e_n`` and infinity, float [2n + 2]."""
    right = start + widths.cumsum(0)
    inner = torch.stack([right - widths / 2, right], 1).flatten()
    return torch.cat([start[None], inner, inner.new_full((1,), math.inf)])


def _flat(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which has the shape of ``like``, as [N] in the order in which ``like`` lies in memory."""
    return (value.permute(0, 2, 3, 1) if _channels_last(like) else value).reshape(-1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """The way back from `_flat`."""
    if _channels_last(like):
        return flat.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return flat.view(like.shape)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same part of each, one [N] chunk after the other."""
    return zip(*(t.split(_chunk_size(tensors[0])) for t in tensors), strict=True)


def _chunk_size(x: Tensor) -> int:
    return min(CHUNK, x.numel()) if x.device.type == "cpu" else x.numel()


class LearnedThresholds(Quantizer):
    """Thresholds are learned, levels stay even: see `GSTE`. Codes are 0 to n, or -(n+1)/2 to (n-1)/2 of a signed input.

    Learned are start, widths, beta1 and beta2: without weight decay, at a tenth of the learning rate, widths and scales at least
    1e-3. ``unit`` is fixed when the quantizer is fitted: 1 in the paper, see `N2UQ`.
    """

    groups = {name: (0.1, 0.0) for name in ("start", "widths", "beta1", "beta2")}  # noqa: RUF012
    unit: Tensor

    def __init__(
        self, bits: int, site: Site, scope: Scope, signed: bool, init: Literal["fit", "paper"] = "fit"
    ) -> None:
        super().__init__(bits, site, scope, signed)
        self.n, self.init = 2**bits - 1, init
        self.offset = -RANGE / 2 if signed else 0.0
        self.start = nn.Parameter(torch.tensor(self.offset))
        self.widths = nn.Parameter(torch.full((self.n,), RANGE / self.n))
        self.beta1, self.beta2 = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.register_buffer("unit", torch.ones(()))

    @property
    def step(self) -> Tensor:
        """Spacing of the levels: ``2 beta2 unit / n``."""
        return RANGE / self.n * self.beta2 * self.unit

    @property
    def thresholds(self) -> Tensor:
        """``T_1 < .. < T_n`` of the input, float [n]."""
        return _edges(self.start, self.widths)[1:-1:2] * (self.unit / self.beta1)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The range ends at the 99.9th percentile of ``|x|``, if ``init="fit"``."""
        size = x.detach().float().abs().flatten()
        edge = size.kthvalue(max(1, round(COVERED * size.numel()))).values
        edge = edge if edge > 0 else size.max()  # more than that may be zeros, after a ReLU
        if self.init == "fit" and edge > 0:
            self.unit.copy_(edge / (RANGE + self.offset))  # a signed input has levels on both sides

    def quantize(self, x: Tensor) -> Tensor:
        """See `GSTE`."""
        return GSTE.apply(x, self.start, self.widths, self.beta1, self.beta2, self.unit, self.offset)  # type: ignore[return-value]

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes from ``qmin`` to ``qmax``; a level is their multiple of the step, half a step more if the input is signed."""
        codes = torch.bucketize(
            x.detach().to(self.start.dtype).contiguous(), self.thresholds.detach(), right=True, out_int32=True
        )
        scale, n, low, offset = (self.beta2 * self.unit).detach(), self.n, self.qmin, self.offset
        return codes + low, lambda codes: scale * ((codes - low).to(scale.dtype) * (RANGE / n) + offset)

    def constants(self) -> int:
        """The thresholds and the step."""
        return self.n + 1

    def project(self) -> None:
        """Keep the thresholds increasing and the scales positive."""
        for parameter in (self.widths, self.beta1, self.beta2):
            parameter.clamp_(min=SMALLEST)


class FilterWeight(Quantizer):
    """``w_q = m (2 round(n u) / n - 1)``, ``u = (clip(w / m, -1, 1) + 1) / 2``, ``m = gamma <|w|>`` of each filter (sec. 3.3).

    ``gamma = (2^b - 1) / 2^(b-1)``. Codes are 0 to n. The gradient passes straight through, also where w is clipped. With
    ``grad="code"`` it is that of ``w / m``, the authors' code: m is a constant, and the gradient is 1 / m times as large.
    """

    per = "channel"

    def __init__(self, bits: int, site: Site, scope: Scope, grad: Literal["plain", "code"] = "plain") -> None:
        super().__init__(bits, site, scope, signed=False)
        self.grad, self.gamma = grad, self.qmax / 2 ** (bits - 1)

    def _scaled(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``w / m``, and m of each filter, [O, 1, ..]; a filter of zeros is not divided, and stays zero."""
        m = self.gamma * w.detach().abs().reshape(len(w), -1).mean(1).view(-1, *[1] * (w.ndim - 1))
        return w / torch.where(m > 0, m, 1.0), m

    def _codes(self, scaled: Tensor) -> Tensor:
        return ((scaled.detach().clamp(-1, 1) + 1) * (self.qmax / 2)).round()

    def _value(self, codes: Tensor, m: Tensor) -> Tensor:
        return (2 * codes / self.qmax - 1) * m

    def quantize(self, x: Tensor) -> Tensor:
        """Weights in [-m, m]."""
        scaled, m = self._scaled(x)
        return snap(scaled if self.grad == "code" else x, self._value(self._codes(scaled), m))

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n."""
        scaled, m = self._scaled(x.detach())
        return self._codes(scaled).int(), lambda codes: self._value(codes.to(m.dtype), m)

    def constants(self) -> int:
        """One scale a filter."""
        return self.site.channels[0]


class N2UQ(Method):
    """Nonuniform-to-uniform quantization (Liu et al. 2022, arXiv 2111.14826).

    Departures: the network's architecture stays (the paper's has the activation before the convolution, and a PReLU between two
    learned shifts before every quantizer). The paper starts with ``unit = 1``, so that the range is [0, 2] whatever the data; here
    training starts from a float network, and ``unit`` is fitted to the probe, which leaves input and output on one scale
    (``init="paper"``: the paper). An input with negative values, which the paper's first layer leaves in float, starts at -1 and
    has levels from -1 to 1. Weights: see `FilterWeight`; the authors' code makes their gradient 1 / m times as large, which Adam
    mostly undoes, while with SGD each filter would have another learning rate (``weight_grad="code"``).
    """

    name = "n2uq"
    paper = "Liu et al., Nonuniform-to-uniform quantization, CVPR 2022, arXiv 2111.14826"
    fidelity = "paper"
    first_last = "fp"

    class Params(Frozen):
        """Settings of N2UQ."""

        init: Literal["fit", "paper"] = Field(
            "fit", description="range of the activations: fit to the probe, or [0, 2]"
        )
        weight_grad: Literal["plain", "code"] = Field(
            "plain",
            description="gradient of the weights: straight through, or 1 / scale times as large (the authors' code)",
        )

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """A scale a filter."""
        return FilterWeight(bits, site, scope, self.params.weight_grad)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Learned thresholds."""
        return LearnedThresholds(bits, site, scope, site.signed_input, self.params.init)
