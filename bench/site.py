"""The named places of a network that a method may quantize or replace, found by running the network once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .convolution import StridedPointwise

LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
# Layers with a weight that no quantizer here handles. A network that has one is refused: it would stay at full
# precision without a word, and its cost would be missing.
UNSUPPORTED = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)
TRACED = 2  # images: one would not tell "per image" from "per batch"


def channel_dim(x: Tensor) -> int:
    """The dimension of the channels: the last of tokens ``[B, T, C]``, 1 in ``[B, C]`` and ``[B, C, H, W]``."""
    return -1 if x.ndim == 3 else 1


class Joint(nn.Module):
    """Where branches meet: their sum, or their concatenation over channels.

    A module, not a bare ``+``, so that a method can find it, look at its branches and put something else in its place.
    It has no parameters and no buffers, so it leaves no trace in a state dict.
    """

    def __init__(self, op: Literal["add", "concat"] = "add"):
        super().__init__()
        if op not in ("add", "concat"):
            raise ValueError(f"a joint adds or concatenates; op must be 'add' or 'concat', not {op!r}")
        self.op = op

    def forward(self, *branches: Tensor) -> Tensor:
        """Branches of one shape (``add``), or of one shape but for the channels (``concat``)."""
        if self.op == "concat":
            return torch.cat(branches, dim=channel_dim(branches[0]))
        # Never in place: a branch may be a tap that a method looks at later, or what an autograd function has kept.
        return functools.reduce(torch.add, branches)

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return self.op


@dataclass(frozen=True)
class Site:
    """A named place in a network.

    A network's head is listed twice under one name, as a ``layer`` (to be quantized) and then as the ``head`` (to be
    replaced), with the same figures: sums of costs go over the sites of kind ``layer``.

    Attributes:
        name: dotted name of the module, as ``net.get_submodule`` takes it.
        kind: ``layer`` (Conv2d, Linear), ``norm``, ``joint`` or ``head``.
        channels: of each branch of a joint; of the output, alone in the tuple, elsewhere.
        op: what a joint does; None elsewhere.
        macs: multiply-accumulates per image; 0 for norms and joints.
        weights: elements of the weight (no bias); 0 where there is none.
        inputs: input elements per image, over all branches of a joint.
        in_channels: channels of a layer's input; 0 elsewhere.
        live: what is in memory while a layer runs (its input, its output, what waits): elements per image of each tensor, and
            the layers that read it; no layers where something else reads it, a joint for example.
        edge: whether it is the first or the last layer that runs.
        signed_input: whether an input was negative; False after a ReLU.
        calls: how often it runs in one pass.
        norm: name of the layer's own norm: it takes every output of this layer and nothing else.
    """

    name: str
    kind: Literal["layer", "norm", "joint", "head"]
    channels: tuple[int, ...]
    op: Literal["add", "concat"] | None = None
    macs: int = 0
    weights: int = 0
    inputs: int = 0
    in_channels: int = 0
    live: tuple[tuple[int, tuple[str, ...]], ...] = ()
    edge: bool = False
    signed_input: bool = False
    calls: int = 1
    norm: str | None = None


# What a subclass may define without changing what its layer computes.
_HARMLESS = {
    "__annotations__", "__constants__", "__doc__", "__firstlineno__", "__init__", "__module__", "__qualname__", "__repr__",
    "__static_attributes__", "_version", "extra_repr", "reset_parameters",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def more_than_its_class(module: nn.Module) -> str | None:
    """What a layer, norm or joint does besides the operation of its class; None for a plain one.

    Whoever puts another module in its place keeps its parameters, and would lose this without a word.

    >>> more_than_its_class(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    'the parametrization of its weight'
    """
    base = next((b for b in (*LAYERS, *NORMS, Joint) if isinstance(module, b)), None)
    if base is None:
        return "all that it does"
    if parametrize.is_parametrized(module):
        return "the parametrization of its weight"
    own = type(module).__mro__[: type(module).__mro__.index(base)]
    changed = [n for cls in own for n in vars(cls) if hasattr(base, n) and n not in _HARMLESS]
    changed += [n for n in vars(module) if callable(getattr(base, n, None))]
    if changed and not isinstance(module, StridedPointwise):
        return f"its own {changed[0]}"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "its hooks"
    if any(True for _ in module.children()):
        return "the modules inside it"
    return None


def unquantizable(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Why a layer cannot be quantized, None if it can: what takes its place is the operation of its class on its parameters."""
    kind = "nn.Conv2d" if isinstance(layer, nn.Conv2d) else "nn.Linear"
    if lost := more_than_its_class(layer):
        return (
            f"is a {type(layer).__name__}, and quantization would lose {lost}; use a plain {kind}, and do the rest in a module "
            "before or after it"
        )
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None and not isinstance(value, nn.Parameter):
            return f"has a {name} that is no nn.Parameter, so that nothing trains it; use a plain {kind}"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return (
            f"has padding mode {layer.padding_mode!r}, which is not supported; pad with a module before the convolution"
        )
    return None


@dataclass(frozen=True)
class _Call:
    """One execution of a site's module in the traced pass."""

    name: str
    module: nn.Module
    channels: tuple[int, ...]
    inputs: int
    outputs: int
    signed: bool
    source: str | None  # the layer whose output, untouched, is the input
    takes: tuple[int, ...]  # ids of the input tensors
    gives: int  # and of the output


def find_sites(net: nn.Module, image: tuple[int, int, int]) -> list[Site]:
    """Find the sites of ``net`` in the order in which they first run.

    One pass over two random images in eval mode, without gradients; the network's modes are put back, and no buffer
    and no global random generator moves. A module that runs more than once is one site: MACs and inputs add up, and
    its input is signed if it ever was.

    Args:
        net: the float network; on any device, in training or eval mode.
        image: shape of one input image, (C, H, W).

    Raises:
        ValueError: for what would otherwise be left out, changed or half replaced without a word: a layer, norm or joint that
            never runs or is reachable under two names; a layer of a kind that cannot be quantized, that is more than the
            operation of its class, or that shares a parameter; a convolution or matrix product outside of the layers.
    """
    modules = _site_modules(net)
    _refuse_shared_parameters(net, modules)
    calls = _trace(net, modules, image)
    runs = Counter(call.name for call in calls)
    if idle := [name for name in modules if name not in runs]:
        raise ValueError(f"{idle[0]} never runs in eval mode, so it is no site; call it in forward or remove it")

    order = [call.name for call in calls if isinstance(call.module, LAYERS)]
    edges = set(order[:1] + order[-1:])
    pairs = Counter((call.source, call.name) for call in calls if call.source and isinstance(call.module, NORMS))
    own = {layer: norm for (layer, norm), n in pairs.items() if n == runs[layer] == runs[norm]}

    live = _live(calls)
    sites = []
    for name in runs:  # a Counter keeps the order of first counting
        site = _site([call for call in calls if call.name == name])
        if site.kind == "layer":
            site = replace(site, edge=name in edges, norm=own.get(name), live=live[name])
        sites.append(site)
        if order and name == order[-1] and isinstance(modules[name], nn.Linear):
            sites.append(replace(site, kind="head"))
    return sites


def _site_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Every layer, norm and joint by name; refuses what could not be quantized or replaced whole."""
    found: dict[str, nn.Module] = {}
    names: dict[nn.Module, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, UNSUPPORTED):
            raise ValueError(f"{name} is a {type(module).__name__}, which cannot be quantized; use Conv2d or Linear")
        if not isinstance(module, (*LAYERS, *NORMS, Joint)):
            continue
        if module in names:  # replacing it under one name would leave it in place under the other
            raise ValueError(f"{names[module]} and {name} are one module; keep it under one name and call it twice")
        found[name] = module
        names[module] = name
        if isinstance(module, LAYERS) and (reason := unquantizable(module)):
            raise ValueError(f"{name} {reason}")
    return found


def _refuse_shared_parameters(net: nn.Module, modules: dict[str, nn.Module]) -> None:
    """A weight of two layers would be counted twice, trained twice, and have two quantizers."""
    owners: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if parameter.numel() == 0:
            continue
        other = owners.setdefault(parameter.data_ptr(), name)
        if other != name and any(isinstance(modules.get(n.rpartition(".")[0]), LAYERS) for n in (name, other)):
            raise ValueError(f"{other} and {name} are one tensor; keep it in one layer, and call that layer twice")


_CONVOLUTIONS = {
    "linear", "bilinear", *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
}  # fmt: skip
_PRODUCTS = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner", "addmm", "addbmm", "addmv", "baddbmm",
    "tensordot", "einsum", "chain_matmul", "multi_dot", "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip


class _OutsideLayers(TorchFunctionMode):
    """Refuses what multiplies with weights outside of the layers: it would stay float, and be missing in plan and cost.

    A weight is a parameter or buffer, or what is made of these alone. `inside` counts the layers that are running.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inside = 0
        self._kept: list[Tensor] = []  # so that ids stay taken
        self._weights = {id(t): name for name, t in (*net.named_parameters(), *net.named_buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        name = getattr(func, "__name__", "")
        tensors = list(_tensors((*args, *(kwargs or {}).values())))
        weights = [self._weights[id(t)] for t in tensors if id(t) in self._weights]
        if name in _CONVOLUTIONS or (name in _PRODUCTS and weights):
            what = f" with {weights[0]}" if weights else ""
            raise ValueError(
                f"the network calls {name}{what} outside of its layers, where it cannot be quantized or counted; use nn.Conv2d or "
                "nn.Linear"
            )
        if weights and len(weights) == len(tensors):
            for made in _tensors((out,)):
                self._kept.append(made)
                self._weights[id(made)] = weights[0]
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among these, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _trace(net: nn.Module, modules: dict[str, nn.Module], image: tuple[int, int, int]) -> list[_Call]:
    """Run ``net`` once and note each execution of ``modules``."""
    outside = _OutsideLayers(net)
    calls: list[_Call] = []
    kept: list[Tensor] = []  # so that ids stay taken
    # id -> (layer, a copy of its output), which tells whether something like an in-place ReLU has changed it before it
    # reached the norm.
    produced: dict[int, tuple[str, Tensor]] = {}

    def enter(*_: Any) -> None:
        outside.inside += 1

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outside.inside -= isinstance(module, LAYERS)
        if not inputs:
            raise ValueError(f"{name} is given its input as a keyword; give it by position, so that it can be seen")
        if not all(bool(x.isfinite().all()) for x in inputs):
            raise ValueError(f"the input of {name} is not finite on random images; its sign cannot be told")
        layer, copy = produced.get(id(inputs[0]), (None, inputs[0]))
        kept.extend((*inputs, output))
        calls.append(
            _Call(
                name=name,
                module=module,
                channels=tuple(x.shape[channel_dim(x)] for x in inputs),
                inputs=sum(x.numel() for x in inputs) // TRACED,
                outputs=output.numel() // TRACED,
                signed=any(bool((x < 0).any()) for x in inputs),
                source=layer if torch.equal(copy, inputs[0]) else None,
                takes=tuple(map(id, inputs)),
                gives=id(output),
            )
        )
        if isinstance(module, LAYERS):
            produced[id(output)] = (name, output.clone())

    like = next(net.parameters(), torch.empty(0))
    x = torch.randn(TRACED, *image, generator=torch.Generator().manual_seed(0)).to(like)
    modes = {module: module.training for module in net.modules()}
    handles = [m.register_forward_hook(functools.partial(note, name)) for name, m in modules.items()]
    handles += [m.register_forward_pre_hook(enter) for m in modules.values() if isinstance(m, LAYERS)]
    try:
        with torch.no_grad(), outside:
            net.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():  # one by one: a frozen norm may be in eval mode in a training network
            module.training = mode
    return calls


def _live(calls: list[_Call]) -> dict[str, tuple[tuple[int, tuple[str, ...]], ...]]:
    """`Site.live` of each layer. Norms and activation functions count as part of the layer before them."""
    size: dict[int, int] = {}
    reads: dict[int, list[int]] = {}  # tensor -> when layers and joints read it
    made: dict[int, int] = {}  # by a norm
    for k, call in enumerate(calls):
        if isinstance(call.module, NORMS):
            size[call.gives], made[call.gives] = call.outputs, k
            continue
        for tensor in call.takes:
            size.setdefault(tensor, call.inputs // len(call.takes))
            reads.setdefault(tensor, []).append(k)

    def readers(tensor: int) -> tuple[str, ...]:
        whole = all(isinstance(calls[k].module, LAYERS) for k in reads[tensor])
        return tuple(dict.fromkeys(calls[k].name for k in reads[tensor])) if whole else ()

    live: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {}
    for k, call in enumerate(calls):
        if not isinstance(call.module, LAYERS):
            continue
        follower = next((c for c in calls[k + 1 :] if isinstance(c.module, LAYERS)), None)
        out = next(
            (c.gives for c in calls[k + 1 :] if call.gives in c.takes and isinstance(c.module, NORMS)), call.gives
        )
        next_readers = readers(out) if out in reads else (follower.name,) if follower else ()
        waiting = [t for t, when in reads.items() if made.get(t, when[0]) <= k <= when[-1] and t != out]
        found = (*((size[t], readers(t)) for t in waiting), (call.outputs, next_readers))
        live[call.name] = max(live.get(call.name, ()), found, key=lambda tensors: sum(n for n, _ in tensors))
    return live


def _site(calls: list[_Call]) -> Site:
    """One site out of all executions of its module, but for what depends on the other sites."""
    first = calls[0]
    name, module = first.name, first.module
    weight = getattr(module, "weight", None)
    site = Site(
        name=name,
        kind="layer",
        channels=first.channels,
        weights=weight.numel() if weight is not None else 0,
        inputs=sum(call.inputs for call in calls),
        signed_input=any(call.signed for call in calls),
        calls=len(calls),
    )
    if isinstance(module, Joint):
        if any(call.channels != first.channels for call in calls):
            raise ValueError(
                f"{name} joins branches of different widths in one pass; give each place a joint of its own"
            )
        return replace(site, kind="joint", op=module.op)
    if isinstance(module, nn.LayerNorm):
        return replace(site, kind="norm", channels=(module.normalized_shape[-1],))
    if isinstance(module, NORMS):
        return replace(site, kind="norm")
    assert isinstance(module, LAYERS)
    # A weight is [out, in / groups, ...]: each output element costs one row of it, whatever the shape of the output.
    macs = sum(call.outputs for call in calls) * module.weight[0].numel()
    in_channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    return replace(site, channels=(module.weight.shape[0],), in_channels=in_channels, macs=macs)
