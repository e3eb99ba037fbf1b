from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from qatbench.bench.site import Joint, Site, find_sites
from torch import nn

IMAGE = (3, 8, 8)


class Branches(nn.Module):
    """Everything a site can be: grouped convolution, concat of unequal widths, add, dropout, a norm of each kind."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)  # declared first, runs last: order is that of execution
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 4, 3, padding=1, groups=4, bias=False)
        self.gn = nn.GroupNorm(2, 4)
        self.cat = Joint("concat")
        self.tokens = nn.Linear(12, 12)
        self.ln = nn.LayerNorm(12)
        self.add = Joint("add")
        self.drop = nn.Dropout(0.5)
        self.bn1d = nn.BatchNorm1d(12, affine=False)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = self.cat(self.gn(self.deep(x)), x)
        t = x.flatten(2).mT
        t = self.add(t, self.ln(self.tokens(t)))
        return self.head(self.drop(self.bn1d(t.mean(1)).relu()))


def by_name(sites: list[Site]) -> dict[str, Site]:
    return {site.name: site for site in sites if site.kind != "head"}


def test_every_kind_of_site_is_described():
    """Broken: a plan, a cost or a method's `replace` would be built on wrong figures."""
    sites = find_sites(Branches(), IMAGE)
    assert [(site.name, site.kind) for site in sites] == [
        ("stem", "layer"),
        ("bn", "norm"),
        ("deep", "layer"),
        ("gn", "norm"),
        ("cat", "joint"),
        ("tokens", "layer"),
        ("ln", "norm"),
        ("add", "joint"),
        ("bn1d", "norm"),
        ("head", "layer"),
        ("head", "head"),
    ]
    found = by_name(sites)
    n = 4 * 4  # positions after the stem, at stride 2
    assert found["stem"] == Site(
        "stem", "layer", (8,), macs=8 * n * 27, weights=216, inputs=192, in_channels=3, edge=True, signed_input=True, norm="bn",
        live=((192, ("stem",)), (8 * n, ("deep",))),
    )  # fmt: skip
    # Grouped: each output element sees 8 / 4 input channels. The joint reads its input and, behind the norm, its output.
    assert found["deep"] == Site(
        "deep", "layer", (4,), macs=4 * n * 18, weights=72, inputs=8 * n, in_channels=8, norm="gn",
        live=((8 * n, ()), (4 * n, ())),
    )  # fmt: skip
    # A Linear runs once a token.
    tokens = found["tokens"]
    assert (tokens.macs, tokens.weights, tokens.inputs, tokens.in_channels, tokens.norm) == (
        n * 144,
        144,
        n * 12,
        12,
        "ln",
    )
    assert (tokens.signed_input, tokens.edge) == (True, False)
    assert (found["cat"].channels, found["cat"].op, found["cat"].inputs) == ((4, 8), "concat", n * 12)
    assert (found["add"].channels, found["add"].op, found["add"].inputs) == ((12, 12), "add", n * 24)
    assert [found[name].channels for name in ("bn", "gn", "ln", "bn1d")] == [(8,), (4,), (12,), (12,)]
    assert (found["bn1d"].weights, found["bn"].macs, found["cat"].weights, found["add"].in_channels) == (0, 0, 0, 0)
    live = ((12, ("head",)), (5, ()))
    assert sites[-1] == Site("head", "head", (5,), macs=60, weights=60, inputs=12, in_channels=12, edge=True, live=live)
    assert [site.name for site in sites if site.edge and site.kind == "layer"] == ["stem", "head"]


def test_looking_for_sites_leaves_no_trace():
    """Broken: a run's numbers would depend on how often somebody looked at its network."""
    net = Branches().train()
    net.bn.eval()  # a frozen norm in a training network
    net(torch.randn(4, *IMAGE)).sum().backward()
    modes = [module.training for module in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    grads = {key: value.grad.clone() for key, value in net.named_parameters()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        twice = find_sites(net, IMAGE)
    assert find_sites(net, IMAGE) == twice
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(value.grad, grads[key]) for key, value in net.named_parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_failing_forward_leaves_no_trace_either():
    """Broken: a wrong image size would leave a network in eval mode, with hooks that hold its features."""
    net = Branches().train()
    with pytest.raises(RuntimeError):
        find_sites(net, (4, 8, 8))
    assert all(module.training and not module._forward_hooks for module in net.modules())


class Twice(nn.Module):
    """A layer and a joint that run twice, and only once before the norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.joint = Joint("add")

    def forward(self, x):
        x = self.joint(x, self.norm(self.conv(x).relu_()))
        return self.joint(x, self.conv(self.norm(self.conv(x)).relu()))


def test_a_shared_layer_is_one_site():
    """Broken: a layer that runs three times would be counted once, or listed and quantized three times."""
    sites = find_sites(Twice(), IMAGE)
    assert [(site.name, site.kind) for site in sites] == [("conv", "layer"), ("norm", "norm"), ("joint", "joint")]
    conv = sites[0]
    assert (conv.macs, conv.weights, conv.inputs) == (3 * 3 * 64 * 27, 81, 3 * 3 * 64)
    assert (conv.edge, conv.signed_input) == (True, True)
    assert conv.norm is None  # not every output goes to the norm, so the norm cannot be folded into the layer


class Line(nn.Sequential):
    """Modules in a row, named m0, m1, ..."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(f"m{i}", module)


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.Flatten(0, 1)])
def test_a_norm_is_a_layers_own_only_if_nothing_comes_between(between):
    """Broken: export would fold a norm through a ReLU. In place, the ReLU returns the very tensor the layer made."""
    norm = nn.LayerNorm([8])
    assert find_sites(Line(nn.Conv2d(3, 4, 3, padding=1), norm), IMAGE)[0].norm == "m1"
    assert find_sites(Line(nn.Conv2d(3, 4, 3, padding=1), between, norm), IMAGE)[0].norm is None


def test_a_norm_of_two_layers_is_nobodys_own():
    """Broken: folding the shared norm into one layer would change what the other gets."""
    norm = nn.BatchNorm2d(3)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), norm

        def forward(self, x):
            return self.norm(self.b(self.norm(self.a(x))))

    assert [site.norm for site in find_sites(Shared(), IMAGE)] == [None, None, None]


def test_without_a_linear_at_the_end_there_is_no_head():
    """Broken: a Linear in mid-network (squeeze and excite) would be replaced as if it were the classifier."""
    net = Line(nn.Flatten(), nn.Linear(192, 192), nn.Unflatten(1, IMAGE), nn.Conv2d(3, 10, 8))
    sites = find_sites(net, IMAGE)
    assert [(site.name, site.kind, site.edge) for site in sites] == [("m1", "layer", True), ("m3", "layer", True)]


class Idle(Line):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1))
        self.aux = nn.Linear(3, 3)

    def forward(self, x):
        return self.m0(x)


def same_twice() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    return Line(conv, nn.ReLU(), conv)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Idle(), "aux never runs"),
        (same_twice(), "m0 and m2 are one module"),
        (Line(nn.ConvTranspose2d(3, 3, 1)), "m0 is a ConvTranspose2d"),
        (Line(nn.MultiheadAttention(8, 2)), "m0 is a MultiheadAttention"),
        (Line(nn.Conv2d(3, 3, 1), nn.Hardtanh(float("nan"), float("inf")), nn.Conv2d(3, 3, 1)), "m2 is not finite"),
    ],
    ids=["idle", "two names", "unsupported", "attention", "nan"],
)
def test_nothing_is_left_out_silently(net, message):
    """Broken: a layer would stay at full precision in a network that is reported as 2-bit."""
    with pytest.raises(ValueError, match=message):
        find_sites(net, IMAGE)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4, 4), (2, 5, 6)])
def test_a_joint_adds_or_concatenates_over_channels(shape):
    """Broken: networks would compute something else, or a branch would be overwritten under a method's eyes."""
    branches = [torch.randn(shape) for _ in range(3)]
    copies = [x.clone() for x in branches]
    assert torch.equal(Joint("add")(*branches), copies[0] + copies[1] + copies[2])
    dim = 2 if len(shape) == 3 else 1
    joined = Joint("concat")(*branches)
    assert joined.shape[dim] == 18
    assert all(torch.equal(part, x) for part, x in zip(joined.split(6, dim), copies, strict=True))
    assert all(torch.equal(x, copy) for x, copy in zip(branches, copies, strict=True))


def test_a_joint_says_what_it_is():
    """Broken: a misspelt op would become an addition, and a joint would need weights to load."""
    with pytest.raises(ValueError, match="'add' or 'concat'"):
        Joint("sum")  # pyright: ignore[reportArgumentType]
    assert repr(Joint("concat")) == "Joint(concat)"
    assert not list(itertools.chain(Joint().parameters(), Joint().buffers()))


def test_a_joint_of_changing_width_is_refused():
    """Broken: a method's replacement would be built for the width of the first call and fail on the second."""

    class Widths(nn.Module):
        def __init__(self):
            super().__init__()
            self.joint, self.conv = Joint("concat"), nn.Conv2d(9, 2, 1)

        def forward(self, x):
            return self.conv(self.joint(x, self.joint(x, x)))

    with pytest.raises(ValueError, match="joint joins branches of different widths"):
        find_sites(Widths(), IMAGE)


# --- what would be lost or left out


class Standardised(nn.Conv2d):
    """Weight standardisation, as a subclass."""

    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias, 1, 1)


class PadsItself(nn.Conv2d):
    """TensorFlow's padding, where the convolution itself is made."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (0, 1, 0, 1)), weight, bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def extra_repr(self):
        return "renamed"


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def hooked(which: str) -> nn.Conv2d:
    layer = conv()
    getattr(layer, f"register_{which}_hook")(lambda *_: None)
    return layer


def with_own_forward() -> nn.Conv2d:
    layer = conv()
    layer.forward = lambda x: 2 * x
    return layer


def with_a_plain_weight() -> nn.Conv2d:
    layer = conv()
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


class Middle(nn.Module):
    """A network around one layer; ``twist(net, y)`` comes behind it, with ``net.extra`` [4, 4, 1, 1] at hand."""

    def __init__(self, layer, twist=lambda net, y: y):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 4, 1), layer, nn.Linear(4, 5)
        self.extra = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.register_buffer("fixed", torch.randn(4, 1, 3, 3))
        self.twist = twist

    def forward(self, x):
        return self.head(self.twist(self, self.layer(self.stem(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Standardised(4, 4, 3, padding=1), "layer is a Standardised, and quantization would lose its own forward"),
        (PadsItself(4, 4, 2), "its own _conv_forward"),
        (with_own_forward(), "its own forward"),
        (nn.utils.parametrizations.weight_norm(conv()), "the parametrization of its weight"),
        (nn.utils.parametrizations.spectral_norm(conv()), "the parametrization of its weight"),
        (nn.utils.spectral_norm(conv()), "its hooks"),
        (hooked("forward"), "its hooks"),
        (hooked("forward_pre"), "its hooks"),
        (hooked("full_backward"), "its hooks"),
        (with_a_plain_weight(), "layer has a weight that is no nn.Parameter"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding mode 'circular'"),
    ],
    ids=lambda value: value[-20:] if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_that_is_more_than_its_class_is_refused(layer, message):
    """Broken: it would be replaced by the plain operation, and a network of 60 % would be one of 10 % at eight bits."""
    with pytest.raises(ValueError, match=message):
        find_sites(Middle(layer), IMAGE)


def test_a_harmless_subclass_is_a_layer():
    """Broken: a network with a convenience class of its own would be refused for nothing."""
    assert [s.name for s in find_sites(Middle(Renamed(4)), IMAGE) if s.kind == "layer"] == ["stem", "layer", "head"]


def test_a_shared_weight_is_refused():
    """Broken: it would be counted twice, so that a network has less than no bytes, and stepped twice an update."""
    for shared in (lambda p: p, lambda p: nn.Parameter(p.data)):
        net = Middle(conv())
        net.other = conv()
        net.other.weight = shared(net.layer.weight)
        with pytest.raises(ValueError, match=r"layer.weight and other.weight are one tensor; keep it in one layer"):
            find_sites(net, IMAGE)


@pytest.mark.parametrize(
    ("twist", "message"),
    [
        (lambda net, y: F.conv2d(y, net.extra), "calls conv2d with extra outside of its layers"),
        (lambda net, y: F.conv2d(y, 0.1 * net.extra), "calls conv2d with extra"),
        (lambda net, y: F.conv2d(y, net.extra * y.mean()), "calls conv2d outside"),
        (lambda net, y: F.conv2d(y, net.fixed, groups=4), "calls conv2d with fixed"),
        (lambda net, y: F.conv2d(y, net.layer.weight, padding=1), "calls conv2d with layer.weight"),
        (lambda net, y: (net.extra[:, :, 0, 0] @ y.flatten(2)).view_as(y), "matmul__ with extra|matmul with extra"),
        (lambda net, y: torch.einsum("oi,bihw->bohw", net.extra.flatten(1), y), "calls einsum with extra"),
        (lambda net, y: F.linear(y.movedim(1, -1), net.extra.flatten(1)).movedim(-1, 1), "calls linear with extra"),
    ],
)
def test_a_product_outside_of_the_layers_is_refused(twist, message):
    """Broken: it would stay in float, be in no plan and no cost, and the layer behind it would count as the first."""
    with pytest.raises(ValueError, match=message):
        find_sites(Middle(conv(), twist), IMAGE)


@pytest.mark.parametrize(
    "twist",
    [
        lambda net, y: y * net.extra[:, 0].view(1, -1, 1, 1),
        lambda net, y: (y.flatten(2) @ y.flatten(2).mT @ y.flatten(2)).view_as(y),
    ],
    ids=["scale", "attention"],
)
def test_what_is_no_product_with_weights_is_left_alone(twist):
    """Broken: a learned scale, or attention among activations, would be refused though nothing of it can be quantized."""
    assert len(find_sites(Middle(conv(), twist), IMAGE)) == 4


def test_calls_are_counted():
    """Broken: the quantizer of a layer that runs several times would be fitted to its last input alone."""
    assert [site.calls for site in find_sites(Twice(), IMAGE)] == [3, 2, 2]


def test_an_input_by_keyword_is_refused():
    """Broken: hooks see no such input, and the message would be that of a list without elements."""
    with pytest.raises(ValueError, match="layer is given its input as a keyword"):
        find_sites(Middle(conv(), lambda net, y: net.layer(input=y)), IMAGE)
