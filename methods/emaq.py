"""EmaQ: every domain's tensors through a CDF of its own onto one grid, and domains that weigh by their sensitivity."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench import ranks
from ..bench.edges import edge_words
from ..bench.errors import RunFailed
from ..bench.method import Method, Probe, Run
from ..bench.quant import (
    Bits,
    Budget,
    CdfQuantizer,
    Decode,
    Quantizer,
    RunningCdfQuantizer,
    Scope,
    deployed,
    quant_layers,
)
from ..bench.quant.levels import switching_points
from ..bench.site import Site
from ..bench.spec import FLOAT_BITS, Frozen, parse_bits

log = logging.getLogger("qatbench")


class DomainNorm(nn.BatchNorm2d):
    """BatchNorm whose running statistics are each domain's own, [domains, C]; scale and shift are shared.

    In training each domain's part of the batch is normalised by itself. An image of a domain unseen in training meets the mean of
    all domains' statistics.

    Args:
        norm: The float network's, whose parameters are taken over, and whose statistics every domain starts from.
        domains: How many.
        scope: Says which domain each image is of.
        after: What quantizes the output, if anything does.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, domains: int, scope: Scope, after: Quantizer | None = None) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias, self.num_batches_tracked = norm.weight, norm.bias, norm.num_batches_tracked
        self.scope, self.after = scope, after
        for name in ("running_mean", "running_var"):
            setattr(self, name, getattr(norm, name).repeat(domains, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Input and output: float [B, C, H, W]."""
        domain, present = self.scope.domain, self.scope.present()
        if domain is None or len(self.running_mean) == 1:
            out = self._normalise(input, -1)
        elif len(present) == 1:
            out = self._normalise(input, present[0])
        else:
            out = torch.empty_like(input)
            for d in present:
                of_d = domain == d
                out = out.masked_scatter(of_d.view(-1, 1, 1, 1), self._normalise(input[of_d], d))
        return out if self.after is None else self.after(out)

    def _normalise(self, x: Tensor, d: int) -> Tensor:
        moves = self.training and self.scope.track and self.track_running_stats
        if self.training and not moves:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        one = d >= 0 or len(self.running_mean) == 1  # else the mean over the domains, which is a copy
        mean, var = (s[d] if one else s.mean(0) for s in (self.running_mean, self.running_var))
        momentum = 0.1 if self.momentum is None else self.momentum
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)


class Unaligned:
    """A mixin that leaves the CDF out: x is clipped to the range of the levels as it is. The ablation of the paper's Table X."""

    fused = False

    def place(self, x: Tensor, mean: Tensor, spread: Tensor, reach: Tensor) -> Tensor:
        """Where x lies on the grid."""
        n = self.qmax  # type: ignore[attr-defined]
        return ((x / reach + 1) * (n / 2)).clamp(0, n)


class UnalignedWeight(Unaligned, CdfQuantizer):
    """Weights clipped to [-2 sigma, 2 sigma], as inputs are: of a fixed range an even grid would use few of its codes."""


class UnalignedInput(Unaligned, RunningCdfQuantizer):
    """Activations clipped to [-alpha sigma, alpha sigma]."""


class FixedCdfQuantizer(CdfQuantizer):
    """For what a norm has made: the CDF is that of N(0, 1), whatever the tensor (AlignQ's public code)."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1."""
        return torch.zeros_like(self.alpha), torch.ones_like(self.alpha)

    def measured(self) -> bool:
        """Never."""
        return False


class Thresholds(Quantizer):
    """An activation quantizer in use: the CDF is monotone, so a code is how many of n thresholds an input has reached.

    Codes and values are those of the quantizer it is made of, in eval mode.

    Args:
        source: That quantizer.
    """

    thresholds: Tensor  # float32 [domains + 1, n]; the last row is for an unseen domain
    reach: Tensor  # [domains + 1, 1]

    def __init__(self, source: RunningCdfQuantizer) -> None:
        super().__init__(source.bits, source.site, source.scope, signed=False)
        self.qmax, self.per, self.domains = source.qmax, source.per, source.domains  # type: ignore[misc]
        mean, std = (
            torch.cat([t.view(-1), t.view(-1).mean(0, keepdim=True)])[:, None] for t in (source.mean, source.std)
        )
        reach = source.alpha * std
        wanted = torch.arange(1, self.qmax + 1, device=mean.device)
        self.register_buffer(
            "thresholds",
            switching_points(lambda x: source.place(x, mean, source.spread(std), reach).round(), wanted, len(mean)),
        )
        self.register_buffer("reach", reach)

    def encode(self, x: Tensor) -> tuple[Tensor, Decode]:
        """Codes 0 to n."""
        domain = self.scope.domain
        unseen = domain is None or self.domains == 1
        row = torch.full((len(x),), -1 if domain is None else 0, device=x.device) if unseen else domain
        thresholds, reach = self.thresholds[row], self.reach[row].view(-1, *(1,) * (x.ndim - 1))
        codes = torch.searchsorted(thresholds, x.detach().float().reshape(len(x), -1), right=True).view(x.shape)
        return codes.int(), lambda k: (k.to(reach.dtype) * (2 / self.qmax) - 1) * reach

    def quantize(self, x: Tensor) -> Tensor:
        """Without a gradient."""
        codes, decode = self.encode(x)
        return decode(codes).to(x.dtype)


class EmaQ(Method):
    """Efficient multi-domain alignment quantization (Yeh, Chen et al., arXiv 2606.04920v1).

    The paper was withdrawn by its submitter as premature; its numbers are unreviewed. Weights (Eq. 4 to 6) and inputs go through
    the CDF of the normal distribution fitted to them, inputs and norms by domain; the weights' gradient is Eq. 13. Each training
    domain is a client with a pass of its own, and their gradients are averaged in proportion to the clients' sensitivities (Eq. 15
    and 17). For SGD that equals client steps whose momentum buffers are averaged with the same weights, without a copy of the
    network for each. One domain: single-domain EmaQ. A domain unseen in training meets the mean of the domains' statistics.

    Departures, each a setting where it differs in kind. ``grid``: Eq. 6 has alpha 2^m + 1 levels, more than m bits hold; by default
    2^m levels as in the group's earlier code, and ``paper`` is planned and counted at the bits that it takes. ``act_at``: that code
    quantizes behind the norm and leaves residual sums in float, so convolutions read more than 2^a levels; by default the input of
    every layer is quantized, and ``post_bn`` is counted as float. ``aqgd_norm``: phi grows as 1 / sigma, so by default it is taken
    relative to its peak; ``none`` is Eq. 13, and ``ste`` is what the earlier code trains with. A layer without a norm behind it
    keeps its scale (alpha = 2 sigma), for nothing would undo another. Inputs have the CDF's own derivative, with the surrogate if
    ``act_surrogate``; the paper gives it for weights only. Neighbours of equal code, and neighbours across layers, are left out of
    Eq. 17. With ``norm="shared"`` the running statistics move once for each client, in their order. The first and last layer have
    8 bits by default, as elsewhere here. Momentum of each client's own, several local steps, and statistics of each channel are
    not offered.
    """

    name = "emaq"
    paper = "Yeh, Chen et al., Efficient multi-domain alignment quantization, arXiv 2606.04920v1 (withdrawn)"
    fidelity = "reconstruction"
    alters = frozenset({"norm", "step"})
    version = 3  # 3: norms start from the statistics of the quantized network
    beta: Tensor  # [domains, 1 or layers]

    class Params(Frozen):
        """Settings of EmaQ."""

        alpha: float = Field(2.0, gt=0, le=100, description="half the width of the weights' range")
        grid: Literal["true_bits", "paper"] = Field(
            "true_bits",
            description="true_bits: 2^m levels; paper: Eq. 6, alpha 2^m + 1 levels, counted at the bits these take",
        )
        aqgd_norm: Literal["sigma", "none", "ste"] = Field(
            "sigma",
            description="gradient of the weights: relative to its peak, Eq. 13 as it is, or autograd through the CDF",
        )
        act_at: Literal["input", "post_bn"] = Field(
            "input", description="where activations are quantized; post_bn: counted as float inputs"
        )
        act_surrogate: bool = Field(False, description="whether activations have the surrogate gradient, too")
        align: bool = Field(
            True, description="false: no CDF and none of its gradients, the ablation: an even grid within 2 sigma"
        )
        aggregation: Literal["swa", "awa"] = Field("swa", description="clients weigh by sensitivity, or equally")
        scope: Literal["network", "layer"] = Field(
            "network", description="one sensitivity a client, or one a layer of it"
        )
        sensitivity_decay: float = Field(
            0.0, ge=0, lt=1, description="of a moving average of the sensitivities; 0: none"
        )
        norm: Literal["local", "shared"] = Field("local", description="whose running statistics a BatchNorm has")

        @model_validator(mode="after")
        def _goes_together(self) -> Self:
            if self.act_at == "post_bn" and not self.align:
                raise ValueError(
                    "act_at=post_bn goes by the CDF of N(0, 1), which align=false leaves out; use act_at=input"
                )
            if self.act_surrogate and (self.aqgd_norm == "ste" or not self.align):
                raise ValueError("act_surrogate is for a CDF without aqgd_norm=ste, whose gradient it would replace")
            return self

    test_params: ClassVar[Mapping[str, object]] = {"sensitivity_decay": 0.5}

    # --- build

    def plan(self, sites: Sequence[Site], bits: Bits | Budget, probe: Probe) -> dict[str, Bits]:
        """As for every method; with ``grid="paper"`` and ``act_at="post_bn"`` the bits that it really takes."""
        plan = super().plan(sites, bits, probe)
        if self.params.grid == "paper":
            if isinstance(bits, Budget):
                raise RunFailed(
                    f"grid=paper takes more bits than the budget {bits} allows; give a width, or grid=true_bits"
                )
            kept = {name for name, word in edge_words(sites, self.edges).items() if word != "same"}
            taken = {b: Bits(*map(self._paper_bits, b)) for b in {b for name, b in plan.items() if name not in kept}}
            plan = {name: b if name in kept else taken[b] for name, b in plan.items()}
        if self.params.act_at == "post_bn":
            plan = {name: Bits(b.w, FLOAT_BITS) for name, b in plan.items()}
        return plan

    def _paper_bits(self, bits: int) -> int:
        """Whole bits that hold the levels of Eq. 6 at ``bits`` bits.

        Raises:
            RunFailed: These are more than 8, or there is one level only.
        """
        if bits == FLOAT_BITS:
            return bits
        levels = round(self.params.alpha * 2**bits) + 1
        held = math.ceil(math.log2(levels))
        if not 1 <= held <= 8:
            raise RunFailed(
                f"Eq. 6 with alpha={self.params.alpha:g} has {levels} levels at {bits} bits, and 2 to 256 are possible; "
                "give another width or alpha, or grid=true_bits"
            )
        log.info("Eq. 6 at %d bits has %d levels, %.2f bits: counted as %d", bits, levels, math.log2(levels), held)
        return held

    def _steps(self, bits: int) -> int | None:
        """Steps n of a quantizer that may take ``bits`` bits; None: 2^bits - 1."""
        if self.params.grid == "true_bits":
            return None
        alpha = self.params.alpha
        asked = max((m for m in range(bits + 1) if round(alpha * 2**m) + 1 <= 2**bits), default=0)
        return max(1, round(alpha * 2**asked))

    def replace(self, site: Site, module: nn.Module, scope: Scope) -> nn.Module:
        """A BatchNorm with statistics for each domain, followed by a quantizer where activations are quantized there."""
        domains, after = self.domains, None
        local = self.params.norm == "local" and domains > 1
        bits = parse_bits(self.spec.bits).a
        if self.params.act_at == "post_bn" and bits < FLOAT_BITS:
            through = self.params.aqgd_norm == "ste"
            surrogate = self.params.act_surrogate and not through
            after = self.norm_quantizer(
                bits, site, scope, through=through, surrogate=surrogate, steps=self._steps(bits)
            )
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or not (local or after):
            return module
        return DomainNorm(module, domains if local else 1, scope, after)

    def weight_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the weight's own CDF."""
        kind = CdfQuantizer if self.params.align else UnalignedWeight
        through, keeps_scale = self.params.aqgd_norm == "ste", site.norm is None or not self.params.align
        return kind(
            bits, site, scope, 2.0 if keeps_scale else self.params.alpha, through or not self.params.align,
            relative=keeps_scale, surrogate=self.params.align and not through,
            unit=self.params.align and self.params.aqgd_norm == "sigma" and not keeps_scale, steps=self._steps(bits),
        )  # fmt: skip

    def act_quantizer(self, bits: int, site: Site, scope: Scope) -> Quantizer:
        """Through the CDF of its domain's inputs."""
        kind = self.input_quantizer if self.params.align else UnalignedInput
        through = self.params.aqgd_norm == "ste" or not self.params.align
        return kind(
            bits, site, scope, through=through, domains=self.domains,
            surrogate=self.params.act_surrogate and not through, steps=self._steps(bits),
        )  # fmt: skip

    @property
    def domains(self) -> int:
        """How many domains are told apart, each a client."""
        return len(self.task.domains)

    @property
    def input_quantizer(self) -> Callable[..., Quantizer]:
        """What makes the quantizer of a layer's input."""
        return RunningCdfQuantizer

    @property
    def norm_quantizer(self) -> Callable[..., Quantizer]:
        """What makes the quantizer behind a norm."""
        return FixedCdfQuantizer

    def prepare(self, net: nn.Module) -> None:
        """The clients' sensitivities; 0 before the first step.

        Raises:
            RunFailed: ``act_at="post_bn"``, and there is no BatchNorm.
        """
        behind = any(isinstance(m, DomainNorm) and m.after is not None for m in net.modules())
        if self.params.act_at == "post_bn" and parse_bits(self.spec.bits).a < FLOAT_BITS and not behind:
            raise RunFailed(f"{self.spec.network} has no BatchNorm to quantize behind; set {self.name}.act_at to input")
        layers = len(list(quant_layers(net))) if self.params.scope == "layer" else 1
        self.register_buffer("beta", torch.zeros(self.domains, layers))

    # --- train

    def epoch_start(self, run: Run) -> None:
        """Tell the sensitivities."""
        if self.beta.any():
            told = zip(self.task.domains, self.beta.amax(1).tolist(), strict=True)
            log.info("sensitivities: %s", ", ".join(f"{name} {value:.4g}" for name, value in told))

    def step(self, run: Run) -> None:
        """A pass for each domain, and one update by the average of their gradients."""
        if self.domains == 1:
            run.backward()
            run.update()
            return
        parameters = [p for group in run.opt.param_groups for p in group["params"]]
        layers = enumerate(quant_layers(run.net))
        layer_of = {p: k for k, (_, layer) in layers for p in layer.parameters(recurse=False)}
        mean: dict[nn.Parameter, Tensor] = {}
        weight, of_others = Average(), Average()  # each a layer's own; what is of no layer goes by their mean
        for domain, part in run.batch.by_domain():
            with watched(run.net, self.params.aggregation == "swa") as seen:
                run.backward(part)
            for one, (_, layer) in zip(seen, quant_layers(run.net), strict=False):  # with awa none is seen
                if layer.weight.grad is None:  # somebody has frozen the layer
                    one.gradient = None
            beta = self._sensitivities(domain, seen)
            share, others = weight.add(beta), of_others.add(beta.mean())
            for p in parameters:
                if p.grad is None:
                    continue
                if p not in mean:
                    mean[p] = p.grad
                else:
                    own = len(share) > 1 and p in layer_of
                    mean[p].lerp_(p.grad, share[layer_of[p]] if own else others)
        for p, gradient in mean.items():
            p.grad = gradient
        run.update()

    @torch.no_grad()
    def _sensitivities(self, domain: int, seen: list[Seen]) -> Tensor:
        """Sensitivities of a client, beta: [1], or one for each layer."""
        if self.params.aggregation == "awa":
            return torch.ones_like(self.beta[domain])
        none = torch.tensor(-1.0, device=self.beta.device)
        each = torch.stack(
            [none if s.gradient is None else sensitivity(s.value, ranks.mean_(s.gradient)) for s in seen]
        )
        new = each if self.params.scope == "layer" else each.amax(0, keepdim=True)
        new = torch.where(new < 0, 1.0, new)  # weights that are all equal, or float
        old, decay = self.beta[domain], self.params.sensitivity_decay
        self.beta[domain] = torch.where(old == 0, new, decay * old + (1 - decay) * new)
        return self.beta[domain].clone()

    # --- use

    def deploy(self, run: Run) -> nn.Module:
        """Weights as codes, inputs by thresholds: no CDF is computed but behind norms (``act_at="post_bn"``)."""
        net = deployed(run.net)
        for module in net.modules():
            for name, child in module.named_children():
                if isinstance(child, RunningCdfQuantizer) and self.params.align:
                    setattr(module, name, Thresholds(child))
        return net


class Seen:
    """What a pass made of one layer's weight: the quantized values, and the loss's gradient in them, added over micro-batches."""

    def __init__(self) -> None:
        self.value: Tensor = torch.empty(0)
        self.gradient: Tensor | None = None

    def look(self, _module: nn.Module, _inputs: tuple[Tensor, ...], quantized: Tensor) -> None:
        """A forward hook of a weight quantizer."""
        if quantized.requires_grad:
            self.value = quantized.detach()
            quantized.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient


@contextmanager
def watched(net: nn.Module, on: bool) -> Iterator[list[Seen]]:
    """What passes in here make of each quantized weight, in the order of the layers; nothing unless ``on``."""
    quantizers = [layer.weight_quantizer for _, layer in quant_layers(net)] if on else []
    seen = [Seen() for _ in quantizers]
    pairs = zip(quantizers, seen, strict=True)
    handles = [q.register_forward_hook(s.look) for q, s in pairs if q is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sensitivity(value: Tensor, gradient: Tensor) -> Tensor:
    """``max_i |g_i - g_(i-1)| / |w_i - w_(i-1)|`` of a layer's quantized weights w and the gradient in them (Eq. 17).

    Neighbours on one level are left out; -1 if no others are left. Scalar.
    """
    apart, differ = value.flatten().diff().abs(), gradient.flatten().diff().abs()
    return torch.where(apart > 0, differ / apart, -1.0).amax() if len(apart) else value.new_tensor(-1.0)


class Average:
    """A weighted mean that is taken up term by term, so that no term need be kept.

    Weights that are all zero count equally.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.terms = 0

    def add(self, weight: Tensor) -> Tensor:
        """How far the mean moves towards the next term, 0 to 1: its weight as a share of all so far."""
        self.terms += 1
        self.total = weight.clone() if self.total is None else self.total + weight
        return torch.where(self.total > 0, weight / self.total, 1 / self.terms)
