"""PEGE: values are replaced by quantized ones little by little, element by element, with a corrected gradient (2025)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..bench.method import Method, Out, Wrapper
from ..bench.quant import Quantizer, Scope
from ..bench.quant.quantizer import step_of
from ..bench.site import Site
from ..bench.spec import FLOAT_BITS, Frozen
from ..bench.task import Task

if TYPE_CHECKING:
    from ..bench.data import Batch


def replaced(step: int, steps: int, share: float) -> float:
    """How many of the values are quantized, ``p_t = min(1, log(1 + t) / log(1 + T_c))`` with ``T_c = share * steps``."""
    end = share * steps
    return 1.0 if step >= end else math.log1p(step) / math.log1p(end)


def closest(error: Tensor, p: float) -> Tensor:
    """Mask of the share ``p`` of elements with the smallest ``|error|``; more where errors are equal, as after a ReLU."""
    k = round(p * error.numel())
    size = error.abs()
    return size <= size.flatten().kthvalue(k).values if k else torch.zeros_like(size, dtype=torch.bool)


def spacing(quantizer: Quantizer, q: Tensor) -> Tensor:
    """The step s; where the grid is not uniform a typical one, the range of ``q`` over the number of steps (scalar)."""
    step = step_of(quantizer)
    if step is None:
        step = (q.amax() - q.amin()) / (quantizer.qmax - quantizer.qmin)
        step = torch.where(step > 0, step, 1.0)
    return step.detach()


class Replacement:
    """What is done to a quantizer in training, as hooks before and after it; one object for all quantizers of a network.

    Attributes:
        penalties: Mean squared discretization error of each quantizer in the pass under way, in steps; `PEGE.losses` takes them.
    """

    def __init__(self, params: PEGE.Params) -> None:
        self.params = params
        self.penalties: dict[Quantizer, Tensor] = {}
        self._x: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Replacement:
        return self  # a copy of a network takes no graph of a pass along

    def before(self, quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """In training the quantizer sees an alias of its input, so that its part of the gradient can be told from the rest."""
        if not quantizer.training:
            return None
        (self._x,) = inputs
        return self._x.view_as(self._x)

    def after(self, quantizer: Quantizer, inputs: tuple[Tensor, ...], q: Tensor) -> Tensor | None:
        """In training the mixture of ``q`` and the input."""
        if not quantizer.training:
            return None
        x, self._x = self._x, None
        assert x is not None
        (alias,), params, scope = inputs, self.params, quantizer.scope
        error = (x - q.detach()).float() / spacing(quantizer, q.detach())
        small = error.clamp(-0.5, 0.5)  # half a step on the grid; more where the quantizer clips
        if params.kappa and alias.requires_grad:
            pull = params.kappa * small.detach()
            alias.register_hook(lambda g: g * (1 + g.sign() * pull).to(g.dtype))
        if params.weight and torch.is_grad_enabled():
            self.penalties[quantizer] = small.square().mean()
        p = replaced(scope.step, scope.steps, params.share)
        if p == 1:
            return None
        chosen = closest(error.detach(), p) if params.order == "error" else torch.rand_like(x, dtype=torch.float32) < p
        return torch.where(chosen, q, x)


class PEGE(Wrapper):
    """Progressive element-wise gradient estimation (2025, arXiv 2508.19988) around any method that trains: our reconstruction.

    Only the abstract was available. Known: a logarithmic curriculum replaces full-precision values by quantized ones, element by
    element, for any quantizer; training minimises the task's loss and the discretization error. All formulas are inferred::

        x~ = M Q(x) + (1 - M) x,  M ~ Bernoulli(p_t),  p_t = min(1, log(1 + t) / log(1 + T_c)),  T_c = share of all steps
        dL/dx = g (1 + kappa sgn(g) (x - Q(x)) / s)      where M = 1; g: what the inner method's quantizer makes of the gradient
        L = task + weight * sum over tensors of mean((x - sg[Q(x)])^2 / s^2)

    for weights and activations alike. Inferred, too: only the gradient of x is corrected, since that of a step would get a bias of
    one sign. The loss moves x, and neither Q(x), through which it would have no gradient, nor s, which would grow. In both an error
    counts as half a step at most, which it is on the grid but not where a quantizer clips: else a step that is small for a moment
    would let it drown everything (seen with AdamW at 8 bits: such steps did not come back). The mask is drawn anew in every pass,
    as dropout's is. In use all values are quantized. The quantizers stay what the inner method made, with hooks.
    """

    name = "pege"
    paper = "Progressive element-wise gradient estimation for neural network quantization, 2025, arXiv 2508.19988"
    fidelity = "reconstruction"
    default_inner = "lsq"

    class Params(Frozen):
        """Settings of PEGE."""

        share: float = Field(0.8, gt=0, le=1, description="part of training after which all values are quantized")
        kappa: float = Field(0.1, ge=0, lt=2, description="correction of the gradient; 0: straight through")
        weight: float = Field(1e-3, ge=0, le=1000, description="of the discretization error in the loss")
        order: Literal["random", "error"] = Field(
            "random", description="which values are quantized first: drawn in each pass, or the closest to the grid"
        )

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        self.replacement = Replacement(self.params)

    def _progressive(self, quantizer: Quantizer) -> Quantizer:
        quantizer.register_forward_pre_hook(self.replacement.before)
        quantizer.register_forward_hook(self.replacement.after)
        quantizer.random = True
        return quantizer

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's, with hooks."""
        return self._progressive(self.inner.weight_quantizer(bits, site, scope))

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's, with hooks."""
        return self._progressive(self.inner.act_quantizer(bits, site, scope))

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's and ``discretization``, of the pass that ``out`` is of."""
        losses = self.inner.losses(out, batch)
        penalties = list(self.replacement.penalties.values())
        self.replacement.penalties.clear()
        if not self.params.weight:
            return losses
        return losses | {"discretization": self.params.weight * sum(penalties, out.logits.new_zeros(()))}

    def skip(self, task: Task) -> str | None:
        """As for every wrapper; or that there is nothing to replace."""
        if tuple(self.inner.bits) == (FLOAT_BITS,):
            return f"{self.inner.name} has no quantizers, so {self.name} has nothing to replace"
        return super().skip(task)
