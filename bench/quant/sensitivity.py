"""How much the loss minds a change of a layer's weight, measured on a float network: what mixed-precision plans are made of.

``loss`` is everywhere a function of a batch that returns the mean loss of its images, differentiable in ``params`` and without
state that moves (BatchNorm in eval mode).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Batch

Loss = Callable[["Batch"], Tensor]
CHUNK = 32  # images a pass: a graph of second derivatives takes several times the memory of a training step


def hessian_trace(
    loss: Loss,
    batch: Batch,
    params: Mapping[str, Tensor],
    probes: int = 50,
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Trace of the Hessian of the loss in each parameter: ``Tr H = E[v^T H v]`` for random signs v (Hutchinson 1990).

    Parameters are probed one by one. All at once is 6 times faster a probe (resnet20), but cross derivatives of layers, which
    have mean zero, then make most of the noise: after 50 probes a standard error of 20 to 70 % of the trace instead of 7 to 15 %.
    A probe sees one chunk of the batch, each chunk equally often: the mean is that of the whole batch.

    Args:
        loss: Mean loss of a batch.
        batch: Images on which the loss is taken.
        params: Name -> tensor that requires a gradient.
        probes: Random vectors, over all chunks together; rounded up to a multiple of the number of chunks.
        seed: Of the random vectors; the global generator is not touched.
        tell: Called after each random vector with how many are done, and how many there are.
    """
    rng = torch.Generator().manual_seed(seed)
    parts = _parts(batch)
    each = math.ceil(probes / len(parts))
    sums = dict.fromkeys(params, 0.0)
    done, total = 0, len(parts) * len(params) * each
    with torch.enable_grad():
        for part in parts:
            # The graph of the gradients is built once a chunk; a probe is one more backward pass through it.
            gradients = torch.autograd.grad(loss(part), list(params.values()), create_graph=True)
            for (name, parameter), gradient in zip(params.items(), gradients, strict=True):
                for _ in range(each):
                    v = _signs(parameter, rng)
                    (product,) = torch.autograd.grad(gradient, parameter, v, retain_graph=True)
                    sums[name] += float((v * product).sum()) * len(part) / len(batch) / each
                    done += 1
                    if tell is not None:
                        tell(done, total)
    return sums


def _signs(like: Tensor, rng: torch.Generator) -> Tensor:
    """Random signs in the shape and memory layout of a tensor."""
    signs = torch.empty_like(like, device="cpu", requires_grad=False).bernoulli_(0.5, generator=rng)
    return signs.mul_(2).sub_(1).to(like.device)


def fisher(loss: Loss, batch: Batch, params: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum, over the elements of each parameter, of the squared gradient: of each image by itself, then the mean over images.

    It is the trace of the empirical Fisher matrix, which for a likelihood near its optimum is near the Hessian's.
    """
    sums = torch.zeros(len(params), dtype=torch.float64)
    with torch.enable_grad():
        for k in range(len(batch)):
            one = batch.select(torch.tensor([k], device=batch.y.device))
            gradients = torch.autograd.grad(loss(one), list(params.values()))
            sums += torch.stack([g.square().sum().double().cpu() for g in gradients]) / len(batch)
    return dict(zip(params, sums.tolist(), strict=True))


@torch.no_grad()
def loss_rise(
    loss: Loss,
    batch: Batch,
    params: Mapping[str, Tensor],
    widths: Sequence[int],
    quantized: Callable[[str, int], Tensor],
) -> dict[str, dict[int, float]]:
    """How much the loss rises when one parameter at a time is quantized; it may fall.

    Args:
        loss: Mean loss of a batch.
        batch: Images on which the loss is taken.
        params: Name -> tensor; put back when it has been tried.
        widths: Bits to try.
        quantized: The parameter of this name at this many bits.
    """

    def mean() -> float:
        return sum(float(loss(part)) * len(part) for part in _parts(batch)) / len(batch)

    before, rises = mean(), {}
    for name, parameter in params.items():
        original, rises[name] = parameter.clone(), {}
        for width in widths:
            at_width = quantized(name, width)
            try:
                parameter.copy_(at_width)
                rises[name][width] = mean() - before
            finally:
                parameter.copy_(original)
    return rises


@torch.no_grad()
def second_order(
    curvature: Mapping[str, float],
    params: Mapping[str, Tensor],
    widths: Sequence[int],
    quantized: Callable[[str, int], Tensor],
) -> dict[str, dict[int, float]]:
    """Average curvature x squared error of each parameter at each width (HAWQ-V2, Dong et al. 2020, arXiv 1911.03852, Eq. 8).

    In expectation it is twice the rise of the loss, if the error has no direction of its own. Negative curvature counts as zero.

    Args:
        curvature: Trace of the Hessian (or of the Fisher matrix) in each parameter.
        params: Name -> tensor.
        widths: Bits to try.
        quantized: The parameter of this name at this many bits.
    """
    return {
        name: {
            width: max(curvature[name], 0.0)
            / parameter.numel()
            * float((parameter - quantized(name, width)).square().sum())
            for width in widths
        }
        for name, parameter in params.items()
    }


def _parts(batch: Batch) -> list[Batch]:
    """Consecutive chunks of at most `CHUNK` images, so that each holds all domains of an interleaved batch."""
    places = torch.arange(len(batch), device=batch.y.device)
    return [batch.select(part) for part in places.chunk(math.ceil(len(batch) / CHUNK))]


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each value as a share of their sum; negative ones count as zero. Equal shares if nothing is left."""
    positive = {name: max(value, 0.0) for name, value in values.items()}
    total = sum(positive.values())
    return {name: value / total if total > 0 else 1 / len(values) for name, value in positive.items()}


__all__ = ["CHUNK", "Loss", "fisher", "hessian_trace", "loss_rise", "second_order", "shares"]
