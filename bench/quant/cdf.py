"""Quantization in CDF space: a normal distribution's CDF makes a tensor uniform on [0, 1], where an even grid fits it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..site import Site
from .quantizer import Decode, Quantizer, Scope
from .uniform import round_ste

SMALLEST_STD = 1e-5  # of a tensor that is constant, or nearly so: the step stays above what counts as collapsed
MOMENTUM = 0.1  # of running statistics; BatchNorm's


class CdfQuantizer(Quantizer):
    """``x_q = (2 q - 1) alpha``, ``q = round(n Phi((x - mu) / sigma)) / n``, ``n = 2^m - 1``: 2^m levels in [-alpha, alpha].

    mu and sigma (unbiased) are those of the tensor at hand, in every pass, as for weights: nothing is fitted. The rounding's
    gradient passes straight through, so with constant statistics that of x is ``2 alpha phi(x)``, phi the normal density with
    this mu and sigma. Codes are 0 to n. A subclass with other statistics overrides `statistics`.

    Args:
        bits, site, scope: See `Quantizer`.
        alpha: Half the width of the levels' range; in units of sigma if ``relative``.
        through: Whether the gradient goes through mu and sigma, too.
        relative: Whether the range follows sigma, so that the tensor keeps its scale.
        surrogate: Whether the rounding has the gradient of EmaQ (arXiv 2606.04920v1, Eq. 11 and 12) instead of 1:
            ``S(psi) (1 - S(psi))`` with the logistic S and ``psi = 2 (frac(n y) - 1/2)``, from 0.197 to 1/4.
        unit: Whether the gradient is multiplied by ``sigma sqrt(2 pi)``, so that phi is at most 1 whatever the tensor's scale.
        steps: n, if it is not ``2^m - 1``; at most that.
    """

    fused: bool = True
    """Whether `place` is the CDF of the plain statistics, so that the gradient is known; else autograd finds it, through them."""
    alpha: Tensor

    def __init__(
        self,
        bits: int,
        site: Site,
        scope: Scope,
        alpha: float = 2.0,
        through: bool = False,
        *,
        relative: bool = False,
        surrogate: bool = False,
        unit: bool = False,
        steps: int | None = None,
    ) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.through, self.relative, self.surrogate, self.unit = through, relative, surrogate, unit
        self.rescales = not relative
        if through and (surrogate or unit):
            raise ValueError("surrogate and unit are for constant statistics; drop them, or through")
        self.qmax = self.qmax if steps is None else steps
        self.register_buffer("alpha", torch.tensor(alpha), persistent=False)

    @property
    def step(self) -> Tensor | None:
        """Spacing of the levels, ``2 alpha / n``; None where it follows the tensor at hand."""
        return None if self.relative else 2 * self.alpha / self.qmax

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, broadcastable to x (float32 or float64); here scalars."""
        return normal_fit(x)

    def measured(self) -> bool:
        """Whether the statistics are those of the tensor at hand, and not constants."""
        return True

    def groups(self) -> tuple[Tensor | None, int]:
        """Which samples are measured together, int64 [B] (None: all), and how many groups there are."""
        return None, 1

    def over_ranks(self) -> bool:
        """Whether the statistics are those of all ranks' tensors; a weight is the same on each."""
        return False

    def spread(self, std: Tensor) -> Tensor:
        """The deviation that the CDF is given, broadcastable to x."""
        return std

    def place(self, x: Tensor, mean: Tensor, spread: Tensor, reach: Tensor) -> Tensor:
        """Where x lies on the grid, 0 to n, not yet rounded: ``n Phi((x - mean) / spread)``."""
        return _place(x, mean, spread, self.qmax)

    def quantize(self, x: Tensor) -> Tensor:
        """On the levels."""
        y, through = _precise(x), self.through and self.measured()
        if not self.fused:
            mean, std = self.statistics(y)
            reach = self.alpha * std if self.relative else self.alpha
            return _value(round_ste(self.place(y, mean, self.spread(std), reach)), reach, self.qmax).to(x.dtype)
        mean, std = self.statistics(y.detach())
        reach = self.alpha * std if self.relative else self.alpha
        return _Projection.apply(y, mean, std, self.spread(std), reach, self, through).to(x.dtype)  # type: ignore[union-attr]

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n."""
        y = _precise(x.detach())
        mean, std = self.statistics(y)
        reach = (self.alpha * std if self.relative else self.alpha).detach().clone()
        codes = self.place(y, mean, self.spread(std), reach).round().int()
        return codes, lambda k: _value(k.to(y.dtype), reach, self.qmax)

    def extra_repr(self) -> str:
        """With alpha."""
        return f"{super().extra_repr()}, alpha={float(self.alpha):g}{' sigma' if self.relative else ''}"


class RunningCdfQuantizer(CdfQuantizer):
    """For activations: the batch's statistics while training, running averages in use; levels in ``+- alpha sigma``.

    The averages start at the probe's statistics, and move in training passes that may move statistics (`Scope.track`). With
    several domains there are statistics for each; an image of a domain unseen in training meets the mean of them all.

    Args:
        domains: How many training domains; 1: whatever the domain, one grid.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        bits: int,
        site: Site,
        scope: Scope,
        alpha: float = 2.0,
        through: bool = False,
        *,
        domains: int = 1,
        surrogate: bool = False,
        steps: int | None = None,
    ) -> None:
        super().__init__(bits, site, scope, alpha, through, relative=True, surrogate=surrogate, steps=steps)
        self.domains, self._rank = domains, 4
        self.per = "tensor" if domains == 1 else "domain"  # type: ignore[misc]
        self.register_buffer("mean", torch.zeros(domains) if domains > 1 else torch.zeros(()))
        self.register_buffer("std", torch.ones(domains) if domains > 1 else torch.ones(()))

    @property
    def step(self) -> Tensor:
        """Spacing of the levels in use, ``2 alpha sigma / n``; with several domains one for each sample of the batch in flight."""
        return 2 * self.alpha * self._of_samples(self.std, self._rank) / self.qmax

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Statistics of the probe."""
        self._move(*self._measure(_precise(x)), share=1.0)

    def measured(self) -> bool:
        """While training."""
        return self.training

    def groups(self) -> tuple[Tensor | None, int]:
        """The domains."""
        return (None if self.domains == 1 else self.scope.domain), self.domains

    def over_ranks(self) -> bool:
        """While training."""
        return self.training

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's while training, else the averages."""
        self._rank = x.ndim
        mean, std = self.mean, self.std
        if self.training:
            mean, std = self._measure(x)
            if self.scope.track:
                self._move(mean.detach(), std.detach(), MOMENTUM)
        return self._of_samples(mean, x.ndim), self._of_samples(std, x.ndim)

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each domain's part of the batch; NaN of one that is absent."""
        return normal_fit(x, *self.groups(), together=self.over_ranks())

    def _of_samples(self, values: Tensor, rank: int) -> Tensor:
        """Each sample's own value, [B, 1, ..]; a scalar with one domain."""
        domain = self.scope.domain
        if self.domains == 1:
            return values
        if domain is None:
            return values.mean()
        known = torch.cat([values, values.nanmean(0, keepdim=True)])  # -1, unseen in training, is the last
        return known[domain].view(-1, *(1,) * (rank - 1))

    def _move(self, mean: Tensor, std: Tensor, share: float) -> None:
        for ours, theirs in ((self.mean, mean), (self.std, std)):
            theirs = theirs.to(ours.dtype)
            ours.lerp_(torch.where(theirs.isnan(), ours, theirs), share)


class _Projection(torch.autograd.Function):
    """See `CdfQuantizer`. It keeps its input, which the layer before keeps anyway, and through the statistics its output, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, std: Tensor, spread: Tensor, reach: Tensor, how: CdfQuantizer, through: bool
    ) -> Tensor:
        out = _value(_place(x, mean, spread, how.qmax).round_(), reach, how.qmax)
        ctx.save_for_backward(x, mean, std, spread, reach, out if through and how.relative else None)
        ctx.how, ctx.groups = how, (*how.groups(), how.over_ranks()) if through else None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, std, spread, reach, out = ctx.saved_tensors
        how: CdfQuantizer = ctx.how
        bell = (x - mean).mul_(1 / (spread * math.sqrt(2))).square_().neg_().exp_()  # phi sigma sqrt(2 pi)
        factor = 2 * reach if how.unit else 2 * reach / (spread * math.sqrt(2 * math.pi))
        found = bell.mul_(grad).mul_(factor)
        if how.surrogate:
            found.mul_(surrogate_slope(_place(x, mean, spread, how.qmax)))
        if ctx.groups is not None:
            found = _through_statistics(found, grad, x, mean, std, out, *ctx.groups)
        return found, *(None,) * 6


def _through_statistics(
    direct: Tensor,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    out: Tensor | None,
    group: Tensor | None,
    groups: int,
    together: bool,
) -> Tensor:
    """The gradient of x with what comes through its mean and its unbiased deviation.

    With d the direct gradient, a group's mean has ``-sum d``, each sample's share of which is one n-th; its deviation has
    ``-sum d (x - mu) / sigma``, and with a range that follows it ``sum g x_q / sigma`` besides.
    """
    centred, apart = x - mean, group is not None
    deviation = -_dots(direct, centred, apart)
    if out is not None:
        deviation += _dots(grad, out, apart)
    index = torch.zeros(len(deviation), dtype=torch.int64, device=x.device) if group is None else group
    sums = x.new_zeros(groups, 3).index_add(
        0,
        index,
        torch.stack(
            [-_rows(direct, apart).sum(1), deviation, torch.full_like(deviation, x.numel() / len(deviation))], 1
        ),
    )
    of_mean, of_std, count = (ranks.sum_(sums) if together else sums).unbind(1)

    def of_samples(values: Tensor) -> Tensor:
        return values[0] if group is None else values[group].view(-1, *(1,) * (x.ndim - 1))

    slope = of_samples(of_std / (count - 1).clamp(min=1)) / std.square()
    return direct.add_(of_samples(of_mean / count)).addcmul_(centred, slope)


def surrogate_slope(place: Tensor) -> Tensor:
    """What EmaQ takes for the derivative of the rounding at a place on the grid (1 apart): Eq. 11 and 12."""
    logistic = torch.sigmoid(2 * (place - place.floor() - 0.5))
    return logistic * (1 - logistic)


def _place(x: Tensor, mean: Tensor, spread: Tensor, steps: int) -> Tensor:
    """``n Phi((x - mu) / sigma)``, not yet rounded."""
    v = (x - mean) / (spread * math.sqrt(2))
    if v.requires_grad:
        return (v.erf() + 1) * (steps / 2)
    return v.erf_().add_(1).mul_(steps / 2)


def _value(codes: Tensor, reach: Tensor, steps: int) -> Tensor:
    return (codes * (2 / steps) - 1) * reach


def normal_fit(
    x: Tensor, group: Tensor | None = None, groups: int = 1, together: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation, the latter at least 1e-5; differentiable.

    Args:
        x: float32 or float64 [B, ..].
        group: int64 [B], 0 to ``groups`` - 1, what is measured apart; None: all elements together.
        groups: How many.
        together: Over all ranks of a distributed run.

    Returns:
        Two scalars, or two tensors [groups], NaN where a group is absent.
    """
    rows = _rows(x, group is not None)
    if group is None:
        index, count = torch.zeros(len(rows), dtype=torch.int64, device=x.device), x.new_full((1,), float(x.numel()))
    else:
        index, count = group, torch.bincount(group, minlength=groups).to(x.dtype) * (x.numel() / len(x))

    def added(values: Tensor) -> Tensor:
        whole = values.new_zeros(groups).index_add(0, index, values)
        return ranks.total(whole) if together else whole

    size = x.detach().abs().amax().clamp(min=SMALLEST_STD)  # the squares of large values would overflow
    if together:
        count, size = ranks.sum_(count), ranks.sum_(size)
    mean = added(rows.mean(1) * rows.shape[1]) / count  # NaN where there is nothing
    centred = torch.addcmul(-(mean / size)[index][:, None], rows, 1 / size)
    var = added(torch.linalg.vecdot(centred, centred)) / (count - 1).clamp(min=1)
    std = (var.clamp(min=1e-30).sqrt() * size).clamp(min=SMALLEST_STD)
    std = torch.where(count > 0, std, torch.nan)
    return (mean[0], std[0]) if group is None else (mean, std)


def _rows(x: Tensor, apart: bool) -> Tensor:
    """[B, N], in the order of memory; of a vector [1, N], or [N, 1] if its elements are samples ``apart``."""
    if x.ndim == 1:
        return x[:, None] if apart else x[None]
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1)


def _dots(a: Tensor, b: Tensor, apart: bool) -> Tensor:
    """Inner product of each sample of a with that of b, [B]."""
    if b.ndim == 4:
        last = b.is_contiguous(memory_format=torch.channels_last)
        a = a.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return torch.linalg.vecdot(_rows(a, apart), _rows(b, apart))


def _precise(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 cannot tell 8 bits apart."""
    return x if x.dtype == torch.float64 else x.float()


__all__ = ["CdfQuantizer", "RunningCdfQuantizer", "normal_fit", "surrogate_slope"]
