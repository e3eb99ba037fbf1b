"""cRT: the classifier is trained again, on classes that come equally often, over features that stay (Kang et al. 2020)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ..bench.errors import RunFailed
from ..bench.method import Run, Stage, Wrapper
from ..bench.quant import QuantLayer, Scope
from ..bench.quant.layer import BATCH_NORMS
from ..bench.seeds import seed_for
from ..bench.site import Site
from ..bench.spec import Frozen


class HeadWrapper(Wrapper):
    """A wrapper that acts on the network's head, whatever another method has put there."""

    head: str = ""
    """Name of the head's module."""

    def replace(self, site: Site, module: nn.Module, scope: Scope) -> nn.Module:
        """Replaces nothing; notes which module the head is."""
        if site.kind == "head":
            self.head = site.name
        return module

    def prepare(self, net: nn.Module) -> None:
        """Refuses a network without a linear head."""
        self.head_layer(net)

    def head_layer(self, net: nn.Module) -> nn.Linear | QuantLayer:
        """The linear layer of the head."""
        parts = net.get_submodule(self.head).modules() if self.head else ()
        for module in parts:
            if isinstance(module, nn.Linear | QuantLayer):
                return module
        raise RunFailed(
            f"{self.name} acts on the classifier, and {self.spec.network} does not end in a linear layer; give it one"
        )


class CRT(HeadWrapper):
    """Classifier re-training (Kang et al. 2020, arXiv 1910.09217) around any method that trains.

    First the inner method's training; then the head starts anew and is trained alone, each class equally often. Meanwhile no other
    parameter moves, and norms and quantizers are in eval mode. The authors' code keeps the frozen network in training mode, so that
    norms take each batch's statistics, and the running ones drift to class-balanced images: ``norms="train"``. The head's weight
    quantizer is fitted to the new weights, since its step was learned for others; the head's input quantizer is the head's, and
    learns on.

    Departure: the paper adds 10 epochs to a full training. Here all methods have the same epochs, so the second stage takes a share
    of them; a run of one epoch has none. Inner methods that go by the length of training count both stages. A loss that makes up
    for the sizes of classes does so in the second stage, too, on top of equally frequent classes.
    """

    name = "crt"
    version = 2  # 2: in a chain, nobody's norm or perturbation has the frozen parameters in it
    paper = (
        "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020, arXiv 1910.09217"
    )
    fidelity = "paper"
    default_inner = "lsq"

    class Params(Frozen):
        """Settings of cRT."""

        share: float = Field(
            0.2, gt=0, lt=1, description="of the epochs for the classifier alone; at least one of each kind"
        )
        lr: float = Field(1.0, gt=0, le=100, description="factor on the learning rate while the classifier trains")
        norms: Literal["eval", "train"] = Field(
            "eval", description="mode of the frozen network's norms meanwhile; train: as in the authors' code"
        )

    def stages(self, epochs: int) -> list[Stage]:
        """The inner method's, shortened, and ``classifier``."""
        last = min(max(1, round(self.params.share * epochs)), epochs - 1)
        if last < 1:
            return self.inner.stages(epochs)
        return [*self.inner.stages(epochs - last), Stage("classifier", last, "class_balanced", self.params.lr)]

    @property
    def classifier_alone(self) -> bool:
        """Whether the second stage is on; from the epoch, so that a resumed run knows it."""
        *before, last = self.stages(self.spec.epochs)
        return last.name == "classifier" and self.scope.epoch >= sum(stage.epochs for stage in before)

    def start(self, run: Run, stage: Stage) -> None:
        """A fresh head, as PyTorch initialises a linear layer, and no momentum from the old one."""
        if stage.name != "classifier":
            return
        layer = self.head_layer(run.net)
        rng = torch.Generator().manual_seed(seed_for("crt", self.spec.seed))
        bound = layer.weight.shape[1] ** -0.5
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
            layer.weight_quantizer.fit(layer.weight)
        for parameter in run.net.get_submodule(self.head).parameters():
            run.opt.state.pop(parameter, None)

    def epoch_start(self, run: Run) -> None:
        """In the second stage, all but the head in eval mode, so that running statistics stay; or all but head and norms."""
        if self.classifier_alone:
            learns = set(run.net.get_submodule(self.head).modules())
            norms = BATCH_NORMS if self.params.norms == "train" else ()
            for module in run.net.modules():
                module.training = module in learns or isinstance(module, norms)

    def frozen(self, run: Run) -> Collection[nn.Parameter]:
        """In the second stage, all but the head."""
        if not self.classifier_alone:
            return ()
        head = set(run.net.get_submodule(self.head).parameters())
        return [p for p in run.method.parameters() if p not in head]
