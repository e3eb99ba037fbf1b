"""Quantization in CDF space: a normal distribution's CDF makes a tensor uniform on [0, 1], where an even grid fits it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..site import Site
from .quantizer import Decode, Quantizer, Scope
from .uniform import round_ste

SMALLEST_STD = 1e-5  # of a tensor that is constant, or nearly so: the step stays above what counts as collapsed
MOMENTUM = 0.1  # of running statistics; BatchNorm's


class CdfQuantizer(Quantizer):
    """``x_q = (2 q - 1) alpha``, ``q = round(n Phi((x - mu) / sigma)) / n``, ``n = 2^m - 1``: 2^m levels in [-alpha, alpha].

    mu and sigma (unbiased) are those of the tensor at hand, in every pass, as for weights: nothing is fitted. The rounding's
    gradient passes straight through, so with constant statistics that of x is ``2 alpha phi(x)``, phi the normal density with
    this mu and sigma. Codes are 0 to n. A subclass with other statistics overrides `statistics`, and `reach` if alpha follows them.

    Args:
        bits, site, scope: See `Quantizer`.
        alpha: Half the width of the levels' range.
        through: Whether the gradient goes through mu and sigma, too.
    """

    alpha: Tensor

    def __init__(self, bits: int, site: Site, scope: Scope, alpha: float = 2.0, through: bool = False) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.through = through
        self.register_buffer("alpha", torch.tensor(alpha), persistent=False)

    @property
    def step(self) -> Tensor:
        """Spacing of the levels, ``2 alpha / n``."""
        return 2 * self.alpha / self.qmax

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, broadcastable to x (float32 or float64); here scalars."""
        return normal_fit(x)

    def reach(self, std: Tensor) -> Tensor:
        """Half the width of the levels' range, broadcastable to x."""
        return self.alpha

    def quantize(self, x: Tensor) -> Tensor:
        """On 2^m levels."""
        place, reach = self._place(x)
        return self._value(round_ste(place), reach).to(x.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n."""
        place, reach = self._place(x.detach())
        fixed = reach.detach().clone()
        return place.round().int(), lambda codes: self._value(codes.to(place.dtype), fixed)

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``n Phi((x - mu) / sigma)``, not yet rounded, and the reach; float32 at least: bfloat16 cannot tell 8 bits apart."""
        x = _precise(x)
        mean, std = self.statistics(x if self.through else x.detach())
        return torch.special.ndtr((x - mean) / std) * self.qmax, self.reach(std)

    def _value(self, codes: Tensor, reach: Tensor) -> Tensor:
        return (2 * codes / self.qmax - 1) * reach


class RunningCdfQuantizer(CdfQuantizer):
    """For activations: the batch's statistics while training, running averages in use; levels in ``+- alpha sigma``.

    The averages start at the probe's statistics, and move in training passes that may move statistics (`Scope.track`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bits: int, site: Site, scope: Scope, alpha: float = 2.0, through: bool = False) -> None:
        super().__init__(bits, site, scope, alpha, through)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @property
    def step(self) -> Tensor:
        """Spacing of the levels, ``2 alpha sigma / n``, in use."""
        return 2 * self.alpha * self.std / self.qmax

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Statistics of the probe."""
        self._move(*normal_fit(_precise(x)), 1.0)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's while training, else the averages."""
        if not self.training:
            return self.mean, self.std
        mean, std = normal_fit(x)
        if self.scope.track:
            self._move(mean.detach(), std.detach(), MOMENTUM)
        return mean, std

    def reach(self, std: Tensor) -> Tensor:
        """``alpha sigma``."""
        return self.alpha * std

    def _move(self, mean: Tensor, std: Tensor, share: float) -> None:
        self.mean.lerp_(mean.to(self.mean.dtype), share)
        self.std.lerp_(std.to(self.std.dtype), share)


def normal_fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of all elements (scalars), the latter at least 1e-5; differentiable."""
    size = x.detach().abs().amax().clamp(min=SMALLEST_STD)  # the squares of large values would overflow
    std, mean = torch.std_mean(x / size, correction=min(1, x.numel() - 1))
    return mean * size, (std * size).clamp(min=SMALLEST_STD)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


__all__ = ["CdfQuantizer", "RunningCdfQuantizer", "normal_fit"]
