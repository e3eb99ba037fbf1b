"""AlignQ: tensors through their own CDF onto one grid, with the gradient of the CDF itself (Chen et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method, Out, Run
from ..bench.quant import CdfQuantizer, Quantizer, RunningCdfQuantizer, Scope
from ..bench.quant.cdf import SMALLEST_STD, normal_fit
from ..bench.seeds import seed_for
from ..bench.site import Site
from ..bench.spec import Frozen

if TYPE_CHECKING:
    from ..bench.data import Batch


def correlation(x: Tensor) -> Tensor:
    """How alike the samples of a batch are, float32 [B, B] of [B, ..]: ``z z^T / F``, z the F features standardised over the batch.

    A feature that is the same for all samples counts as zero.
    """
    x = x.float().flatten(1)
    centred = x - x.mean(0)
    z = centred / (centred.square().sum(0) / (len(x) - 1) + SMALLEST_STD**2).sqrt()
    return z @ z.T / x.shape[1]


def distortion(x: Tensor) -> Tensor:
    """D: what the CDF of x, by its own mean and deviation, changes in the correlation of the samples, float32 [B, B]."""
    x = x.float()
    mean, std = normal_fit(x)
    return correlation(torch.special.ndtr((x - mean) / std)) - correlation(x)


def admm_loss(D: Tensor, relaxed: Tensor, multiplier: Tensor, mu: float, rho: float) -> Tensor:  # noqa: N803
    """``mu mean|D'| + rho/2 sqrt(mean (D - D')^2) + mean(gamma |D - D'|)``, with D' ``relaxed`` and gamma the ``multiplier``."""
    apart = D - relaxed
    size = (apart.square().mean() + torch.finfo(torch.float32).tiny).sqrt()  # with a gradient, of 0, where it is 0
    return mu * relaxed.abs().mean() + rho / 2 * size + (multiplier * apart.abs()).mean()


def admm_step(
    D: Tensor,  # noqa: N803
    relaxed: Tensor,
    multiplier: Tensor,
    mu: float,
    rho: float,
) -> tuple[Tensor, Tensor]:
    """D' and gamma after a step: ``V = D + gamma / rho``, ``D' = max(0, 1 - (mu / rho) / |V|) V``, ``gamma + rho (D - D')``."""
    v = D + multiplier / rho
    relaxed = (1 - mu / rho / v.norm()).clamp(min=0) * v
    return relaxed, multiplier + rho * (D - relaxed)


class AlignQ(Method):
    """AlignQ (Chen et al., CVPR 2022), the predecessor of `EmaQ`: our reconstruction after its public code.

    Weights are projected by the CDF of their own mean and deviation onto 2^m levels in [-alpha, alpha], activations onto 2^m
    levels in +- 2 sigma; rounding counts as the identity, and autograd goes through the CDF and its statistics. All domains share
    one set of statistics.

    The ADMM term keeps the correlation of the samples of a batch as it was before the CDF: D is what the CDF changes in it, and the
    loss has ``mu mean|D'| + rho/2 sqrt(mean (D - D')^2) + mean(gamma |D - D'|)`` for each place, where D' and gamma start at random
    and follow by the steps of ADMM. As in the code, an entry of D' belongs to two places in the batch and not to two images, so it
    meets other images in each step: gamma is near 0 after the first one, and D' near the D of the last batch. The code of the
    Office-31 runs has it at the end of each block (``admm="joints"``), its other code at each activation (``layers``); without it
    (``off``) the method is the public code's ``cdf_alignment``. Measured once (optdigits, w2a2, ResNet-8,
    six epochs, two seeds): off 54.0 and 47.9 %, joints 54.9 and 46.4 %, layers 55.7 and 48.6 % in nearly twice the time.

    Departures: the code quantizes behind the norm, so that convolutions read residual sums of more than 2^m levels; here each
    layer's input is quantized, with running statistics of its own in use. The code with the ADMM term has ``2^(m+1) - 1`` levels of
    weights; here there are 2^m. A layer without a norm behind it keeps its scale. The code's policy (``first_last="native"``) is m
    bits in the first layer and a float classifier; its recipe is SGD at 0.04 (Office-31: 0.001), a tenth after 80 and 120 epochs.
    """

    name = "alignq"
    paper = "Chen et al., AlignQ: alignment quantization with ADMM-based correlation preservation, CVPR 2022"
    fidelity = "reconstruction"
    first_last = ("same", "fp")
    version = 3  # 2: norms start from the statistics of the quantized network; 3: the ADMM term

    relaxed: Tensor
    """D', float [places, batch, batch]."""
    multiplier: Tensor
    """gamma, float [places, batch, batch]."""

    class Params(Frozen):
        """Settings of AlignQ."""

        alpha: float = Field(1.0, gt=0, le=100, description="half the width of the weights' range")
        admm: Literal["off", "joints", "layers"] = Field(
            "joints",
            description="where the correlation of samples is kept: where branches meet (without any: layers), or at each layer",
        )
        mu: float = Field(0.2, ge=0, le=100, description="of the ADMM term: how much D' shrinks")
        rho: float = Field(0.3, gt=0, le=100, description="of the ADMM term: how much D is held to D'")

    def __init__(self, params: Frozen | None = None) -> None:
        super().__init__(params)
        self._places: list[str] = []
        self._seen: list[Tensor] = []  # D of each place in the pass that moves statistics

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        """The places of the ADMM term."""
        if self.params.admm == "off":
            return ()
        joints = [site.name for site in sites if site.kind == "joint"]
        layers = [site.name for site in sites if site.kind == "layer"]
        self._places = joints if self.params.admm == "joints" and joints else layers
        return self._places

    def prepare(self, net: nn.Module) -> None:
        """D' and gamma, for as many samples as a batch has."""
        rng = torch.Generator().manual_seed(seed_for("admm", self.spec.seed))
        for name in ("relaxed", "multiplier"):
            shape = (len(self._places), self.spec.batch, self.spec.batch)
            self.register_buffer(name, torch.rand(shape, generator=rng).to(next(net.parameters()).device))

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The task's and ``admm``, the sum over the places."""
        losses = super().losses(out, batch)
        n = min(len(batch), self.spec.batch)  # other places in the batch where it is accumulated in parts
        if not self._places or n < 2:
            return losses
        with torch.autocast(out.logits.device.type, enabled=False):
            found = [distortion(out.taps[name].inputs[0][:n]) for name in self._places]
            terms = [
                admm_loss(D, relaxed[:n, :n], multiplier[:n, :n], self.params.mu, self.params.rho)
                for D, relaxed, multiplier in zip(found, self.relaxed, self.multiplier, strict=True)
            ]
        if self.scope.track:
            self._seen = [D.detach() for D in found]
        return losses | {"admm": torch.stack(terms).sum()}

    def after_update(self, run: Run) -> None:
        """D' and gamma follow the D of the last pass that moved statistics."""
        seen, self._seen = self._seen, []
        for place, found in enumerate(seen):
            n = len(found)
            relaxed, multiplier = self.relaxed[place, :n, :n], self.multiplier[place, :n, :n]
            both = admm_step(found, relaxed, multiplier, self.params.mu, self.params.rho)
            self.relaxed[place, :n, :n], self.multiplier[place, :n, :n] = both

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the weight's own CDF."""
        keeps_scale = site.norm is None
        return CdfQuantizer(bits, site, scope, 2.0 if keeps_scale else self.params.alpha, True, relative=keeps_scale)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the CDF of the batch while training, of its averages in use."""
        return RunningCdfQuantizer(bits, site, scope, through=True)
