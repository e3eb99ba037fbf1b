"""From a float network and a spec to a method that is ready to train: plan, surgery, calibration."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from .chain import build
from .data import Batch
from .edges import edges_of_run
from .errors import RunFailed
from .method import Method, Parts, Probe, has_effect
from .quant import Bits, QuantLayer, Scope, calibrate, swap
from .quant.grid import ready_to_compile
from .site import Site, find_sites, more_than_its_class
from .spec import FLOAT_BITS, RunSpec, parse_bits
from .task import Task
from .traces import Traces


def assemble(
    spec: RunSpec,
    net: nn.Module,
    task: Task,
    probe: Batch,
    plan: Mapping[str, Bits] | None = None,
    traces: Traces | None = None,
) -> Method:
    """Put a method's quantizers and modules into a float network.

    Every quantizer is fitted here, on one shared probe batch, before any process group exists: ranks must start equal.

    Args:
        spec: The run; its chain is built.
        net: The float network; it is taken over, and a copy of it may become the teacher.
        task: What is learned.
        probe: Unaugmented training images.
        plan: Of a checkpoint that will be loaded: surgery is repeated as it was, and nothing is calibrated.
        traces: Where the Hessian's traces of this float network are kept; None: nowhere.

    Returns:
        The outermost method, attached to the network.

    Raises:
        RunFailed: The method changes nothing in this network, or leaves a layer out.
    """
    method = build(spec.method, spec.params)
    image = (probe.x.shape[1], probe.x.shape[2], probe.x.shape[3])
    sites = find_sites(net, image)
    float_net = copy.deepcopy(net)
    scope = Scope()
    edges = edges_of_run(spec.first_last, method.first_last)
    for member in method.members:  # a plan or a quantizer may look at these
        member.spec, member.task, member.scope, member.edges = spec, task, scope, edges
    replaced = _replace(method, net, sites, scope)
    layers = (
        [s for s in find_sites(net, image) if s.kind == "layer"]
        if replaced
        else [s for s in sites if s.kind == "layer"]
    )
    sites = [*layers, *(s for s in sites if s.kind != "layer")]
    given = plan if plan is not None else spec.plan
    measured = Probe(float_net, probe, traces or Traces())
    bit_plan = dict(given) if given is not None else method.plan(sites, parse_bits(spec.bits), measured)
    _place(method, net, layers, bit_plan, scope)
    useless = has_effect(method, net, replaced)
    if useless:
        raise RunFailed(f"{useless} changes nothing in {spec.network} at {spec.bits}: it found no place to act on")
    scope.domain = probe.domain
    if plan is None:
        calibrate(net, probe.x)
    scope.compile = spec.compile and ready_to_compile(probe.x.device)
    method.attach(net, Parts(spec, task, scope, probe, sites, bit_plan, float_net))
    return method


def _replace(method: Method, net: nn.Module, sites: list[Site], scope: Scope) -> dict[str, int]:
    """Let every member replace norms, joints and heads; how many each replaced."""
    replaced: dict[str, int] = {}
    for member in method.members:
        for site in sites:
            if site.kind == "layer":
                continue
            old = net.get_submodule(site.name)
            new = member.replace(site, old, scope)
            if new is not old:
                kept = any(module is old for module in new.modules())
                lost = None if kept else more_than_its_class(old)
                if lost:
                    raise RunFailed(
                        f"{member.name} cannot replace {site.name}, a {type(old).__name__}: it would lose {lost}"
                    )
                swap(net, site.name, new)
                replaced[member.name] = replaced.get(member.name, 0) + 1
    return replaced


def _place(method: Method, net: nn.Module, layers: list[Site], plan: Mapping[str, Bits], scope: Scope) -> None:
    """Put a `QuantLayer` at every layer that the plan gives less than 32 bits."""
    missing = [site.name for site in layers if site.name not in plan]
    if missing:
        raise RunFailed(
            f"the plan of {method.name} leaves out {', '.join(missing)}; give 32 bits to what shall stay in float"
        )
    for site in layers:
        bits = Bits(*plan[site.name])
        weight = method.weight_quantizer(bits.w, site, scope) if bits.w < FLOAT_BITS else None
        act = method.act_quantizer(bits.a, site, scope) if bits.a < FLOAT_BITS else None
        if weight is not None or act is not None:
            layer = net.get_submodule(site.name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)  # what find_sites calls a layer
            swap(net, site.name, QuantLayer(layer, weight, act))
