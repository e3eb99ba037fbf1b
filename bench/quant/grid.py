"""The one fast path of elementwise quantizers: clip to a uniform grid and round, forward and backward.

LSQ, LSQ+, PACT, DoReFa and post-training quantization differ in where step and offset come from and in the step's gradient; they
share the function here. It runs as an `autograd.Function` of few passes over memory, or, where a run asks for ``compile``, as one
fused kernel each way (`torch.compile`), which keeps nothing but its input: see `Quantizer.redo`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .quantizer import Decode, Quantizer, Scope

SMALLEST_FUSED = 2**14  # elements; below, the start of a compiled kernel takes longer than the passes it saves
log = logging.getLogger("qatbench")


def round_to_grid(
    x: Tensor,
    step: Tensor,
    quantizer: Quantizer,
    *,
    offset: Tensor | None = None,
    scale: float = 1.0,
    ste: bool = False,
) -> Tensor:
    """``step * round(clip((x - offset) / step, qmin, qmax)) + offset``, half to even, differentiable in x, step and offset.

    With v = (x - offset) / step the gradient of x is 1 inside, qmin < v < qmax, and 0 outside. That of the step is round(v) - v
    inside, qmin below and qmax above; that of the offset is 0 inside and 1 outside (LSQ, LSQ+). With ``ste`` the rounding counts
    as the identity: the step's gradient is 0 inside, and v = qmin is inside (PACT, Eq. 3).

    Args:
        x: float, any shape.
        step: float, positive: a scalar, or one a sample, [B, 1, ..] (without ``offset`` and ``ste``).
        quantizer: For ``qmin``, ``qmax`` and the scope.
        offset: float scalar; None: 0.
        scale: Factor on the gradients of step and offset.
        ste: Whether the rounding counts as the identity for the step, too.
    """
    fused = step.ndim == 0 and is_fused(x, quantizer.scope)
    return _Grid.apply(x, step, offset, quantizer.qmin, quantizer.qmax, scale, ste, fused)  # type: ignore[return-value]


def grid_codes(x: Tensor, step: Tensor, quantizer: Quantizer, offset: Tensor | None = None) -> tuple[Tensor, Decode]:
    """Integer codes (int32) of `round_to_grid`, and the function that decodes them."""
    x, step = x.detach(), step.detach().clone()
    beta = None if offset is None else offset.detach().clone()
    codes = (x if beta is None else x - beta).div(step).clamp_(quantizer.qmin, quantizer.qmax).round_().int()
    return codes, lambda k: k.to(step.dtype) * step if beta is None else k.to(step.dtype) * step + beta


def redo_grid(
    x: Tensor, step: Tensor, quantizer: Quantizer, offset: Tensor | None = None
) -> Callable[[], Tensor] | None:
    """See `Quantizer.redo`: one more fused pass instead of a float copy that is kept until the backward pass."""
    if not is_fused(x, quantizer.scope):
        return None
    x, step = x.detach(), step.detach().clone()
    beta = None if offset is None else offset.detach().clone()
    return lambda: _compiled(_forward)(x, step, beta, quantizer.qmin, quantizer.qmax)


def is_fused(x: Tensor, scope: Scope) -> bool:
    """Whether this tensor goes through the compiled kernels."""
    return scope.compile and x.ndim == 4 and x.dtype == torch.float32 and x.numel() >= SMALLEST_FUSED


def ready_to_compile(device: torch.device) -> bool:
    """Compile the kernels for a device; False, with one line in the log, where there is no working compiler."""
    x = torch.linspace(-1, 1, SMALLEST_FUSED, device=device).view(4, 4, 32, 32)
    x = x.contiguous(memory_format=torch.channels_last)
    step = torch.full((), 0.1, device=device)
    try:
        _compiled(_forward)(x, step, None, -8, 7)
        _compiled(_backward)(x, x, step, None, -8, 7, False)
    except Exception as error:  # each backend has its own classes, none of them public
        log.warning("quantizers run uncompiled: %s", " ".join(str(error).split())[:200] or type(error).__name__)
        return False
    return True


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _forward(x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    v = (x if offset is None else x - offset) / step
    out = v.clamp(qmin, qmax).round() * step
    return out if offset is None else out + offset


def _backward(
    grad: Tensor, x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int, ste: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, step and offset, before ``scale``."""
    v = (x if offset is None else x - offset) / step
    inside = ((v >= qmin) if ste else (v > qmin)) & (v < qmax)
    code = v.clamp(qmin, qmax).round()
    grad_x = torch.where(inside, grad, 0.0)
    grad_step = grad * torch.where(inside, 0.0 if ste else code - v, code)
    return grad_x, grad_step.sum(), (grad - grad_x).sum()


class _Grid(torch.autograd.Function):
    """See `round_to_grid`. Uncompiled it keeps its input and its output, which the layers before and after keep anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        scale: float,
        ste: bool,
        fused: bool,
    ) -> Tensor:
        if fused:
            out, kept = _compiled(_forward)(x, step, offset, qmin, qmax), None
        else:
            out = torch.div(x if offset is None else x - offset, step).clamp_(qmin, qmax).round_().mul_(step)
            out = kept = (out if offset is None else out.add_(offset)).to(
                x.dtype
            )  # a step a sample is no mere scalar to a bf16 x
        ctx.save_for_backward(x, step, offset, kept)
        ctx.bounds, ctx.scale, ctx.ste = (qmin, qmax), scale, ste
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step, offset, out = ctx.saved_tensors
        if out is None:
            found = _compiled(_backward)(grad, x, step, offset, *ctx.bounds, ctx.ste)
        else:
            qmin, qmax = ctx.bounds
            found = grid_gradients(grad, x, step, offset, out, qmin, qmax, ctx.ste, ctx.needs_input_grad)
        grad_x, grad_step, grad_offset = found
        grad_step = (grad_step * ctx.scale).to(step.dtype) if ctx.needs_input_grad[1] else None
        grad_offset = (grad_offset * ctx.scale).to(offset.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_step, grad_offset, None, None, None, None, None


def grid_gradients(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    out: Tensor,
    qmin: float,
    qmax: float,
    ste: bool,
    needs: Any,
) -> tuple[Tensor, Any, Any]:
    """`_backward` in as few passes over memory as ordinary operations allow.

    It never asks how ``out`` was rounded, so it holds for any levels that are multiples of the step.
    """
    shift = 0.0 if offset is None else offset
    low, high = step * qmin + shift, step * qmax + shift
    grad_x = _inside(grad, x, low.nextafter(low - 1) if ste else low, high)
    grad_step = grad_offset = 0.0
    if needs[2]:
        grad_offset = _total(grad) - _total(grad_x)
    if needs[1]:
        # s * d(x_q)/ds is x_q - x inside and x_q - offset outside; grad_x is grad inside and 0 outside. One row an image: a sum
        # in float32 over everything would lose digits of the difference.
        sums = _rowwise(grad - grad_x, out) if ste else _rowwise(grad, out) - _rowwise(grad_x, x)
        grad_step = (sums.view_as(step) if step.ndim else sums.sum()) / step
        if offset is not None:
            grad_step = grad_step - (_total(grad) - _total(grad_x)) * offset / step
    return grad_x, grad_step, grad_offset


def _inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grad`` where ``low < x < high``, else 0."""
    if x.device.type == "cpu" and low.ndim == 0:
        # One pass over memory instead of four; elsewhere reading the bounds would wait for the device.
        return torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    return grad * ((x > low) & (x < high))


def _total(a: Tensor) -> Tensor:
    return a.sum(dtype=a.dtype if a.dtype == torch.float64 else torch.float32)


def _rowwise(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the first dimension, float32 [B] at least, read in the order of memory."""
    if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if a.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(a, b)
    return torch.sum(a * b, 1, dtype=torch.float32)
