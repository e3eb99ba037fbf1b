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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        """Inside the range: 1 for x and round(x/s) - x/s for the step; outside: 0 and qmin or qmax."""
        x, out, step = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        inside = (x > step * qmin) & (x < step * qmax) if qmin < 0 else (x > 0) & (x < step * qmax)
        grad_x = grad * inside
        grad_step = None
        if ctx.needs_input_grad[1]:
            # (x_q - inside * x) / s is round(x/s) - x/s inside and qmin or qmax outside.
            error = torch.addcmul(out, x, inside.to(x.dtype), value=-1)
            grad_step = torch.dot(grad.reshape(-1), error.reshape(-1)) if _flat(grad, error) else (grad * error).sum()
            grad_step = (grad_step.to(step.dtype) * (ctx.scale / step)).reshape(step.shape)
        return grad_x, grad_step, None, None, None


def _flat(a: Tensor, b: Tensor) -> bool:
    return a.is_contiguous() and b.is_contiguous()


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
