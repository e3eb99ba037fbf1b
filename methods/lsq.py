"""LSQ: the step size is a parameter, trained by a gradient that knows about rounding (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.method import Method
from ..bench.quant import Quantizer, Scope
from ..bench.site import Site

SMALLEST_STEP = 1e-8


class LearnedStepRound(torch.autograd.Function):
    """``x_q = s * round(clip(x / s, qmin, qmax))`` (Eq. 1 and 2) with the gradients of Eq. 3 and 5.

    It keeps its input and its output, which the layers before and after keep anyway, and recomputes the rest: written as
    ordinary operations autograd would keep five tensors of the input's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int, scale: float) -> Tensor:
        """x: float, any shape. step: float, scalar. scale: the factor g on the step's gradient."""
        out = torch.div(x, step).clamp_(qmin, qmax).round_().mul_(step)
        ctx.save_for_backward(x, out, step)
        ctx.bounds, ctx.scale = (qmin, qmax), scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        """Inside the range: 1 for x and round(x/s) - x/s for the step; outside: 0 and qmin or qmax."""
        x, out, step = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        grad_x = _inside(grad, x, step * qmin, step * qmax)
        # s * d(x_q)/ds is x_q - x inside and x_q outside; grad_x is grad inside and 0 outside. One row an image: a sum in float32
        # over everything would lose digits of the difference.
        grad_step = (_rowwise(grad, out) - _rowwise(grad_x, x)).sum() * (ctx.scale / step)
        return grad_x, grad_step.to(step.dtype), None, None, None


def _inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grad`` where ``low < x < high``, else 0."""
    if (
        x.device.type == "cpu"
    ):  # one pass over memory instead of four; elsewhere reading the bounds would wait for the device
        return torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    return grad * ((x > low) & (x < high))


def _rowwise(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the first dimension, float32 [B] at least, read in the order of memory."""
    if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if a.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(a, b)
    return torch.sum(a * b, 1, dtype=torch.float32)


class LearnedStep(Quantizer):
    """One learned step a tensor. Without weight decay, and never below 1e-8."""

    groups = {"step": (1.0, 0.0)}  # noqa: RUF012
    step: nn.Parameter

    def __init__(self, bits: int, site: Site, scope: Scope, signed: bool, features: int) -> None:
        super().__init__(bits, site, scope, signed)
        self.step = nn.Parameter(torch.ones(()))
        self.grad_scale = 1.0 / math.sqrt(features * self.qmax)  # sec. 2.2: g = 1 / sqrt(N * Q_P)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """``s = 2 <|x|> / sqrt(Q_P)`` (sec. 2.1)."""
        mean = x.detach().float().abs().mean()
        self.step.copy_(2 * mean / math.sqrt(self.qmax) if mean > 0 else torch.ones_like(mean))

    def quantize(self, x: Tensor) -> Tensor:
        """See `LearnedStepRound`."""
        return LearnedStepRound.apply(x, self.step, self.qmin, self.qmax, self.grad_scale)  # type: ignore[return-value]

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Codes from ``qmin`` to ``qmax``."""
        step = self.step.detach().clone()
        return (x / step).clamp(self.qmin, self.qmax).round().int(), lambda codes: codes.to(step.dtype) * step

    def project(self) -> None:
        """Keep the step positive."""
        self.step.clamp_(min=SMALLEST_STEP)


class LSQ(Method):
    """Learned step size quantization (Esser et al. 2020, arXiv 1902.08153), as in the paper: per tensor, unsigned activations.

    N in the gradient scale is the number of weights, or of features of one image (sec. 2.2); public codes often count the whole
    batch instead, which makes the steps' gradients smaller by the root of the batch size.
    """

    name = "lsq"
    paper = "Esser et al., Learned step size quantization, ICLR 2020, arXiv 1902.08153"
    fidelity = "paper"

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Signed."""
        return LearnedStep(bits, site, scope, True, site.weights)

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Unsigned after a ReLU."""
        return LearnedStep(bits, site, scope, site.signed_input, site.inputs)
