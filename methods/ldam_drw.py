"""LDAM-DRW: larger margins for rarer classes, and late in training larger weights, too (Cao et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.edges import pair
from ..bench.method import Method, Out, Probe, Run
from ..bench.quant import Bits, Budget, QuantLayer, Scope, swap
from ..bench.site import Site
from ..bench.spec import Frozen
from .cb_focal import class_balanced
from .crt import HeadWrapper
from .tau_norm import row_norms

if TYPE_CHECKING:
    from ..bench.data import Batch


def margins(counts: Sequence[float], largest: float) -> Tensor:
    """``m_j`` proportional to ``n_j^(-1/4)`` (Eq. 12), the rarest class that occurs has the ``largest``. float [classes]."""
    n = torch.tensor(counts, dtype=torch.float64)
    rarest = n[n > 0].min()
    return (largest * (n.clamp(min=rarest) / rarest) ** -0.25).float()


class CosineHead(nn.Module):
    """A classifier of directions: ``s <x, w_i> / (||x|| ||w_i||)``, float [B, F] to [B, outputs]; no bias.

    Both norms divide what the layer puts out, so that quantizers meet features and weights of the size that they are made for. A
    row's norm is that of the weight as the layer uses it, quantized; an image's is that of its features before they are quantized.

    Args:
        layer: The float head, the directions of whose rows are taken over.
        scale: s.
    """

    norms: Tensor

    def __init__(self, layer: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        # On meta, since an initialisation would draw random numbers. Rows of norm 1, as in the authors' code.
        self.linear.weight = nn.Parameter(F.normalize(layer.weight.detach(), dim=1))
        self.scale = scale
        self.register_buffer("norms", torch.ones(layer.out_features, device=layer.weight.device))
        self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Note the rows' norms, for a form of the layer that has only integer codes."""
        assert isinstance(self.linear, nn.Linear | QuantLayer)
        self.norms.copy_(row_norms(self.linear))

    def forward(self, features: Tensor) -> Tensor:
        """Scaled cosines."""
        scale = self.scale / features.float().norm(dim=1, keepdim=True).clamp(min=1e-4)
        if not isinstance(self.linear, nn.Linear | QuantLayer):  # deployed
            return self.linear(features) * scale / self.norms
        products, weight = self._products(features)
        norms = weight.float().norm(dim=1)
        return products * scale / torch.where(norms > 0, norms, 1.0)  # few bits may make a row all zero

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and the weight that it used: quantized once, since a second time may draw other random numbers."""
        quantizer = self.linear.weight_quantizer if isinstance(self.linear, QuantLayer) else None
        if quantizer is None:
            return self.linear(x), self.linear.weight  # type: ignore[return-value]
        used: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            used.append(output)

        handle = quantizer.register_forward_hook(keep)
        try:
            return self.linear(x), used[0]
        finally:
            handle.remove()


class LDAMDRW(HeadWrapper):
    """LDAM with deferred re-weighting (Cao et al. 2019, arXiv 1906.07413) around any method that trains.

    The head becomes a `CosineHead`; the margin ``m_y`` is subtracted from the cosine of an image's own class (Eq. 13); from ``drw``
    of the epochs on classes have the weights of `class_balanced`. The task's loss is the mean over the batch of
    ``w_y CE(s (cos - m_y), y)``. A head of superclasses has cosines, too, without margins. Under ``first_last=native`` the
    classifier is in float, unless the inner method's policy is ``same``; otherwise it is quantized as the run's policy says.

    Departures: the public code divides by the sum of the batch's weights, not by its size; its learning rates (warm-up, steps at
    80 % and 90 %) are the run's ``schedule`` here.
    """

    name = "ldam-drw"
    paper = "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019, arXiv 1906.07413"
    version = 2  # 2: domains of unequal size count alike, as in the batches
    fidelity = "paper"
    default_inner = "lsq"
    changes_net = True
    alters = frozenset({"head", "logits", "loss"})

    margin: Tensor
    weight: Tensor

    class Params(Frozen):
        """Settings of LDAM-DRW."""

        max_m: float = Field(0.5, ge=0, le=2, description="margin of the rarest class, in units of a cosine; 0: none")
        s: float = Field(30.0, gt=0, le=1000, description="scale of the cosines")
        drw: float = Field(0.8, ge=0, le=1, description="share of the epochs before classes are weighted; 1: never")
        beta: float = Field(
            0.9999, ge=0, lt=1, description="of the weights: how fast more images of a class stop to count"
        )

    test_params = {"drw": 0.5}  # noqa: RUF012

    def __init__(self, inner: Method, params: Frozen | None = None) -> None:
        super().__init__(inner, params)
        first, last = pair(inner.first_last)
        self.first_last = first, "same" if last == "same" else "fp"

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """The inner method's, which measures the network with the head that it will have."""
        if not self.head:
            return self.inner.plan(sites, bits, probe)
        net = copy.deepcopy(probe.net)
        swap(net, self.head, self._cosine(net.get_submodule(self.head)))
        return self.inner.plan(sites, bits, replace(probe, net=net))

    def replace(self, site: Site, module: nn.Module, scope: Scope) -> nn.Module:
        """A cosine head for a linear one."""
        super().replace(site, module, scope)
        return self._cosine(module) if site.kind == "head" else module

    def _cosine(self, module: nn.Module) -> CosineHead:
        assert isinstance(module, nn.Linear)  # what find_sites calls a head
        return CosineHead(module, self.params.s)

    def prepare(self, net: nn.Module) -> None:
        """Margins and weights of the classes; the head's norms, now that its weight is quantized."""
        super().prepare(net)
        counts = self.task.class_sizes
        self.register_buffer("margin", margins(counts, self.params.max_m), persistent=False)
        self.register_buffer("weight", class_balanced(counts, self.params.beta), persistent=False)
        self.measure(net)

    def measure(self, net: nn.Module) -> None:
        """Note the norms of the head's rows as they are now."""
        head = net.get_submodule(self.head)
        assert isinstance(head, CosineHead)
        head.measure()

    def after_update(self, run: Run) -> None:
        """The head's norms follow its weight."""
        self.measure(run.net)

    @property
    def deferred(self) -> bool:
        """Whether all classes still weigh the same."""
        return self.scope.epoch < self.params.drw * self.scope.epochs

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The inner method's, with another ``task``."""
        cosines = self.task.heads(out.logits)[""]  # times s
        own = F.one_hot(batch.y, cosines.shape[1])
        each = F.cross_entropy(cosines - own * (self.params.s * self.margin), batch.y, reduction="none")
        task = each.mean() if self.deferred else (self.weight[batch.y] * each).mean()
        return self.inner.losses(out, batch) | {"task": task}
