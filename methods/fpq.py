"""FPQ: noise on the features before they are quantized, and the float network's features as targets (Pang and Cai 2025)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.errors import RunFailed
from ..bench.method import Method, Out, Wrapper
from ..bench.quant import Quantizer, Scope
from ..bench.quant.quantizer import step_of
from ..bench.site import Site
from ..bench.spec import Frozen

if TYPE_CHECKING:
    from ..bench.data import Batch

EPS = 1e-5  # of the standard deviation; BatchNorm's


def noise(x: Tensor, step: Tensor) -> Tensor:
    """``delta ~ U[-s/2, s/2]`` of the shape and dtype of ``x`` (Eq. 9). ``step``: s, broadcastable to ``x``; a constant in it."""
    return (torch.rand_like(x) - 0.5) * step.detach().to(x.dtype)


def perturb(p: float, quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Stochastic feature perturbation (Eq. 14), as a hook before a quantizer: what it shall see in place of its input.

    None leaves the input as it is: always in evaluation, with probability ``1 - p`` in training, where the grid is not uniform, and
    before a linear layer, whose input is no feature map [B, C, H, W].
    """
    assert isinstance(quantizer, Quantizer)
    (x,) = inputs
    step = step_of(quantizer)
    if not quantizer.training or step is None or x.ndim != 4 or torch.rand(()) >= p:
        return None
    return x + noise(x, step)


def channel_wise_distance(student: Tensor, teacher: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """``||z_t - z_s||^2`` with ``z = (f - mean) / sqrt(var + eps)`` per channel (Eq. 17). Both: float [B, C, H, W].

    ``mean`` divides by the number of elements.
    """
    z_s, z_t = (F.batch_norm(f.float(), None, None, training=True, eps=EPS) for f in (student, teacher))
    return F.mse_loss(z_s, z_t, reduction=reduction)


class FPQ(Wrapper):
    """Feature-perturbed quantization (Pang and Cai 2025, arXiv 2503.11159) around any method that trains; the loss is Eq. 22.

    Stochastic feature perturbation: before each quantized convolution noise of up to half a step is added, with probability ``p``
    for each layer and forward pass. It is drawn anew in every pass, as dropout is, a sharpness method's second pass included. Where
    the activation quantizer has no uniform step nothing is added; if none has one and ``csd`` is 0, the wrapper changes nothing.

    Channel-wise standardised distillation: the outputs of all convolutions follow the float network's; the layers are added up.

    Inferred: mean and variance of a channel are over the batch and all places; a layer's distance is divided by its size, and has
    weight 1, since the plain sum (``reduction="sum"``) grows with batch and image; the noise has no gradient for the step.
    Departure: the paper's base is LSQ with a fixed zero point and a weight step a channel; here it is LSQ as in its own paper.
    """

    name = "fpq"
    paper = "Pang and Cai, Stabilizing quantization-aware training by implicit regularization, 2025, arXiv 2503.11159"
    fidelity = "reconstruction"
    default_inner = "lsq"

    class Params(Frozen):
        """Settings of FPQ."""

        p: float = Field(0.1, ge=0, le=1, description="how often a layer's input is perturbed; 0: never")
        csd: float = Field(
            1.0, ge=0, le=1000, description="weight of the distillation; 0: without, and without a teacher"
        )
        reduction: Literal["mean", "sum"] = Field(
            "mean", description="mean: a layer's distance is divided by its size; sum: the paper, for a batch as it is"
        )

    test_params = {"p": 0.5}  # noqa: RUF012

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        self.teacher = "float" if self.params.csd else None
        self.layers: list[str] = []

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's with a hook, not inside another quantizer: it stays what the inner method looks for and saves."""
        quantizer = self.inner.act_quantizer(bits, site, scope)
        if self.params.p:
            quantizer.register_forward_pre_hook(functools.partial(perturb, self.params.p))
            quantizer.random = True
        return quantizer

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        """All layers but those of the head, which has no feature maps and may be another one than the float network's."""
        heads = tuple(f"{site.name}." for site in sites if site.kind == "head")
        layers = [site.name for site in sites if site.kind == "layer" and not f"{site.name}.".startswith(heads)]
        self.layers = layers if self.params.csd else []
        return self.layers

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's and ``csd``."""
        losses = self.inner.losses(out, batch)
        if not self.params.csd:
            return losses
        teacher = out.teacher["float"].taps
        pairs = [(out.taps[name].value, teacher[name].value) for name in self.layers]
        distances = [channel_wise_distance(s, t, self.params.reduction) for s, t in pairs if s.ndim == 4]
        if not distances:
            raise RunFailed("fpq compares the outputs of convolutions, and this network has none; set fpq.csd=0")
        return losses | {"csd": self.params.csd * torch.stack(distances).sum()}
