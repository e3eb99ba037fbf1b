from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from qatbench.bench.models.resnet import ResNet8, ResNet20, ResNet56
from qatbench.bench.models.resnet18 import ResNet18
from qatbench.bench.site import Joint, find_sites
from torch import nn
from torch.overrides import TorchFunctionMode

ALL = [ResNet8, ResNet20, ResNet56, ResNet18]
SMALL = [ResNet8, ResNet18]

each = pytest.mark.parametrize("net_class", ALL, ids=lambda c: c.name)
each_kind = pytest.mark.parametrize("net_class", SMALL, ids=lambda c: c.name)


def test_names():
    """Broken: the registry, and so `--network`, would not find a network, or find another."""
    assert [c.name for c in ALL] == ["resnet8", "resnet20", "resnet56", "resnet18"]


@pytest.mark.parametrize(
    ("net_class", "ours", "paper"),
    [(ResNet8, 78_042, None), (ResNet20, 272_474, 0.27e6), (ResNet56, 855_770, 0.85e6), (ResNet18, 11_181_642, None)],
    ids=lambda v: getattr(v, "name", v),
)
def test_parameter_counts(net_class, ours, paper):
    """Broken: the network is not the published one. Projection shortcuts add 2,752 parameters to those of the paper."""
    count = sum(p.numel() for p in net_class(3, 10).parameters())
    assert count == ours
    if paper is not None:
        assert count - 2_752 == pytest.approx(paper, rel=0.005)


@pytest.mark.parametrize(
    ("net_class", "blocks", "shortcuts"),
    [(ResNet8, 3, 2), (ResNet20, 9, 2), (ResNet56, 27, 2), (ResNet18, 8, 3)],
    ids=lambda v: getattr(v, "name", v),
)
def test_all_sites_are_found_and_paired(net_class, blocks, shortcuts):
    """Broken: a layer or joint would be invisible to every method, or a norm not known to belong to its layer."""
    net = net_class(3, 10)
    sites = find_sites(net, (3, 8, 8) if net_class is not ResNet18 else (3, 32, 32))
    layers = [site for site in sites if site.kind == "layer"]
    norms = [site.name for site in sites if site.kind == "norm"]
    convs = 1 + 2 * blocks + shortcuts
    assert Counter(site.kind for site in sites) == {"layer": convs + 1, "norm": convs, "joint": blocks, "head": 1}
    assert [site.norm for site in layers] == [*norms, None]  # each layer's own, in order; none after the head
    assert [site.name for site in layers if site.edge] == ["conv1", sites[-1].name]
    assert [site.name for site in layers if site.signed_input] == ["conv1"]  # every other input comes out of a ReLU
    assert sum(site.weights for site in layers) == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert all(site.op == "add" and site.channels[0] == site.channels[1] for site in sites if site.kind == "joint")
    assert (sites[-1].kind, sites[-1].channels) == ("head", (10,))


def test_macs_of_resnet20():
    """Broken: BOPs would be wrong. 40.55M is what papers print for CIFAR; projections add 262,144."""
    sites = find_sites(ResNet20(3, 10), (3, 32, 32))
    assert sum(site.macs for site in sites if site.kind == "layer") == 40_551_040 + 262_144


class Merges(TorchFunctionMode):
    """Counts operations that merge two feature maps."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {
            "add",
            "add_",
            "__add__",
            "__iadd__",
            "__radd__",
            "cat",
            "concat",
            "stack",
        }:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_merges(net: nn.Module) -> int:
    with torch.no_grad(), Merges() as merges:
        net.eval()(torch.randn(1, 3, 8, 8))
    return merges.count


@each
def test_branches_meet_in_joints_only(net_class):
    """Broken: a residual addition is a bare `+`, which no method can find or replace."""
    net = net_class(3, 10)
    joints = [module for module in net.modules() if isinstance(module, Joint)]
    assert count_merges(net) == len(joints)
    for joint in joints:
        joint.forward = lambda first, *rest: first
    assert count_merges(net) == 0


def test_a_bare_addition_would_be_seen():
    """Broken: the test above could not fail. torchvision's own blocks add with `+=`."""
    assert count_merges(torchvision.models.resnet18()) == 8


@each_kind
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_any_channels_classes_and_size(net_class, channels, size):
    """Broken: a data set with grey images, or of another size or number of classes, could not be used."""
    logits = net_class(channels, 7).eval()(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@each_kind
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_goes_through(net_class, channels, training):
    """Broken: some stage falls back to the slow layout (the float step is 1.37 times slower in it)."""
    net = net_class(channels, 10).to(memory_format=torch.channels_last).train(training)
    kept: dict[str, bool] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | Joint):
            module.register_forward_hook(
                lambda m, i, out, name=name: kept.update(
                    {name: out.is_contiguous(memory_format=torch.channels_last) and out.stride(1) == 1}
                )
            )
    net(torch.randn(4, channels, 32, 32).to(memory_format=torch.channels_last))
    assert len(kept) > 20
    assert [name for name, ok in kept.items() if not ok] == []


@each_kind
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(net_class, precision):
    """Broken: the network cannot be trained, in bf16 autocast or at all, or some parameter gets no gradient."""
    torch.manual_seed(0)
    net = net_class(3, 4).to(memory_format=torch.channels_last)
    y = torch.arange(16) % 4
    x = (torch.randn(4, 3, 1, 1)[y] + 0.1 * torch.randn(16, 3, 32, 32)).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr=3e-3 if net_class is ResNet8 else 1e-3)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@each_kind
def test_same_seed_same_network(net_class):
    """Broken: runs that share a seed would not start from the same weights, and could not be compared in pairs."""

    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        net = net_class(1, 10)
        out = net(torch.ones(2, 1, 8, 8) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        return {**net.state_dict(), "out": out.detach()}

    first, second, other = build(0), build(0), build(1)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@each_kind
def test_convolutions_start_from_he_initialisation(net_class):
    """Broken: training starts from a different scale than in the paper. Variance 2 / (out * 3 * 3), fan out."""
    torch.manual_seed(0)
    net = net_class(1, 10)
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.weight[0, 0].numel()
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.25), name


@each_kind
def test_no_relu_works_in_place(net_class):
    """Broken: what a method taps at a norm or a joint would be overwritten by the ReLU behind it."""
    assert [module for module in net_class(3, 10).modules() if getattr(module, "inplace", False)] == []


def test_resnet18_is_torchvisions():
    """Broken: pretrained weights would not load, or would give other outputs than torchvision's network."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # running statistics that a mix-up would show
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = ResNet18(3, 10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))


def test_resnet18_starts_as_torchvisions_does():
    """Broken: a run of ours and one of torchvision's network under the same seed would differ from the first step."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.manual_seed(0)
    ours = ResNet18(3, 10).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
