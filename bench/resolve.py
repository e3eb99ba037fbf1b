"""From what was asked to what will run: a spec in normal form, with the hash of everything that determines its number."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .augment import find_augment
from .chain import build, chain_params, members, normal_name
from .data import DataSet, Loaded, find_data, make_splits, make_task, open_data, parse_protocol
from .edges import pair
from .errors import RunFailed, UserError, nearest
from .method import Method, Wrapper
from .network import check_network
from .registry import find, plugin
from .site import Site
from .spec import FLOAT_BITS, Bits, Budget, RunSpec, bits_text, canonical_json, content_hash, parse_bits
from .stream import decoders
from .task import Task

HARNESS = 1
"""Version of the harness: goes up by hand when the numbers of every method move."""

FLOAT_KEYS = (
    "data", "data_params", "protocol", "network", "seed", "float_epochs", "float_lr", "batch", "optimizer", "momentum",
    "weight_decay", "schedule", "augment", "precision", "threads",
)  # fmt: skip
"""What determines the float network; the method is not among them."""


@dataclass(frozen=True)
class Resolved:
    """A run, ready to be run.

    Attributes:
        spec: In normal form, every default written out: runs that mean the same have the same.
        run_id: Hash of the spec, the versions of method, data set, network and harness, and the data.
        float_id: Hash of what determines the float network that the run starts from.
        code: Kind and name -> version; a plugin from a file has the hash of its file as well.
        data_hash: SHA-256 of images, labels and official splits.
        skip: Why the method cannot be run on this task, or None.
        broken: Why the method, a plugin, cannot even be made; the run is then a failed one, and the spec is as it was asked for.
    """

    spec: RunSpec
    run_id: str
    float_id: str
    code: dict[str, str]
    data_hash: str
    skip: str | None
    broken: str | None = None

    @property
    def float_spec(self) -> RunSpec:
        """The float network's own training, as a spec."""
        spec = self.spec
        update = {"method": "fp32", "params": {}, "bits": "w32a32", "epochs": spec.float_epochs, "lr": spec.float_lr}
        plain = {
            "clip": None,
            "accumulate": 1,
            "selection": "last",
            "first_last": "8bit",
            "calibration": 1,
            "plan": None,
        }
        return spec.model_copy(update={**update, **plain})


def resolve(spec: RunSpec, *, data_root: Path | None, cache: Path) -> Resolved:
    """Check a spec against what there is, bring it to normal form and name it.

    Args:
        spec: As asked for.
        data_root: Where the user keeps data sets.
        cache: Where prepared data sets are kept; the data is prepared if it is not there, since its hash is needed.

    Raises:
        UserError: A name is unknown, a setting is out of range, the method does not take these bits, or the data is not to be had.
    """
    params = {k: v.model_dump(mode="json") for k, v in chain_params(spec.method, spec.params).items()}
    dataset = find_data(spec.data, spec.data_params, data_root, cache)
    protocol = _check_request(spec, dataset)
    loaded = _open(spec.data, dataset.params, data_root, cache)
    task = _task(loaded, protocol, spec.seed)
    _check_imbalance(loaded, task)
    sites = _check_network(spec, loaded, task)
    augment = loaded.augment if spec.augment == "default" else spec.augment
    ours = {"method": normal_name(spec.method), "params": params, "data_params": loaded.data_params}
    normal = spec.model_copy(update={**ours, "protocol": protocol, "augment": augment})
    skip = broken = None
    try:
        normal, skip = _of_method(normal, sites, task)
    except RunFailed as error:
        broken = str(error)
    code = code_of(spec)
    ground = {kind: version for kind, version in code.items() if kind.startswith(("data set ", "network "))}
    values = normal.model_dump(mode="json")
    float_values = {k: values[k] for k in FLOAT_KEYS}
    return Resolved(
        spec=normal,
        run_id=content_hash({"spec": values, "code": code, "data": loaded.hash}),
        float_id=content_hash({"float": float_values, "code": ground, "harness": HARNESS, "data": loaded.hash}),
        code=code,
        data_hash=loaded.hash,
        skip=skip,
        broken=broken,
    )


def _check_request(spec: RunSpec, dataset: DataSet) -> str:
    """The protocol's full name; refuses at once what can be told before a data set is prepared, which may take an hour."""
    long_tailed = dataset.params.imbalance is not None
    protocol = parse_protocol(spec.protocol or ("longtail" if long_tailed else None), dataset.selected)
    find("networks", spec.network)
    decoders()  # a wrong variable is told now and not in the first batch
    find_augment(spec.augment, dataset.augment)
    if spec.selection != "last" and not dataset.params.val:
        raise UserError(f"selection={spec.selection} needs validation images; use selection=last, or a val above 0")
    domains = len(protocol.train)
    share = max(1, spec.batch // domains)
    if spec.accumulate > share:
        each = f", {share} of each domain" if domains > 1 else ""
        raise UserError(
            f"accumulate={spec.accumulate} cuts a batch into more parts than it has images ({spec.batch}{each}); "
            f"take batch={spec.accumulate * domains} or more, or accumulate={share} or less"
        )
    with suppress(RunFailed):  # a plugin that cannot be made is recorded as a failed run
        _bits(build(spec.method, spec.params), spec.method, spec)
    return protocol.name


def code_of(spec: RunSpec) -> dict[str, str]:
    """The versions of the code that a spec would run with now: kind and name -> version."""
    return {
        "harness": str(HARNESS),
        **{f"method {cls.name}": _version("methods", cls.name) for cls in members(spec.method)},
        f"data set {spec.data}": _version("datasets", spec.data),
        f"network {spec.network}": _version("networks", spec.network),
    }


def _of_method(spec: RunSpec, sites: tuple[Site, ...], task: Task) -> tuple[RunSpec, str | None]:
    """The spec with what the method's own code settles of it, and why the method cannot be run on this task."""
    method = build(spec.method, spec.params)
    update: dict[str, Any] = {"bits": _bits(method, spec.method, spec)}
    first, last = pair(method.first_last)
    if spec.first_last == "native" and first == last and not _has_own_plan(method):
        update["first_last"] = first  # spelt out: the same cell
    if spec.plan is not None:
        _check_plan(method, spec.method, spec, sites)
        update["first_last"] = "8bit"  # the plan says it all
    return spec.model_copy(update={**update, **_without_effect(method)}), method.skip(task)


def _has_own_plan(method: Method) -> bool:
    """Whether a member of the chain plans bits by code of its own, which may look at what the run asked for."""
    return any(type(member).plan not in (Method.plan, Wrapper.plan) for member in method.members)


def _check_imbalance(loaded: Loaded, task: Task) -> None:
    """Refuse an imbalance that the data's own exceeds: tables would name a ratio that no run has.

    A class may be an image short, for validation, or a tenth; climbq's tail is thinner than it says by its nature.
    """
    params, kept = loaded.params, [n for n in task.class_counts if n]
    if params.imbalance is None or params.lt_list != "ldam":
        return
    if max(kept) > 1.1 * params.imbalance * (min(kept) + 1):
        own = max(kept) / min(kept)
        raise UserError(
            f"imbalance={params.imbalance:g} is not reached: {loaded.name!r} is more unbalanced by itself, {max(kept):,} to "
            f"{min(kept):,} training images a class; take imbalance={own:.0f} or more"
        )


def _bits(method: Method, name: str, spec: RunSpec) -> str:
    """The bits in normal form: a float method has w32a32, and one that quantizes weights alone wXa32, whatever was asked for."""
    if tuple(method.bits) == (FLOAT_BITS,):
        return f"w{FLOAT_BITS}a{FLOAT_BITS}"
    if spec.plan is not None:
        return spec.bits
    asked = parse_bits(spec.bits)
    if method.weights_only:
        asked = asked._replace(a=FLOAT_BITS)
    if isinstance(asked, Budget):
        _check_budget(method, name, spec.bits, asked)
    else:
        _check_widths(method, name, spec.bits, asked)
        if asked == (FLOAT_BITS, FLOAT_BITS):
            raise UserError(f"{name} at {spec.bits} quantizes nothing; use method fp32, or fewer bits")
    return bits_text(asked)


def _check_widths(method: Method, name: str, text: str, widths: Bits) -> None:
    allowed = (*method.bits, FLOAT_BITS)
    for kind, width in zip(("weights", "activations"), widths, strict=True):
        if width not in allowed:
            raise UserError(
                f"{name} takes {min(method.bits)} to {max(method.bits)} bits for {kind} (or 32), not {text}"
            )


def _check_budget(method: Method, name: str, text: str, budget: Budget) -> None:
    low, high = min(method.candidates), max(method.candidates)
    if not low <= budget.w <= high:
        raise UserError(
            f"{name} at {text}: its layers take {', '.join(map(str, method.candidates))} bits, so an average is {low} to {high}, "
            f"not {budget.w:g}"
        )
    _check_widths(method, name, text, Bits(low, budget.a))


def _check_network(spec: RunSpec, loaded: Loaded, task: Task) -> tuple[Site, ...]:
    """The network's sites; refuses one that cannot be quantized or trained on these images."""
    domains = len(task.domains)
    batch = max(1, spec.batch // domains) * domains
    image = (int(loaded.domains[0].images.shape[1]), *loaded.size)
    return check_network(spec.network, image, task.outputs, max(1, batch // spec.accumulate))


def _check_plan(method: Method, name: str, spec: RunSpec, sites: tuple[Site, ...]) -> None:
    """Refuse a plan that names a layer which the network does not have, leaves one out, or gives it bits that are not to be had."""
    assert spec.plan is not None
    if tuple(method.bits) == (FLOAT_BITS,):
        return
    layers = [site.name for site in sites if site.kind == "layer"]
    for layer, bits in spec.plan.items():
        if layer not in layers:
            raise UserError(f"plan: {spec.network} has no layer {layer!r}{nearest(layer, layers)}")
        _check_widths(method, name, f"w{bits.w}a{bits.a} ({layer})", bits)
        if method.weights_only and bits.a < FLOAT_BITS:
            raise UserError(f"plan: {name} leaves inputs in float; give {layer} w{bits.w}a{FLOAT_BITS}")
    missing = [layer for layer in layers if layer not in spec.plan]
    if missing:
        raise UserError(f"plan: layer {missing[0]!r} of {spec.network} is missing ({len(missing)} of {len(layers)}); "
                        "give w32a32 to what shall stay in float")  # fmt: skip


def _without_effect(method: Method) -> dict[str, Any]:
    """Defaults for the settings that cannot move this method's number, so that cells which mean the same are one cell."""
    default = {k: f.default for k, f in RunSpec.model_fields.items()}
    update: dict[str, Any] = {}
    if not method.trains:
        update |= {"epochs": 0} | {k: default[k] for k in ("lr", "clip", "accumulate", "selection")}
    if tuple(method.bits) == (FLOAT_BITS,) and not any(m.changes_net for m in method.members):
        update |= {"first_last": "8bit", "calibration": default["calibration"], "plan": None}
    return update


def _version(kind: str, name: str) -> str:
    entry = plugin(kind, name)
    version = str(getattr(entry.cls, "version", 1))
    return f"{version}+{entry.source}" if entry.source else version


_opened: dict[tuple[str, str, Path | None, Path], Loaded] = {}


def _open(data: str, params: DataSet.Params, root: Path | None, cache: Path) -> Loaded:
    """Open a data set once a process and setting."""
    key = (data, canonical_json(params.model_dump(mode="json")), root, cache)
    if key not in _opened:
        _opened[key] = open_data(data, params, root, cache)
    return _opened[key]


_tasks: dict[tuple[str, str, str, str, int], Task] = {}


def _task(loaded: Loaded, protocol: str, seed: int) -> Task:
    """What a method may know of the task, without making batches."""
    key = (loaded.name, loaded.hash, canonical_json(loaded.data_params), protocol, seed)
    if key not in _tasks:
        _tasks[key] = make_task(loaded, parse_protocol(protocol, loaded.names), make_splits(loaded, seed))
    return _tasks[key]
