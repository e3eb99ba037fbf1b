"""A codebook: a few values, fitted to a tensor's distribution, of which every element takes the nearest."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..site import Site
from ..spec import Frozen
from .quantizer import Decode, Quantizer, Scope, snap

SMALLEST = 1e-6  # size of the entries of a tensor that is zero everywhere
DEAD = 1e-3  # an entry is dead below this share of the weights that each entry would have if all had equally many
LLOYD = 25  # iterations of init="kmeans"


class CodebookParams(Frozen):
    """Where a codebook starts and how it follows the weights."""

    init: Literal["quantile", "uniform", "kmeans", "random"] = Field(
        "quantile", description="where the codebooks start"
    )
    levels: Literal["2^b-1", "2^b"] = Field("2^b-1", description="codebook entries; 2^b: one more above zero")
    symmetric: bool = Field(False, description="start both signs from the quantiles of |w|")
    grid: Literal["middle", "inner"] = Field(
        "middle", description="quantiles: (2k-1)/(2m), the medians of m equal shares, or k/(m+1)"
    )
    update: Literal["ema", "entries", "static"] = Field(
        "ema",
        description="ema: mean of the weights at an entry and of their number, as in VQ-VAE; entries: of the entry itself",
    )
    decay: float = Field(0.99, ge=0, le=1, description="decay of the moving average, an update")
    dead_after: int = Field(1000, ge=1, description="steps with next to no weights after which an entry is moved")
    clip: float = Field(
        0.0, ge=0, le=100, description="no gradient for weights beyond this multiple of the largest entry; 0: for all"
    )


class Codebook(Quantizer):
    """``w_q = c_k`` for the nearest entry ``c_k`` of a sorted codebook, one a layer; the gradient passes straight through.

    One entry is exactly 0. A code is an entry's place in the codebook, from 0. Entries are no parameters: no gradient reaches
    them, they follow the weights by `follow`.

    Args:
        bits, site, scope: See `Quantizer`.
        params: How it starts and how it follows the weights.
        seed: Of ``init="random"``.
    """

    codebook: Tensor
    """Float [M], strictly increasing."""
    count: Tensor
    """Float [M], the moving average N of how many weights are at each entry."""
    idle: Tensor
    """int64 [M], for how many steps an entry has been dead."""

    def __init__(self, bits: int, site: Site, scope: Scope, params: CodebookParams, seed: int = 0) -> None:
        super().__init__(bits, site, scope, signed=False)
        self.params, self.seed = params, seed
        self.below = 2 ** (bits - 1) - 1
        self.above = self.below + (params.levels == "2^b")
        entries = self.below + 1 + self.above
        self.qmax = entries - 1
        self.register_buffer("codebook", torch.arange(-self.below, self.above + 1, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(entries))
        self.register_buffer("idle", torch.zeros(entries, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """The codebook at its start: entries from the positive and from the negative weights, and 0 between them.

        A sign without weights mirrors the other.
        """
        w = x.detach().float().flatten()
        positive, negative = w[w > 0], -w[w < 0]
        if self.params.symmetric:
            positive = negative = w[w != 0].abs()
        either = positive if len(positive) else negative if len(negative) else w.new_tensor([SMALLEST])
        rng = torch.Generator().manual_seed(self.seed)
        above = self._start(positive if len(positive) else either, self.above, rng)
        below = self._start(negative if len(negative) else either, self.below, rng)
        self.codebook.copy_(in_order(torch.cat([-below, w.new_zeros(1), above])))
        self.idle.zero_()
        if self.params.init == "kmeans":
            for _ in range(LLOYD):
                self.follow(w, 0, decay=0.0)
        self.count.copy_(self._counts(self._codes(w)))

    def _start(self, sizes: Tensor, m: int, rng: torch.Generator) -> Tensor:
        """``m`` positive entries for one sign, from the sizes of its weights; unsorted if random."""
        k = torch.arange(1, m + 1, device=sizes.device)
        if self.params.init == "uniform":
            return sizes.max() * (k / m)
        if self.params.init == "random":
            return sizes.max() * torch.rand(m, generator=rng).to(sizes.device)
        return quantiles(sizes, (2 * k - 1) / (2 * m) if self.params.grid == "middle" else k / (m + 1))

    def _codes(self, x: Tensor) -> Tensor:
        """The nearest entry of each weight; of the two at a midpoint, the lower."""
        middles = self.codebook[1:] / 2 + self.codebook[:-1] / 2
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):  # read in the order of memory
            return torch.bucketize(x.permute(0, 2, 3, 1), middles, out_int32=True).permute(0, 3, 1, 2)
        return torch.bucketize(x.contiguous(), middles, out_int32=True)

    def _counts(self, codes: Tensor) -> Tensor:
        return torch.bincount(codes, minlength=len(self.codebook)).float()

    def quantize(self, x: Tensor) -> Tensor:
        """Each weight's nearest entry."""
        values = self.codebook[self._codes(x.detach())]
        if self.params.clip:
            limit = self.params.clip * self.codebook.abs().max()
            x = x.clamp(-limit, limit)
        return snap(x, values)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Places in the codebook, and the look-up."""
        entries = self.codebook.clone()
        return self._codes(x.detach()), lambda codes: entries[codes]

    def constants(self) -> int:
        """The codebook's entries."""
        return len(self.codebook)

    @torch.no_grad()
    def follow(self, weight: Tensor, steps: int, decay: float | None = None) -> None:
        """Move the codebook towards the weights, ``steps`` optimizer steps after the last time.

        With ``n_k`` and ``u_k`` the number and the sum of the weights at entry k: ``N <- g N + (1-g) n``, ``U <- g U + (1-g) u``,
        ``c = U / N``. As ``U = N c`` before, ``c <- c + r (u/n - c)`` with ``r = (1-g) n / N``: U need not be kept, and an entry
        goes a part of the way to the mean of its own weights, so the order stays and the squared error of the same weights only
        falls. ``update="entries"``: ``r = 1-g``. An entry without weights, and 0, stay.
        """
        decay = self.params.decay if decay is None else decay
        w = weight.detach().float().flatten()
        codes = self._codes(w)
        n = self._counts(codes)
        mean = torch.bincount(codes, w.double(), minlength=len(n)) / n.clamp(min=1)
        self.count.lerp_(n, 1 - decay)
        rate = (
            (1 - decay) * n / self.count.clamp(min=1e-30)
            if self.params.update == "ema"
            else torch.full_like(n, 1 - decay)
        )
        moves = (n > 0) & (self.codebook != 0) & mean.isfinite()
        goal = torch.where(moves, mean.float(), self.codebook)
        self.codebook.copy_(in_order(self.codebook.lerp(goal, rate.clamp(max=1))))
        dead = (self.count < DEAD * len(w) / len(n)) & (self.codebook != 0)
        self.idle.copy_(torch.where(dead, self.idle + steps, 0))
        if bool((self.idle >= self.params.dead_after).any()):
            self._revive(w, codes, n)

    def _revive(self, w: Tensor, codes: Tensor, n: Tensor) -> None:
        """Put the entry that is dead for longest into the middle of the fullest bin, and share that bin's count with it."""
        fullest = n.masked_fill(self.codebook == 0, 0).argmax()
        if n[fullest] < 2:
            return  # fewer weights than entries: there is nothing to share
        entry = self.idle.argmax()
        self.codebook[entry] = w[codes == fullest].median()
        self.count[fullest] /= 2
        self.count[entry] = self.count[fullest]
        self.idle[entry] = 0
        order = self.codebook.argsort()
        self.codebook.copy_(in_order(self.codebook))
        self.count.copy_(self.count[order])
        self.idle.copy_(self.idle[order])


def quantiles(values: Tensor, q: Tensor) -> Tensor:
    """Quantiles at ``q``, with linear interpolation; `torch.quantile` takes no more than 16 million values."""
    ordered = values.sort().values
    place = q * (len(values) - 1)
    low = place.floor().long()
    return ordered[low].lerp(ordered[(low + 1).clamp(max=len(values) - 1)], place - low)


def in_order(entries: Tensor) -> Tensor:
    """The entries sorted and strictly increasing, exactly one of them 0. float32 [M], one of them 0, in any order.

    Equal ones are moved away from zero, by the few units in the last place that leave room for a midpoint.
    """
    below, above = -entries[entries < 0], entries[entries > 0]
    return torch.cat([-_apart(below).flip(0), entries.new_zeros(1), _apart(above)])


def _apart(sizes: Tensor) -> Tensor:
    rank = 4 * torch.arange(len(sizes), dtype=torch.int32, device=sizes.device)
    as_int = sizes.sort().values.view(torch.int32)  # positive floats are in the order of their bits
    return ((as_int - rank).cummax(0).values + rank).view(torch.float32)


__all__ = ["Codebook", "CodebookParams", "in_order", "quantiles"]
