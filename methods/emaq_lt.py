"""EmaQ-LT: EmaQ for long tails, with a CDF, a weight and a logit for each class (arXiv 2606.04920v1, section V)."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from scipy.special import fdtri
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench import ranks
from ..bench.errors import RunFailed
from ..bench.method import Out, Run
from ..bench.quant import CdfQuantizer, Quantizer, RunningCdfQuantizer, Scope, deployed
from ..bench.quant.cdf import MOMENTUM, normal_fit
from ..bench.site import Site
from .cb_focal import class_balanced
from .emaq import EmaQ, FixedCdfQuantizer
from .logit_adjust import log_counts, on_classes
from .tau_norm import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..bench.data import Batch

log = logging.getLogger("qatbench")

SHRINKAGE = 16  # images of a class in a batch at which its own statistics count as much as those of all
SMALLEST_LSE = 1e-2  # kappa would grow without bound
PART = 4096  # images whose features are held twice at a time


# --- the conditional CDF


class Conditional(CdfQuantizer):
    """A mixin before a CDF quantizer of activations: the CDF's deviation is ``s_c sigma``, by the class c of a sample (Eq. 19).

    The range of the levels does not depend on s, so a code has one value whatever the class. In training c is the label. In use it
    is unknown, and s is a constant, unless `predicted` says which class a sample is taken for.

    Args:
        bits, site, scope: See `Quantizer`.
        scale: s of each class, float [classes], as `class_scale` makes it.
        s_train: ``class``: s_c; ``batch``: ``2 - p_i / sum_j p_j`` over the batch, p the share of a sample's class in it.
        s_eval: ``const2``: 2 in use; otherwise its expectation over the training images.
        class_ema: Whether the CDF has class statistics, too. They are running averages relative to the statistics of all,
            ``(x - mu) / sigma`` of a class's samples, so that they are the same for all domains. A batch with n images of a class
            moves them towards ``lambda`` of what it measures and ``1 - lambda`` of 0 and 1, ``lambda = n / (n + 16)``.
        how: What the quantizer takes besides.
    """

    scale: Tensor
    class_mean: Tensor
    class_std: Tensor

    def __init__(
        self,
        bits: int,
        site: Site,
        scope: Scope,
        *,
        scale: Tensor,
        s_train: str,
        s_eval: str,
        class_ema: bool,
        **how: Any,
    ) -> None:
        super().__init__(bits, site, scope, **how)
        self.s_train, self.s_eval, self.class_ema, self._rank = s_train, s_eval, class_ema, 4
        self.expected = float(((2 - scale) * scale).sum())
        self.predicted: Tensor | None = None  # int64 [B]: what the samples are taken for in use
        self.by_sample = s_eval == "predicted"
        self.as_trained = False  # in use, s by the rule of training: for a comparison
        self.register_buffer("scale", scale, persistent=False)
        if class_ema:
            self.fused = False  # a class's mean follows the deviation of all
            self.register_buffer("class_mean", torch.zeros_like(scale))
            self.register_buffer("class_std", torch.ones_like(scale))

    @property
    def classes(self) -> Tensor | None:
        """Class of each sample, int64 [B], as far as it may be known."""
        return self.scope.labels if self.training else self.predicted

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a sample's class, if there are class statistics; the deviation of all, which gives the range."""
        mean, std = super().statistics(x)
        self._rank, classes = x.ndim, self.classes
        if not self.class_ema or classes is None:
            return mean, std
        if self.training and self.scope.track:
            self._follow(((x - mean) / std).detach(), classes)
        return mean + self._of_samples_of(self.class_mean[classes]) * std, std

    def spread(self, std: Tensor) -> Tensor:
        """``s sigma``."""
        classes = self.classes
        if classes is None:
            return std * (2.0 if self.s_eval == "const2" else self.expected)
        s = self.scale
        if self.s_train == "batch" and (self.training or self.as_trained):
            n = ranks.sum_(torch.bincount(classes, minlength=len(s)).to(s.dtype))
            s = 2 - n / n.square().sum()
        s = s[classes]
        if self.class_ema:
            s = s * self.class_std[classes]
        return std * self._of_samples_of(s)

    def constants(self) -> int:
        """The tables of classes are needed in use only where classes are predicted."""
        tables = self.scale.numel() * (3 if self.class_ema else 1)
        return super().constants() - (0 if self.s_eval == "predicted" else tables)

    def _of_samples_of(self, values: Tensor) -> Tensor:
        """[B] to [B, 1, ..]."""
        return values.view(-1, *(1,) * (self._rank - 1))

    def _follow(self, x: Tensor, classes: Tensor) -> None:
        """Move the class statistics towards those of a batch; of a class that is absent they stay."""
        n = len(self.scale)
        count = ranks.sum_(torch.bincount(classes, minlength=n).to(x.dtype))
        own = count / (count + SHRINKAGE)
        mean, std = normal_fit(x, classes, n, together=True)
        for ours, theirs, of_all in ((self.class_mean, mean, 0.0), (self.class_std, std, 1.0)):
            shrunk = own * theirs + (1 - own) * of_all
            ours.lerp_(torch.where(count > 0, shrunk.to(ours.dtype), ours), MOMENTUM)


class ConditionalInput(Conditional, RunningCdfQuantizer):
    """Inputs by their domain's statistics and their class's s."""


class ConditionalNorm(Conditional, FixedCdfQuantizer):
    """What a norm has made, by N(0, s_c)."""


@contextmanager
def taken_for(net: nn.Module, classes: Tensor) -> Iterator[None]:
    """In here the quantizers in use take the samples for these classes, int64 [B]."""
    quantizers = [m for m in net.modules() if isinstance(m, Conditional)]
    try:
        for quantizer in quantizers:
            quantizer.predicted = classes
        yield
    finally:
        for quantizer in quantizers:
            quantizer.predicted = None


def class_scale(counts: Sequence[float]) -> Tensor:
    """``s_c = 2 - n_c / N`` (Eq. 18), float [classes]: the rarer, the wider; 2 of a class without images."""
    n = torch.tensor(counts, dtype=torch.float64)
    return (2 - n / n.sum()).float()


# --- the homogenised loss


def deviations(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``z_i = sum_f |h_if - mean_cf|``: how far an image's features are from the mean of its class, float64 [N].

    Args:
        features: float [N, F]; taken in parts, for it may be most of the memory.
        labels: int64 [N].
        classes: How many classes there are.
    """
    count = torch.bincount(labels, minlength=classes).clamp(min=1).to(features.dtype)
    mean = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features) / count[:, None]
    parts = zip(features.split(PART), labels.split(PART), strict=True)
    return torch.cat([(h - mean[y]).abs().sum(1).double() for h, y in parts])


def levene_bounds(z: Tensor, labels: Tensor, counts: Sequence[int], zeta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Between which sizes a class passes Levene's test of equal variances (Eq. 20 to 22, Theorem 4).

    The test holds if ``W = S_B / S_W`` is below the critical value F of the F distribution; solved for ``n_c`` this is an interval
    with the ends ``((2 m A + C_c) -+ sqrt((2 m A + C_c)^2 - 4 m^2 A^2)) / (2 m^2)``, m the mean of the classes' means of z,
    A the sum of a class's z, and ``C_c = (C - 1) F S_W - sum over j not c of n_j (m_j - m)^2``. Where C_c is negative, since the
    other classes alone fail the test, it counts as 0: both ends are ``A / m``. Where all z are 0, both are n_c. Classes without an
    image take no part.

    Args:
        z: float64 [N], see `deviations`.
        labels: int64 [N].
        counts: Images of each class.
        zeta: Level of the test.

    Returns:
        Lower end, upper end, ``C_c``: float64 [classes] each; never NaN.
    """
    n = torch.tensor(counts, dtype=torch.float64, device=z.device)
    classes, images = sum(k > 0 for k in counts), sum(counts)
    total = z.new_zeros(len(counts)).index_add_(0, labels, z)
    mean = total / n.clamp(min=1)
    grand = mean.sum() / max(classes, 1)
    within = (z - mean[labels]).square().sum() / max(images - classes, 1)
    between = n * (mean - grand).square()
    critical = float(fdtri(classes - 1, images - classes, 1 - zeta)) if images > classes > 1 else 0.0
    c = (classes - 1) * critical * within - (between.sum() - between)
    room, pole = c.clamp(min=0), total / grand
    high = pole + (room + (room * (room + 4 * grand * total)).sqrt()) / (2 * grand.square())
    low = torch.where(high > 0, pole.square() / high, 0.0)  # their product is pole^2; a difference would lose digits
    known = (grand > 0) & (n > 0)
    return torch.where(known, low, n), torch.where(known, high, n), c


def distance(counts: Sequence[int], low: Tensor, high: Tensor) -> Tensor:
    """``d_c``: by how many images a class is outside its bounds (Eq. 23), float64 [classes]. Rounding counts as inside."""
    n = torch.tensor(counts, dtype=torch.float64, device=low.device)
    d = (low - n).clamp(min=0) + (n - high).clamp(min=0)
    return torch.where(d > 1e-9 * n, d, 0.0)


def class_weights(d: Tensor, counts: Sequence[float], rho: float, mode: str) -> Tensor:
    """``omega_c = (1 - rho^(1/d)) / (1 - rho^(n/d))`` (Eq. 24), float [classes]; 0 of a class without images.

    Args:
        d: float64 [classes], see `distance`.
        counts: Images of each class, see `Task.class_sizes`.
        rho: Between 0 and 1.
        mode: ``paper``: 1 for a class inside its bounds (d = 0), while one far outside has 1 / n. ``normalised``: inside, as with
            d = 1, and so where d is below 1; the weights of the classes that occur have the mean 1. ``cb``: `class_balanced`.
            ``none``: 1.
    """
    if mode == "none":
        return torch.ones(len(counts), device=d.device)
    if mode == "cb":
        return class_balanced(counts, rho).to(d.device)
    n = torch.tensor(counts, dtype=torch.float64, device=d.device)
    outside = d > 0
    exponent = math.log(rho) / torch.where(outside, d, 1.0).clamp(min=0.0 if mode == "paper" else 1.0)
    weight = torch.expm1(exponent) / torch.expm1(exponent * torch.where(n > 0, n, 1.0))
    if mode == "paper":
        weight = torch.where(outside, weight, 1.0)
    weight = torch.where(n > 0, weight, 0.0)
    return (weight * ((n > 0).sum() / weight.sum()) if mode == "normalised" else weight).float()


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the softmax of float [B, classes] with one-hot targets, a mean over the classes; float [B]."""
    log_p = F.log_softmax(logits, dim=1)
    log_not = (-torch.expm1(log_p)).clamp(min=1e-12).log()
    return -torch.where(F.one_hot(labels, logits.shape[1]).bool(), log_p, log_not).mean(1)


# --- the logits


def confidence(logits: Tensor, log_n: Tensor) -> Tensor:
    """``s(x) = log sum_l exp f_l(x) * log n`` (Eq. 25), float [B]. ``logits``: float [B, classes], ``log_n``: float [B]."""
    return logits.logsumexp(1) * log_n


class EmaQLT(EmaQ):
    """EmaQ-LT, the long-tailed extension of EmaQ (Yeh, Chen et al., arXiv 2606.04920v1, section V): our reconstruction.

    The paper was withdrawn by its submitter as premature; its numbers are unreviewed. What it adds to `EmaQ`, inside each client:

    - Activations go through the CDF of ``N(mu, s_c sigma)``, ``s_c = 2 - n_c / N`` (Eq. 18 and 19). Weights, which have no class,
      do as before.
    - The task's loss is ``1/B sum_i omega_y l_i`` (Eq. 24). omega follows from how far a class is outside its bounds in Levene's
      test of equal variances of the features before the classifier, in eval mode over the training set, before training and every
      ``refresh`` epochs.
    - The logit of the true class is lowered by ``s(x) = LSE(f) log n_y`` in the training loss (CLA, Eq. 25 to 27).

    What the paper leaves open, each a setting. ``stats``: mu and sigma are the batch's, or class statistics enter the CDF; with
    ``act_at="post_bn"`` they are 0 and 1, as in ClimbQ's code. ``s_eval``: labels are unknown in use; s is 2 as in that code, or
    the expectation over the training images, or that of the class that a first pass predicts. ``omega``: by the formula a class
    inside its bounds has the weight 1 and one outside about 1 / n; by default inside counts as d = 1, and the mean weight is 1.
    ``cla``: as it is written it asks for a larger margin of *frequent* classes, against Menon et al., and for one that cannot be
    reached, since s grows with the logits that it raises: the training loss rises, and more steps do more harm.
    ``posthoc_classwise`` adjusts all logits in use instead, and ``all`` is a control that changes nothing. s(x) has no gradient,
    unless ``cla_gradient``.

    Departures: a negative C_c counts as 0 (ClimbQ's code has NaN there, and takes the class for one inside); classes without
    images take no part; the bounds are not those of every batch; with several domains, s, omega and n are of all domains together,
    each weighing the same, as in the batches. By default s in training is not s in use: how far that moves the codes is told after
    each validation. ``s_eval="expected"`` is nearer. Nor is that all: the label is in every activation, in s, and networks learn to
    read it, more so with more bits; what they learn that way is lost in use. ``s_train="batch"`` gives next to nothing away: s is
    about 2 for all.
    """

    name = "emaq-lt"
    version = 4  # 4: domains of unequal size count alike, as in the batches
    alters = frozenset({"norm", "step", "logits", "loss"})

    head: str = ""
    omega: Tensor  # float [classes]
    log_n: Tensor  # float [classes]
    lse: Tensor  # running mean of the training images' log-sum-exp; 0 before the first step

    class Params(EmaQ.Params):
        """Settings of EmaQ-LT."""

        conditional: bool = Field(
            True,
            description="whether s depends on the class; false: s = 1, the ablation, as where align=false leaves no CDF",
        )
        stats: Literal["batch_global", "class_ema"] = Field(
            "batch_global", description="whose mean and deviation the CDF has"
        )
        s_train: Literal["class", "batch"] = Field(
            "class", description="s in training; batch: as in ClimbQ's code, about 2 for all"
        )
        s_eval: Literal["const2", "expected", "predicted"] = Field(
            "const2", description="s in use; predicted: two passes"
        )
        omega: Literal["normalised", "paper", "cb", "none"] = Field(
            "normalised", description="weights of the classes; cb: by their size alone; none: the ablation"
        )
        rho: float = Field(0.999, gt=0, lt=1, description="of the weights of the classes")
        zeta: float = Field(0.05, gt=0, lt=1, description="level of Levene's test")
        refresh: int = Field(10, ge=0, description="epochs between two tests; 0: one, before training")
        loss: Literal["ce", "bce"] = Field("ce", description="of an image: cross-entropy, or binary of the softmax")
        cla: Literal["true_logit_train", "posthoc_classwise", "all", "none"] = Field(
            "true_logit_train",
            description="which logits are adjusted; all: a control without effect; none: the ablation",
        )
        cla_gradient: bool = Field(False, description="whether the adjustment has a gradient")
        kappa: float | None = Field(
            None, ge=0, le=100, description="of posthoc_classwise; None: 1 / mean log-sum-exp of the training images"
        )

    test_params: ClassVar[Mapping[str, object]] = {"sensitivity_decay": 0.5, "refresh": 2}

    # --- build

    @property
    def input_quantizer(self) -> Callable[..., Quantizer]:
        """Conditional on the class."""
        return self._by_class(ConditionalInput) if self.params.conditional else super().input_quantizer

    @property
    def norm_quantizer(self) -> Callable[..., Quantizer]:
        """Conditional on the class."""
        return self._by_class(ConditionalNorm) if self.params.conditional else super().norm_quantizer

    def _by_class(self, kind: type[Conditional]) -> Callable[..., Quantizer]:
        p = self.params
        how = {"s_train": p.s_train, "s_eval": p.s_eval, "class_ema": p.stats == "class_ema"}
        return functools.partial(kind, scale=class_scale(self.task.class_sizes), **how)

    def replace(self, site: Site, module: nn.Module, scope: Scope) -> nn.Module:
        """As `EmaQ`; and notes which module the head is."""
        if site.kind == "head":
            self.head = site.name
        return super().replace(site, module, scope)

    def prepare(self, net: nn.Module) -> None:
        """The classes' weights, as if all were inside their bounds before the first test, and the logarithms of their sizes.

        Raises:
            RunFailed: There is no classifier whose features could be tested.
        """
        super().prepare(net)
        counts, p = self.task.class_sizes, self.params
        if self._tests and not self.head:
            raise RunFailed(
                f"{self.name} tests the features before the classifier, and {self.spec.network} does not end in a linear layer; "
                f"set {self.name}.omega to cb or none"
            )
        self.register_buffer("omega", class_weights(torch.zeros(len(counts)), counts, p.rho, p.omega))
        self.register_buffer("log_n", log_counts(counts), persistent=False)
        self.register_buffer("lse", torch.zeros(()))
        self._lses: list[Tensor] = []

    # --- train

    @property
    def _tests(self) -> bool:
        return self.params.omega in ("normalised", "paper")

    def epoch_start(self, run: Run) -> None:
        """Test the classes anew, if it is time; every rank on all images."""
        super().epoch_start(run)
        epoch, refresh = self.scope.epoch, self.params.refresh
        if not self._tests or (epoch % refresh if refresh else epoch):
            return
        counts = self.task.class_counts
        features, labels = self.features(run)
        z = ranks.mean_(deviations(features, labels, len(counts)))  # ranks may differ in the last running statistics
        low, high, _ = levene_bounds(z, labels, counts, self.params.zeta)
        d = distance(counts, low, high)
        self.omega.copy_(class_weights(d, self.task.class_sizes, self.params.rho, self.params.omega))
        outside, lowest, highest = int((d > 0).sum()), float(self.omega.min()), float(self.omega.max())
        log.info(
            "Levene: %d of %d classes outside their bounds, weights %.3g to %.3g", outside, len(d), lowest, highest
        )

    @torch.no_grad()
    def features(self, run: Run) -> tuple[Tensor, Tensor]:
        """What the head is given, a mean over places, in eval mode: float [N, F] of all training images, and their labels."""
        seen: list[Tensor] = []
        labels: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            h = inputs[0].float()
            seen.append(h.reshape(len(h), -1, h.shape[-1]).mean(1))

        handle = run.net.get_submodule(self.head).register_forward_pre_hook(keep)
        try:
            with evaluating(run.net):
                for batch in run.train_batches():
                    self._look(run.net, batch)
                    labels.append(batch.y)
        finally:
            handle.remove()
        return torch.cat(seen), torch.cat(labels)

    def _look(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logits of a pass in which quantizers may know as much as in use."""
        self.scope.domain, self.scope.labels, self.scope.track = batch.domain, None, False
        with self._autocast():
            return net(batch.x)

    def losses(self, out: Out, batch: Batch) -> dict[str, Tensor]:
        """The task's, with the homogenised loss for ``task``; a head of superclasses is left alone."""
        logits = self.task.heads(out.logits)[""].float()
        if self.params.cla == "posthoc_classwise" and self.scope.track:
            self._lses.append(logits.detach().logsumexp(1).mean())
        loss = binary_loss if self.params.loss == "bce" else functools.partial(F.cross_entropy, reduction="none")
        each = loss(self.adjusted(logits, batch.y), batch.y)
        return self.task.losses(out.logits, batch) | {"task": (self.omega[batch.y] * each).mean()}

    def after_update(self, run: Run) -> None:
        """Follow the log-sum-exp, once a step."""
        if self._lses:
            new = ranks.mean_(torch.stack(self._lses).mean())
            self.lse.copy_(torch.where(self.lse == 0, new, self.lse.lerp(new, MOMENTUM)))
            self._lses.clear()

    def adjusted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits of the training loss, phi of Eq. 26: float [B, classes]; labels: int64 [B]."""
        if self.params.cla not in ("true_logit_train", "all"):
            return logits
        s = confidence(logits if self.params.cla_gradient else logits.detach(), self.log_n[labels])[:, None]
        return logits - (s if self.params.cla == "all" else s * F.one_hot(labels, logits.shape[1]))

    @torch.no_grad()
    def validated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Tell how far codes in training are from those in use, on the probe: what s alone makes of them."""
        super().validated(run, metrics)
        quantizers = [m for m in run.net.modules() if isinstance(m, Conditional)]
        apart: list[Tensor] = []

        def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Conditional)
            known, in_use = module.predicted, module.encode(inputs[0])[0]
            module.predicted, module.as_trained = run.probe.y, True
            apart.append((module.encode(inputs[0])[0] - in_use).abs().float().mean())
            module.predicted, module.as_trained = known, False

        with evaluating(run.net), contextlib.ExitStack() as undo:
            if quantizers and self.params.s_eval == "predicted":
                first = self.task.heads(self._look(run.net, run.probe))[""].argmax(1)
                undo.enter_context(taken_for(run.net, first))
            for module in quantizers:
                undo.callback(module.register_forward_pre_hook(compare).remove)
            if quantizers:
                self._look(run.net, run.probe)
        if apart:
            log.info(
                "s in training and in use: codes of activations differ by %.3f on average", torch.stack(apart).mean()
            )

    # --- use

    @property
    def _predicts(self) -> bool:
        """Whether a second pass has another s than the first."""
        return self.params.s_eval == "predicted" and self.params.conditional and self.params.align

    def predict(self, net: nn.Module, batch: Batch) -> Tensor:
        """Logits, of a second pass where the first tells s; adjusted with ``cla="posthoc_classwise"``."""
        logits = super().predict(net, batch)
        if self._predicts:
            with taken_for(net, self.task.heads(logits)[""].argmax(1)):
                logits = super().predict(net, batch)
        if self.params.cla != "posthoc_classwise":
            return logits
        size = torch.where(self.lse == 0, 1.0, self.lse.abs().clamp(min=SMALLEST_LSE).copysign(self.lse))
        kappa = 1 / size if self.params.kappa is None else self.params.kappa
        lse = self.task.heads(logits)[""].logsumexp(1, keepdim=True)
        return logits - kappa * lse * on_classes(self.log_n, self.task)

    def deploy(self, run: Run) -> nn.Module:
        """As `EmaQ`; where s is predicted, thresholds would be each sample's own, and the quantizers stay."""
        return deployed(run.net) if self._predicts else super().deploy(run)
