"""Small tensors through every method whose authors left code: the values are those of their code, on the same tensors.

Each number was made by running the public repository that the method's docstring or comment names, and written down.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from qatbench.bench.data import Batch
from qatbench.bench.method import Out, Wrapper
from qatbench.bench.quant import CdfQuantizer, Quantizer, Scope
from qatbench.bench.site import Site
from qatbench.bench.task import Task
from qatbench.methods.apot import AdditivePowers
from qatbench.methods.balanced_softmax import BalancedSoftmax
from qatbench.methods.cb_focal import CBFocal
from qatbench.methods.dorefa import TanhWeight
from qatbench.methods.emaq_lt import ConditionalNorm, class_scale
from qatbench.methods.ldam_drw import LDAMDRW, CosineHead
from qatbench.methods.logit_adjust import LogitAdjust
from qatbench.methods.lsq import LSQ, LearnedStep
from qatbench.methods.lsqplus import LearnedStepOffset
from qatbench.methods.n2uq import FilterWeight, LearnedThresholds
from qatbench.methods.sagm import SAGM
from qatbench.methods.sam import SAM
from qatbench.methods.tau_norm import TauNorm
from torch import Tensor, nn

W = [[-0.9, -0.31, 0.05, 0.44], [0.12, 0.77, -0.58, 0.23]]
ONE_TO_EIGHT = [[1.0, 2, 3, 4], [5, 6, 7, 8]]
U = [1.0, 2, 3, 4, 5, 6]
SITE = Site("layer", "layer", (2,), weights=8, inputs=6, norm="bn")


def near(found: Tensor | None, expected: Any) -> None:
    """To 2e-5, whatever the size of the numbers."""
    assert found is not None
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=2e-5, atol=2e-5)


def through(quantizer: Quantizer, x: Any, upstream: Any) -> tuple[Tensor, Tensor | None]:
    """What it makes of x, and the gradient of x for one of the result."""
    leaf = torch.tensor(x, requires_grad=True)
    out = quantizer(leaf)
    out.backward(torch.tensor(upstream))
    return out, leaf.grad


@pytest.mark.parametrize(
    ("bits", "step", "values", "gradient"),
    [
        (2, 0.85, [[-0.85, 0, 0, 0.85], [0, 0.85, -0.85, 0]], -0.702947),
        (4, 0.32127, [[-0.963809, -0.32127, 0, 0.32127], [0, 0.64254, -0.64254, 0.32127]], -0.741901),
    ],
)
def test_lsq(bits: int, step: float, values: list, gradient: float) -> None:
    """LSQ would start, round or learn otherwise than the published code (zhutmost/lsq-net, hustzxd/LSQuantization)."""
    quantizer = LearnedStep(bits, SITE, Scope(), True, 8)
    quantizer.fit(torch.tensor(W))
    near(quantizer.step, step)
    out, gx = through(quantizer, W, ONE_TO_EIGHT)
    near(out, values)
    near(gx, ONE_TO_EIGHT)
    near(quantizer.step.grad, gradient)


def test_lsqplus_activations() -> None:
    """Step and offset would get other gradients than Eq. 8 and 9 (ZouJiu1/LSQplus)."""
    quantizer = LearnedStepOffset(4, SITE, Scope(), 6, 50)
    quantizer.grad_scale = 1.0
    with torch.no_grad():
        quantizer.step.fill_(0.1)
        quantizer.offset.fill_(-0.2)
    out, gx = through(quantizer, [-0.5, -0.15, 0, 0.4, 0.9, 2], U)
    near(out, [-0.2, -0.2, 0, 0.4, 0.9, 1.3])
    near(gx, [0.0, 2, 3, 4, 5, 0])
    near(quantizer.step.grad, 89.0)
    near(quantizer.offset.grad, 7.0)


@pytest.mark.parametrize(
    ("bits", "values", "gradient"),
    [
        (2, [0.0, 0, 1, 2, 4, 4], 5.55),
        (3, [0, 0.4, 1.2, 2.4, 4, 4], 6.3),
        (4, [0, 0.333333, 1, 2, 4, 4], 5.716667),
    ],
)
def test_apot_activations(bits: int, values: list, gradient: float) -> None:
    """Levels, or the gradient of the range, would be others than in yhhhli/APoT_Quantization."""
    quantizer = AdditivePowers(bits, SITE, Scope(), False, 4.0, "paper")
    out, gx = through(quantizer, [0, 0.4, 1.1, 2.3, 3.9, 5.2], U)
    near(out, values)
    near(gx, [1.0, 2, 3, 4, 5, 0])
    near(quantizer.alpha.grad, gradient)


def test_n2uq() -> None:
    """Thresholds would learn otherwise than by the generalized estimator of liuzechun/Nonuniform-to-Uniform-Quantization."""
    quantizer = LearnedThresholds(2, SITE, Scope(), signed=False)
    with torch.no_grad():
        quantizer.start.fill_(0.1)
        quantizer.widths.copy_(torch.tensor([0.3, 0.9, 0.5]))
        quantizer.beta1.fill_(1.2)
        quantizer.beta2.fill_(0.9)
    out, gx = through(quantizer, [-0.2, 0.1, 0.3, 0.7, 1.3, 2], U)
    near(out, [0, 0, 0.6, 0.6, 1.8, 1.8])
    near(gx, [0, 4.8, 7.2, 3.2, 7.2, 0])
    near(quantizer.start.grad, -18.666668)
    near(quantizer.widths.grad, [-14.133334, -7.303704, -3.120002])
    near(quantizer.beta1.grad, 11.866667)
    near(quantizer.beta2.grad, 26.666666)
    weight = torch.tensor([[0.3, -0.1], [0.05, 0.2]])[:, :, None, None]
    near(FilterWeight(2, SITE, Scope())(weight).flatten(1), [[0.3, -0.1], [0.0625, 0.1875]])


def test_dorefa_weights() -> None:
    """The gradient would not go through tanh and its largest value, as in tensorpack; or the scale not be the public code's."""
    _, gx = through(TanhWeight(2, SITE, Scope(), "none"), W, ONE_TO_EIGHT)
    near(gx, [[3.63645, 2.54011, 4.177749, 4.628791], [6.880777, 4.87073, 7.102835, 10.597951]])
    out, _ = through(TanhWeight(2, SITE, Scope(), "max"), W, ONE_TO_EIGHT)
    near(out, [[-0.716298, -0.238766, 0.238766, 0.238766], [0.238766, 0.716298, -0.716298, 0.238766]])


class Bowl:
    """Stands for `Run`: the loss ``sum(a p^2) / 2``, and SGD."""

    def __init__(self) -> None:
        self.a, self.p = torch.tensor([1, 4, 0.5]), nn.Parameter(torch.tensor([1, -0.5, 2]))
        self.opt = torch.optim.SGD([self.p], lr=0.1, momentum=0.9, weight_decay=0.01)

    def backward(self, track: bool = True, add: bool = False) -> None:
        if not add:
            self.opt.zero_grad()
        (self.a * self.p.square()).sum().mul(0.5).backward()

    def update(self) -> None:
        self.opt.step()


@pytest.mark.parametrize(
    ("kind", "params", "one", "two"),
    [
        (SAM, {"rho": 0.05}, [0.896959, -0.28317, 1.896979], [0.711034, 0.038635, 1.706143]),
        (SAM, {"rho": 2.0, "adaptive": True}, [0.81735, -0.136201, 1.734701], [0.504143, 0.250742, 1.249078]),
        (SAGM, {"rho": 0.05, "alpha": 0.001}, [0.898029, -0.291735, 1.897515], [0.714318, 0.019118, 1.707851]),
        (SAGM, {"rho": 0.05, "alpha": 0.1}, [0.902979, -0.331335, 1.89999], [0.727764, -0.066068, 1.714819]),
    ],
)
def test_sam_and_sagm(kind: type[SAM], params: dict, one: list, two: list) -> None:
    """Two steps would end elsewhere than with davda54/sam, or Wang-pengfei/SAGM."""
    method, run = kind(LSQ(), kind.Params(**params)), Bowl()
    method.prepare(nn.Module())
    for expected in (one, two):
        method.step(run)  # type: ignore[arg-type]
        near(run.p, expected)


# --- long tails -------------------------------------------------------------------------------------------------------

COUNTS = (100, 20, 5)
COSINES = torch.tensor([[0.8, 0.1, -0.3], [0.2, 0.6, 0.4], [-0.5, 0.3, 0.1], [0.9, -0.1, 0.2]])
LABELS = torch.tensor([0, 1, 2, 0])


def on_three_classes(method: Wrapper, epoch: int = 0) -> Any:
    """The wrapper, told of three classes, over a network that is nothing but a head."""
    scope = Scope()
    scope.epoch, scope.epochs = epoch, 10
    for member in method.members:
        member.task, member.scope = Task("classification", ("a", "b", "c"), COUNTS, ("d",)), scope
    method.head = "head"  # type: ignore[assignment]
    method.prepare(nn.ModuleDict({"head": CosineHead(nn.Linear(2, 3), 30.0)}))
    return method


def loss_of(method: Any, logits: Tensor) -> Tensor:
    """The task's loss of these logits."""
    return method.losses(Out(logits, {}), Batch(torch.zeros(4, 1), LABELS, torch.zeros(4).long()))["task"]


def test_ldam() -> None:
    """Margins, weights or the loss would be others than in kaidic/LDAM-DRW."""
    method = on_three_classes(LDAMDRW(LSQ()))
    near(method.margin, [0.236435, 0.353553, 0.5])
    near(method.weight, [0.115896, 0.577167, 2.306937])
    near(loss_of(method, 30 * COSINES), 6.404747)
    weighted = loss_of(on_three_classes(LDAMDRW(LSQ()), epoch=9), 30 * COSINES)
    near(weighted, 12.777904)
    near(weighted / method.weight[LABELS].mean(), 16.403507)  # their mean is by the sum of the weights


def test_losses_of_logits() -> None:
    """Balanced softmax, logit adjustment or the focal loss would be others than in their authors' code."""
    logits = 3 * COSINES
    near(loss_of(on_three_classes(BalancedSoftmax(LSQ())), logits), 0.866114)
    for tau, expected in ((1.0, 0.866114), (0.5, 0.614911)):
        near(loss_of(on_three_classes(LogitAdjust(LSQ(), LogitAdjust.Params(tau=tau))), logits), expected)
    near(loss_of(on_three_classes(CBFocal(LSQ(), CBFocal.Params(beta=0, gamma=1))), logits), 0.263599)


def test_alignq_and_climbq() -> None:
    """The CDF, its gradient or s would be others than in tinganchen/AlignQ and tinganchen/ClimbQ."""
    out, gx = through(CdfQuantizer(2, SITE, Scope(), 1.0, True), W, ONE_TO_EIGHT)
    third = 1 / 3
    near(out, [[-1, -third, third, third], [third, 1, -1, third]])
    near(gx, [[-2.754715, -1.690764, -0.549497, -1.51585], [2.035169, -3.133227, 2.334087, 5.274799]])
    scope = Scope()
    scope.labels = torch.tensor([0, 0, 1])  # the shares of their classes are as .5, .5 and .25
    how = {"s_train": "batch", "s_eval": "const2", "class_ema": False, "through": True}
    quantizer = ConditionalNorm(2, SITE, scope, scale=class_scale((2, 1)), **how)
    x = torch.tensor([[-1.5, 0.4], [0.4, 1.5], [0.4, 3]])
    near(quantizer(x), [[-0.666667, 0.666667], [0.666667, 0.666667], [0.666667, 2]])
    near(quantizer.eval()(torch.tensor([[-1.5, 0.4, 1.5, 3]])), [[-0.666667, 0.666667, 0.666667, 2]])


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.0, [[11, 2.2, 1], [-2.5, -0.5, 0.5]]),
        (0.5, [[4.91935, 2.2, 1], [-1.118034, -0.5, 0.5]]),
        (1.0, [[2.2, 2.2, 1], [-0.5, -0.5, 0.5]]),
    ],
)
def test_tau_norm(tau: float, expected: list) -> None:
    """Rows would be normalised otherwise than in facebookresearch/classifier-balancing, or the bias kept."""
    net = nn.Sequential(OrderedDict(head=nn.Linear(2, 3)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3, 4], [0.6, 0.8], [1, 0]]))
    method = TauNorm(LSQ(), TauNorm.Params(tau=tau))
    for member in method.members:
        member.task = Task("classification", ("a", "b", "c"), COUNTS, ("d",))
    method.head = "head"
    method.prepare(net)
    x = torch.tensor([[1, 2], [0.5, -1]])
    near(method.predict(net, Batch(x, torch.zeros(2).long(), torch.zeros(2).long())), expected)
