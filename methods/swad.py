"""SWAD: the mean of all weights of the steps in a valley of the validation loss (Cha et al., NeurIPS 2021)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bench import ranks
from ..bench.errors import RunFailed
from ..bench.method import Run, Stage, Wrapper
from ..bench.quant.layer import measured_norms
from ..bench.spec import Frozen
from .ldam_drw import LDAMDRW
from .tau_norm import TauNorm, evaluating

log = logging.getLogger("qatbench")


def valley(losses: Sequence[float], converged: int, patience: int, tolerance: float) -> tuple[int, int] | None:
    """First and one past the last interval of the valley; None if the loss has not converged (Algorithm 1 of the paper).

    It begins with the first interval whose loss is the smallest of ``converged`` in a row; their mean is the level. It ends before
    the first one from which on, for ``patience`` intervals or to the end, all losses exceed the level by more than ``tolerance``.

    >>> valley([3, 2, 1, 2, 3, 4, 5, 6, 7, 8], 3, 6, 0.3)
    (2, 4)
    """
    for begin in range(len(losses) - converged + 1):
        window = losses[begin : begin + converged]
        if window[0] == min(window):
            break
    else:
        return None
    level, end = (1 + tolerance) * sum(window) / converged, begin + 1
    while end < len(losses) and min(losses[end : end + patience]) <= level:
        end += 1
    return begin, end


class SWAD(Wrapper):
    """Stochastic weight averaging, densely (Cha et al. 2021, arXiv 2102.08604), around any method that trains.

    The weights of every step are averaged from when the validation loss (the mean over domains) stops falling until it rises; the
    intervals between two looks at it are epochs. When training ends the network gets the mean in place of the last weights, and the
    statistics of its BatchNorms are measured anew, on one epoch of training batches. Learned steps and other state of quantizers in
    floating point are averaged as the weights are. If the loss has not converged, the mean is that of the last epoch, as in the
    authors' code (khanrc/swad).

    What is measured after each epoch, and stands in the curves, is the network under training. SWAD chooses its weights itself, so
    it needs ``selection=last`` and validation images. The authors look every 50 to 300 steps: short epochs suit it, and fewer than
    ``converged`` of them cannot converge.

    Memory: as many copies of the network as the larger patience says, and two more, also in each checkpoint.
    """

    name = "swad"
    paper = "Cha et al., SWAD: Domain generalization by seeking flat minima, NeurIPS 2021, arXiv 2102.08604"
    fidelity = "paper"
    default_inner = "lsq"

    class Params(Frozen):
        """Settings of SWAD."""

        converged: int = Field(
            3, ge=1, le=1000, description="epochs without a smaller loss that make it converged (N_s)"
        )
        patience: int = Field(6, ge=1, le=1000, description="epochs of too large a loss that end the valley (N_e)")
        tolerance: float = Field(
            0.3,
            ge=0,
            le=1000,
            description="how far above its level at the start, relative, a loss is too large (r - 1)",
        )
        start: float = Field(
            0.0, ge=0, le=1, description="share of the epochs that are not looked at, e.g. until qt-dog quantizes"
        )

    losses_by_epoch: Tensor
    """float64 [epochs], validation losses of the epochs that were looked at, from the first on."""
    looked: Tensor
    """int64 [], how many they are."""
    epoch_mean: Tensor
    """Float [P], the mean over the steps of the epoch under way of all that is averaged."""
    steps_in_mean: Tensor
    """int64 []."""
    recent: Tensor
    """Float [larger patience, P], the same of the last epochs; epoch t is at t modulo their number."""
    average: Tensor
    """Float [P], the mean over the valley so far."""
    averaged: Tensor
    """int64 [], epochs in it."""

    def prepare(self, net: nn.Module) -> None:
        """Room for the means."""
        size = len(flat(net))
        kept = max(self.params.converged, self.params.patience)
        device = next(net.parameters()).device
        for name, shape in (("epoch_mean", (size,)), ("recent", (kept, size)), ("average", (size,))):
            self.register_buffer(name, torch.zeros(shape, device=device))
        epochs = max(self.spec.epochs, 1)
        self.register_buffer("losses_by_epoch", torch.zeros(epochs, dtype=torch.float64, device=device))
        for name in ("looked", "steps_in_mean", "averaged"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    def start(self, run: Run, stage: Stage) -> None:
        """Refuses what leaves it nothing to choose by, or chooses after it. A later stage, e.g. ``crt``'s, begins anew."""
        if not run.method.data.val_domains:
            raise RunFailed("swad looks at the loss on validation images, and this split has none; give it some (val)")
        if self.spec.selection != "last":
            raise RunFailed(
                f"swad chooses the weights itself, so selection={self.spec.selection} cannot; use selection=last"
            )
        self.looked.zero_()
        self.averaged.zero_()

    def epoch_start(self, run: Run) -> None:
        """A new mean."""
        self.steps_in_mean.zero_()

    def after_update(self, run: Run) -> None:
        """The step's weights join the epoch's mean."""
        if self._looks():
            self.steps_in_mean.add_(1)
            self.epoch_mean.lerp_(flat(run.net), 1 / self.steps_in_mean.to(self.epoch_mean.dtype))

    def _looks(self) -> bool:
        """Whether the epoch under way is one that is looked at; the last one always is."""
        return self.scope.epoch >= min(round(self.params.start * self.scope.epochs), self.scope.epochs - 1)

    def validated(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Take in the epoch; after the last one put the mean into the network."""
        if not self._looks():
            return
        now = int(self.looked)
        loss = torch.tensor(metrics["val/loss"], dtype=torch.float64, device=self.looked.device)
        self.losses_by_epoch[now].copy_(ranks.mean_(loss))
        self.recent[now % len(self.recent)].copy_(self.epoch_mean)
        self.looked.add_(1)
        last = self.scope.epoch == self.scope.epochs - 1
        self._average(now + 1, last)
        if last:
            self._finish(run)

    def _average(self, seen: int, last: bool) -> None:
        """Add the epochs of which it is certain that they are in the valley; at the end, those that have not left it."""
        params, losses = self.params, self.losses_by_epoch[:seen].tolist()
        found = valley(losses, params.converged, params.patience, params.tolerance)
        if found is None:
            if last:
                self.average.copy_(self.recent[(seen - 1) % len(self.recent)])
                log.info("swad: the validation loss has not converged; the mean is that of the last epoch")
            return
        begin, end = found
        for t in range(begin + int(self.averaged), end):
            if not last and t + params.patience > seen:
                break
            self.averaged.add_(1)
            self.average.lerp_(self.recent[t % len(self.recent)], 1 / self.averaged.to(self.average.dtype))
        if last:
            log.info("swad: the mean is over epochs %d to %d of %d that were looked at", begin + 1, end, seen)

    def _finish(self, run: Run) -> None:
        load_flat(run.net, self.average)
        still = {p for member in run.method.members for p in member.frozen(run)}
        with evaluating(run.net), measured_norms(run.net, still) as norms:
            if norms:
                for batch in run.method.data.train_dataloader():
                    self.scope.domain, self.scope.labels, self.scope.track = batch.domain, None, False
                    with self._autocast():
                        run.net(batch.x)
        for norm in norms:
            ranks.mean_(norm.running_mean)
            ranks.mean_(norm.running_var)
        for member in run.method.members:
            if isinstance(member, LDAMDRW | TauNorm):  # what they note of the head is of other weights
                member.measure(run.net)


def averaged_state(net: nn.Module) -> list[Tensor]:
    """What SWAD averages: all parameters and all buffers in floating point that a checkpoint holds."""
    return [v for v in net.state_dict(keep_vars=True).values() if isinstance(v, Tensor) and v.is_floating_point()]


def flat(net: nn.Module) -> Tensor:
    """`averaged_state` in one float32 vector [P]."""
    return torch.cat([v.detach().float().reshape(-1) for v in averaged_state(net)])


def load_flat(net: nn.Module, values: Tensor) -> None:
    """Put a vector made by `flat` back in its places."""
    state = averaged_state(net)
    for value, part in zip(state, values.split([v.numel() for v in state]), strict=True):
        value.detach().copy_(part.view(value.shape))
