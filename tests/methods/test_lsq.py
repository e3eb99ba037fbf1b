from __future__ import annotations

import math

import pytest
import torch
from qatbench.bench.quant import Scope
from qatbench.bench.site import Site
from qatbench.bench.testing import MethodContract, ready
from qatbench.methods.lsq import ClosestStep, LearnedStep

SITE = Site("layer", "layer", (4,), weights=36, inputs=72)


class TestLSQ(MethodContract):
    method = "lsq"


@pytest.mark.parametrize(("signed", "qmax"), [(True, 3), (False, 7)])
def test_gradient_scale(signed: bool, qmax: int) -> None:
    """Steps would be trained 10 to 1000 times too fast or too slow: at 2 bits that is divergence (paper, Table 3)."""
    quantizer = LearnedStep(3, SITE, Scope(), signed, 50)
    assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(50 * qmax))
    x = torch.full((10,), 1e6)
    quantizer(x).sum().backward()
    assert quantizer.step.grad is not None
    assert quantizer.step.grad.item() == pytest.approx(10 * qmax / math.sqrt(50 * qmax))


def test_n_counts_weights_and_features_of_one_image() -> None:
    """The gradient scale would depend on the batch size, which the paper's does not."""
    method, _ = ready("lsq")
    layer = next(s for s in method.sites if s.kind == "layer" and not s.edge)
    module = method.net.get_submodule(layer.name)
    weight, act = module.weight_quantizer, module.act_quantizer
    assert weight.grad_scale == pytest.approx(1 / math.sqrt(module.weight.numel() * 3))
    assert act.grad_scale == pytest.approx(1 / math.sqrt(layer.inputs * 7))
    assert layer.inputs == 8 * 8 * 8  # width 8, 8x8 images


def test_the_starting_step_is_the_papers() -> None:
    """Training would start from another grid than ``2 <|v|> / sqrt(Q_P)``."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for bits, signed, qmax in ((2, True, 1), (4, True, 7), (8, False, 255)):
        quantizer = LearnedStep(bits, SITE, Scope(), signed, 9)
        quantizer.fit(x)
        assert quantizer.step.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(qmax))
    quantizer.fit(torch.zeros(5))
    assert quantizer.step.item() > 0


def test_another_start_of_the_activations_is_a_setting() -> None:
    """What a comparison in short runs owes to the paper's start could not be told from what it owes to the method."""
    starts = {}
    for start in ("paper", "mse"):
        method, _ = ready("lsq", bits="w2a2", params={"lsq": {"act_start": start}})
        module = method.net.get_submodule(next(s.name for s in method.sites if s.kind == "layer" and not s.edge))
        starts[start] = [module.weight_quantizer.step.item(), module.act_quantizer.step.item()]
    assert starts["mse"][0] == starts["paper"][0]
    assert starts["mse"][1] > starts["paper"][1]
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).relu()
    quantizer = ClosestStep(2, SITE, Scope(), False, 9)
    quantizer.fit(x)
    best = (quantizer(x) - x).square().mean()
    for factor in (0.8, 1.25):
        with torch.no_grad():
            quantizer.step.mul_(factor)
            assert (quantizer(x) - x).square().mean() > best
            quantizer.step.div_(factor)


def test_steps_are_not_decayed_and_stay_positive() -> None:
    """Weight decay would pull the steps to zero; a negative step would turn the grid around."""
    method, _ = ready("lsq", weight_decay=0.5)
    steps = {id(p) for n, p in method.net.named_parameters() if n.endswith("quantizer.step")}
    assert steps
    for group in method.configure_optimizers().param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in steps else 0.5)
    quantizer = LearnedStep(3, SITE, Scope(), True, 9)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
        quantizer.project()
    assert quantizer.step.item() > 0
