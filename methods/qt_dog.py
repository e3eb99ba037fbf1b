"""QT-DoG: quantization noise in the weights is what flattens the minimum, for domain generalisation (Javed et al. 2025)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench.method import Method, Probe, Run, Wrapper
from ..bench.quant import Bits, Budget, Quantizer, Scope, quant_layers
from ..bench.site import Site
from ..bench.spec import FLOAT_BITS, Frozen
from ..bench.task import Task


def quantizes(step: int, steps: int, start: float) -> bool:
    """Whether weights are quantized at a step of training: from ``round(start * steps)`` on."""
    return step >= round(start * steps)


def float_until(start: float, quantizer: Quantizer, inputs: tuple[Tensor, ...], q: Tensor) -> Tensor | None:
    """The weight itself in training before the start, as a hook after its quantizer; None leaves it quantized.

    The quantizer runs all the same: its parameters get a gradient, of zero, without which a distributed step would not end.
    """
    scope = quantizer.scope
    if not quantizer.training or quantizes(scope.step, scope.steps, start):
        return None
    (weight,) = inputs
    return torch.where(torch.zeros((), dtype=torch.bool, device=q.device), q, weight)


class QTDoG(Wrapper):
    """QT-DoG (Javed et al. 2025, arXiv 2410.06020) around any method that trains: our reconstruction after the authors' code.

    Weights alone are quantized, with 7 bits on PACS, from step 2000 of 5000 on. Rounding moves the weights by noise,
    ``L(w + e) = L(w) + e.g + e.He / 2``, and so favours minima where H is small. Until the share ``start`` of the steps has passed,
    weights are in float in training; then the quantizers are fitted again to the weights as they are, and quantize. In use they
    always do. As in the code, the quantizer is LSQ with a step for each output channel (``lsq-channel``, the default); by its own
    policy (``first_last="native"``) the first convolution is quantized as all others are, and the classifier is in float. The
    authors average weights from the start of quantization on: ``swad+qt-dog`` with ``swad.start`` as ``start``.

    In the published trainer the layers that are put in when quantization starts are not in the optimizer: their weights and steps
    stand still from then on, but for what is left of Adam's momentum, and only norms and the float classifier go on. Here they
    train; ``train_quantized=False`` is the published trainer. Which of the two the paper's numbers are of is not known.
    Measured once (optdigits, w4a32, ResNet-8, ten epochs, two seeds; float networks of 71.8 and 58.2 %): 83.1 and 67.1 %; 79.0 and
    63.5 % where they stand still; with SWAD 83.6 % (the first seed).

    Inputs stay in float, whatever the run asks: w4a4 is run, and recorded, as w4a32; a ``plan`` that gives inputs fewer bits is
    refused. The published runs freeze the norms' statistics and use Adam at 5e-5 without decay; here both are
    the run's.
    """

    name = "qt-dog"
    paper = "Javed et al., QT-DoG: Quantization-aware training for domain generalization, ICML 2025, arXiv 2410.06020"
    fidelity = "reconstruction"
    default_inner = "lsq-channel"
    weights_only = True

    class Params(Frozen):
        """Settings of QT-DoG."""

        start: float = Field(
            0.4,
            ge=0,
            le=1,
            description="share of the steps after which weights are quantized; 1: only when training has ended",
        )
        train_quantized: bool = Field(
            True, description="whether weights and steps of quantized layers go on training once they are quantized"
        )

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        self.first_last = ("same", "fp")

    test_params = {"start": 0.08}  # noqa: RUF012

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """The inner method's for inputs in float."""
        return self.inner.plan(sites, bits._replace(a=FLOAT_BITS), probe)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """The inner method's with a hook, not inside another quantizer: it stays what the inner method looks for and saves."""
        quantizer = self.inner.weight_quantizer(bits, site, scope)
        quantizer.register_forward_hook(functools.partial(float_until, self.params.start))
        return quantizer

    def frozen(self, run: Run) -> Collection[nn.Parameter]:
        """What is in quantized layers, once they are quantized, with ``train_quantized=False``."""
        if self.params.train_quantized or not quantizes(self.scope.step, self.scope.steps, self.params.start):
            return ()
        return [
            p for _, layer in quant_layers(run.net) if layer.weight_quantizer is not None for p in layer.parameters()
        ]

    def after_update(self, run: Run) -> None:
        """Fit the quantizers to the weights when the next step is the first that quantizes.

        It is decided by the number of the step, and what it leaves lies in the checkpoint: a run that is taken up at this very step
        neither fits twice nor misses it. The optimizer forgets the quantizers' parameters: after a history of zeros Adam's first
        steps would be three times as long as the learning rate.
        """
        step, steps, start = self.scope.step, self.scope.steps, self.params.start
        if quantizes(step, steps, start) or not quantizes(step + 1, steps, start):
            return
        for _, layer in quant_layers(run.net):
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.fit(layer.weight)
                for parameter in layer.weight_quantizer.parameters():
                    run.opt.state.pop(parameter, None)

    def skip(self, task: Task) -> str | None:
        """As for every wrapper; or that there is nothing that could start."""
        if tuple(self.inner.bits) == (FLOAT_BITS,):
            return f"{self.inner.name} has no quantizers, so {self.name} has nothing to start"
        return super().skip(task)
