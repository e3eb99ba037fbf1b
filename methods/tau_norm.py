"""tau-normalisation: rows of the classifier that grew with their class's images are made more alike (Kang et al. 2020)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.errors import RunFailed
from ..bench.method import Run, Stage
from ..bench.quant import QuantLayer
from ..bench.spec import Frozen
from .crt import HeadWrapper

if TYPE_CHECKING:
    from ..bench.data import Batch

log = logging.getLogger("qatbench")

GRID = tuple(k / 10 for k in range(21))


def row_norms(layer: nn.Linear | QuantLayer) -> Tensor:
    """Norm of each row of the weight as the layer uses it in evaluation, float [outputs]; 1 for a row of zeros, which stays 0.

    With a gradient, where one is asked for, in eval mode.
    """
    weight = layer.weight
    if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
        if torch.is_grad_enabled():
            weight = layer.weight_quantizer(weight)
        else:
            codes, decode = layer.weight_quantizer.encode(weight)
            weight = decode(codes)
    norms = weight.float().norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


class TauNorm(HeadWrapper):
    """tau-normalised classifier (Kang et al. 2020, arXiv 1910.09217, sec. 4.2) around any method that trains.

    In use, ``w_i`` becomes ``w_i / ||w_i||^tau`` and the bias is dropped; training is the inner method's. Scaling a row scales its
    logit, so the logits are ``(f_i - b_i) / ||w_i||^tau``, w the quantized weight: exact, and the shipped codes stay as they are.
    tau is the best of 0, 0.1, ... 2 by balanced accuracy on the validation images, a mean over domains; it is chosen after each
    epoch's validation, so that epoch is measured with the choice of the one before (0 at first), the final validation and the
    test with the last. A head of superclasses is left alone.
    """

    name = "tau-norm"
    paper = (
        "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020, arXiv 1910.09217"
    )
    fidelity = "paper"
    default_inner = "lsq"
    alters = frozenset({"logits"})

    tau: Tensor
    norms: Tensor
    bias: Tensor

    class Params(Frozen):
        """Settings of tau-normalisation."""

        tau: float | None = Field(
            None, ge=0, le=10, description="0: rows as they are, 1: of norm 1; None: chosen by validation"
        )

    def prepare(self, net: nn.Module) -> None:
        """tau, and the rows' norms and biases, float [outputs], which a network of integer codes no longer shows."""
        super().prepare(net)
        self.register_buffer("tau", torch.tensor(self.params.tau or 0.0))
        self.register_buffer("norms", torch.ones(self.task.outputs))
        self.register_buffer("bias", torch.zeros(self.task.outputs))
        self.measure(net)

    @torch.no_grad()
    def measure(self, net: nn.Module) -> None:
        """Note norms and biases as they are now."""
        layer, classes = self.head_layer(net), len(self.task.classes)
        self.norms[:classes] = row_norms(layer)[:classes]
        if layer.bias is not None:
            self.bias[:classes] = layer.bias.detach()[:classes]

    def start(self, run: Run, stage: Stage) -> None:
        """Refuses to choose tau without validation images."""
        if self.params.tau is None and not run.method.data.val_domains:
            raise RunFailed(
                "tau-norm chooses tau on validation images, and this split has none; give tau-norm.tau, e.g. 1"
            )

    def after_update(self, run: Run) -> None:
        """Norms and biases follow the head."""
        self.measure(run.net)

    def validated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Choose tau; the smallest of equals."""
        if self.params.tau is None:
            scores = self.balanced_accuracies(run)
            best = max(range(len(GRID)), key=lambda k: scores[k])
            self.tau.fill_(GRID[best])
            log.info("tau-norm: tau %.1f, balanced accuracy on validation images %.4f", GRID[best], scores[best])

    @torch.no_grad()
    def balanced_accuracies(self, run: Run) -> list[float]:
        """Balanced accuracy on the validation images with each tau of the grid, a mean over domains."""
        classes, domains = len(self.task.classes), len(self.task.domains)
        images = torch.zeros(domains * classes, device=self.tau.device)
        right = torch.zeros(len(GRID), domains * classes, device=self.tau.device)
        with evaluating(run.net):
            for batch in run.val_batches():
                self.scope.domain, self.scope.labels, self.scope.track = batch.domain, None, False
                with self._autocast():
                    logits = self.inner.predict(run.net, batch)
                cell = F.one_hot(batch.domain * classes + batch.y, domains * classes).float()
                images += cell.sum(0)
                for k, tau in enumerate(GRID):
                    predicted = self.task.heads(self.normalised(logits, tau))[""].argmax(1)
                    right[k] += (predicted == batch.y).float() @ cell
        recalls = (right / images).view(len(GRID), domains, classes)  # NaN where there is no image
        return recalls.nanmean(2).nanmean(1).tolist()

    def normalised(self, logits: Tensor, tau: Tensor | float, norms: Tensor | None = None) -> Tensor:
        """``(f - b) / ||w||^tau``. ``logits``: float [B, outputs]; ``norms``: float [outputs], by default those noted last."""
        return (logits - self.bias) / (self.norms if norms is None else norms) ** tau

    def predict(self, net: nn.Module, batch: Batch) -> Tensor:
        """The inner method's, normalised."""
        return self.normalised(self.inner.predict(net, batch), self.tau, self.present_norms(net))

    def present_norms(self, net: nn.Module) -> Tensor:
        """The rows' norms as the weights are now, which a probe has moved; those noted last where the head shows no weights."""
        layer = next((m for m in net.get_submodule(self.head).modules() if isinstance(m, nn.Linear | QuantLayer)), None)
        if layer is None:
            return self.norms
        own = torch.arange(len(self.norms), device=self.norms.device) < len(self.task.classes)
        return torch.where(own, row_norms(layer), self.norms)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards every module is in its own mode again."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
