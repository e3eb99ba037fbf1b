"""What a run and a suite are: frozen, validated, with a canonical form whose hash names the run. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import UserError, nearest
from .yaml import load

Model = TypeVar("Model", bound=BaseModel)

FLOAT_BITS = 32
_BITS = re.compile(r"w(\d{1,2})a(\d{1,2})")
_BUDGET = re.compile(r"avg(\d{1,2}(?:\.\d{1,4})?)(?:a(\d{1,2}))?")
_PLAN = re.compile(r"plan-[0-9a-f]{8}")
WIDTHS = (*range(1, 9), FLOAT_BITS)


class Bits(NamedTuple):
    """Bits of a layer's weight and of its input; 32 is float."""

    w: int
    a: int


class Budget(NamedTuple):
    """The average bits that the weights may have, over the layers that share it, and the bits of their inputs."""

    w: float
    a: int


class Frozen(BaseModel):
    """The base of every specification and of every ``Params``: immutable, an unknown key is an error, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` would count as 1, in a list as well."""
        if any(isinstance(part, bool) for part in _leaves(value)):
            kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise ValueError("a number is needed, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types in an annotation."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner[:1] if get_origin(annotation) is Annotated else inner:
        yield from _kinds(part)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _read_plan(value: Any) -> Any:
    """A plan as given, or out of a file: a mapping of layers to ``w4a4``, or a run's record."""
    if isinstance(value, str):
        try:
            found = load(Path(value), "plan")
        except FileNotFoundError:
            raise ValueError(
                f"plan {value} cannot be read: No such file or directory; give a YAML file of lines LAYER: w4a4"
            ) from None
        except UserError as error:
            raise ValueError(f"plan {error}; give lines LAYER: w4a4") from None
        if isinstance(found, dict) and isinstance(found.get("cost"), dict):
            found = found["cost"].get("plan")
        if not isinstance(found, dict):
            raise ValueError(
                f"plan {value} holds no plan; give a YAML file of lines LAYER: w4a4, or a run's result.json"
            )
        value = found
    if not isinstance(value, dict):
        return value
    return {str(layer): _plan_bits(layer, bits) for layer, bits in value.items()}


def _plan_bits(layer: Any, bits: Any) -> Any:
    if isinstance(bits, list | tuple) and len(bits) == 2:
        bits = f"w{bits[0]}a{bits[1]}"
    try:
        parsed = parse_bits(str(bits))
    except ValueError as error:
        raise ValueError(f"plan of layer {layer}: {error}") from None
    if isinstance(parsed, Budget):
        raise ValueError(f"plan of layer {layer}: {bits} is an average; a layer takes wXaY")
    return parsed


Plan = Annotated[dict[str, Bits], BeforeValidator(_read_plan), Field(min_length=1)]
FirstLast = Literal["native", "8bit", "fp", "same"]


class Recipe(Frozen):
    """How one trains, whatever the method: the settings that a comparison holds equal."""

    params: dict[str, dict[str, Any]] = Field({}, description="the methods' own settings, nested by method name")
    data_params: dict[str, Any] = Field({}, description="the data set's own settings")
    epochs: int = Field(4, ge=0, le=100_000, description="epochs after the float network, quantized (fp32: float)")
    float_epochs: int = Field(
        10, ge=0, le=100_000, description="epochs of the float network that every method starts from"
    )
    batch: int = Field(64, ge=1, le=1_000_000, description="images a step, in equal shares from the training domains")
    lr: float = Field(0.01, gt=0, description="peak learning rate after the float network")
    float_lr: float = Field(0.1, gt=0, description="peak learning rate of the float network")
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["cosine", "constant", "step"] = Field("cosine", description="step: x0.1 at 60 % and 80 %")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient; none: not clipped")
    accumulate: int = Field(1, ge=1, description="micro-batches a batch is cut into")
    augment: str = Field("default", description="default: the data set's own")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp16 is refused: its loss scaling corrupts gradients read in a step"
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads a run; another number gives other weights")
    compile: bool = Field(
        False,
        description="fuse elementwise quantizers by torch.compile: faster, other roundings; some seconds to compile",
    )
    first_last: FirstLast = Field(
        "native", description="bits of the first and the last layer; native: the method's own policy"
    )
    plan: Plan | None = Field(None, description="layer -> bits, or a YAML file of that; it takes the place of `bits`")
    selection: Literal["last", "best", "best_per_domain"] = Field(
        "last", description="which epoch, by validation accuracy"
    )
    calibration: int = Field(256, ge=1, le=100_000, description="training images in the probe batch")

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "16", 16):
            raise ValueError("fp16 needs loss scaling, which corrupts gradients that methods read; use bf16 or fp32")
        return value


BitsText = Annotated[
    str,
    Field(
        description="wXaY: X bits for weights, Y for activations; avgB: layers of B bits on average, inputs of round(B)"
    ),
]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class RunSpec(Recipe):
    """One run: a method on a data set, a protocol, a network, bits and a seed."""

    method: str
    data: str = "optdigits"
    protocol: str | None = Field(
        None,
        description="single[:DOMAIN], mdl, lodo:DOMAIN or longtail; none: longtail if the data is made so, else mdl if "
        "there are several domains",
    )
    network: str = "resnet8"
    bits: BitsText = "w4a4"
    seed: Seed = 0

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return "+".join(chain_names(value))

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: str) -> str:
        return value if _PLAN.fullmatch(value) else bits_text(parse_bits(value))

    @model_validator(mode="after")
    def _planned(self) -> RunSpec:
        """A plan names the bits, by its hash."""
        if self.plan is not None:
            object.__setattr__(self, "bits", f"plan-{content_hash(self.plan)[:8]}")
        elif _PLAN.fullmatch(self.bits):
            raise ValueError(f"bits {self.bits!r} name a plan; give it as plan=FILE")
        return self

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, every default written out, floats in their shortest form."""
        return canonical_json(self.model_dump())

    @property
    def label(self) -> str:
        """For people: ``lsq w4a4 optdigits/mdl resnet8 seed 0``."""
        return f"{self.method} {self.bits} {self.data}/{self.protocol or 'default'} {self.network} seed {self.seed}"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Several = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
MOST_CELLS = 20_000  # of a suite; to look at so many takes seconds
AXES = ("data", "data_params", "protocol", "network", "method", "params", "bits", "seed")


class SuiteSpec(Recipe):
    """A suite: a `RunSpec` in which data, data_params, protocol, network, method, params, bits and seed may each be a list.

    First and last layers have one policy for all methods, unless the suite says otherwise.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    first_last: FirstLast = Field(
        "8bit", description="bits of the first and the last layer; native: each method's own policy"
    )
    also: tuple[dict[str, Any], ...] = Field((), description="more cells: keys that differ from the suite's own")
    params: Annotated[tuple[dict[str, dict[str, Any]], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ({},)  # type: ignore[assignment]
    method: Several
    data: Several = ("optdigits",)
    data_params: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ({},)  # type: ignore[assignment]
    protocol: Annotated[tuple[str | None, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (None,)
    network: Several = ("resnet8",)
    bits: Several = ("w4a4",)
    seed: Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (0,)

    def cells(self, members: Callable[[str], Sequence[str]] | None = None) -> list[RunSpec]:
        """Every combination, then those of ``also``, as they were asked for (`resolve` normalises them).

        Args:
            members: The names of a chain's members, given the chain; default: those that it spells out.

        Raises:
            UserError: A cell is wrong, ``params`` name what is no method of the suite, or there are too many cells.
        """
        members = members or chain_names
        where = f"suite {self.name}"
        self._check_owners(members, where)
        cells = []
        for spec in self._points(where):
            ours = params_of(members(spec["method"]), spec["params"])
            cells.append(validated(RunSpec, spec | {"params": ours}, where))
        return cells

    def _points(self, where: str) -> list[dict[str, Any]]:
        """The keys and values of each cell, with the params of all methods."""
        own = self.model_dump(exclude={"also"})
        common = {k: v for k, v in own.items() if k not in (*AXES, "name", "description")}
        axes = [getattr(self, axis) for axis in AXES]
        if math.prod(map(len, axes)) > MOST_CELLS:
            raise UserError(
                f"{where} has {math.prod(map(len, axes)):,} cells; at most {MOST_CELLS:,}: make several of it"
            )
        points = [common | dict(zip(AXES, point, strict=True)) for point in itertools.product(*axes)]
        for more in self._also(where):
            points += more._points(f"{where}, also")
            if len(points) > MOST_CELLS:
                raise UserError(f"{where} has more than {MOST_CELLS:,} cells; make several of it")
        return points

    def _also(self, where: str) -> Iterator[SuiteSpec]:
        own = self.model_dump(exclude={"also"})
        return (validated(SuiteSpec, own | more, f"{where}, also") for more in self.also)

    def _check_owners(self, members: Callable[[str], Sequence[str]], where: str) -> set[str]:
        """The names of all methods; refuses settings of what is none of them, which would be left out in silence."""
        names = {name for method in self.method for name in members(method)}
        for more, also in zip(self.also, self._also(where), strict=True):
            inherited = {} if "params" in more else {"params": ({},)}  # of methods that it need not have
            names |= also.model_copy(update=inherited)._check_owners(members, f"{where}, also")
        for owner in (owner for params in self.params for owner in params):
            if owner not in names:
                raise UserError(f"{where}: params: {owner!r} is no method of it{nearest(owner, names)}")
        return names


def chain_names(method: str) -> list[str]:
    """The names that a chain spells out: ``"kd + lsq"`` is ``"kd+lsq"``."""
    return [name.strip() for name in method.split("+")]


def params_of(members: Iterable[str], params: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The part of a suite's ``params`` that these members of a chain read."""
    members = list(members)
    return {k: v for k, v in params.items() if k in members}


def parse_bits(text: str) -> Bits | Budget:
    """``"w4a4"`` -> ``Bits(4, 4)``, ``"avg2.81"`` -> ``Budget(2.81, 3)``, ``"avg2.5a4"`` -> ``Budget(2.5, 4)``.

    Raises:
        ValueError: The text is of neither form, or a width is out of range (one to eight bits, or 32 for float).
    """
    budget = _BUDGET.fullmatch(str(text))
    if budget is not None:
        average = float(budget[1])
        parsed: Bits | Budget = Budget(average, int(budget[2] or _round_half_up(average)))
        if not 1 <= average <= 8:
            raise ValueError(f"bits {text!r}: an average is 1 to 8 bits, not {average:g}")
        _check_widths(text, activations=parsed.a)
        return parsed
    match = _BITS.fullmatch(str(text))
    if match is None:
        raise ValueError(
            f"bits {text!r} are not of the form wXaY, e.g. w4a4 (4-bit weights, 4-bit activations), "
            "or avgB, e.g. avg2.81 (weights of 2.81 bits on average)"
        )
    parsed = Bits(int(match[1]), int(match[2]))
    _check_widths(text, weights=parsed.w, activations=parsed.a)
    return parsed


def _check_widths(text: str, **widths: int) -> None:
    for kind, width in widths.items():
        if width not in WIDTHS:
            raise ValueError(f"bits {text!r}: {kind} take 1 to 8 bits, or 32 for float, not {width}")


def _round_half_up(value: float) -> int:
    return int(value + 0.5)


def bits_text(bits: Bits | Budget) -> str:
    """The shortest text that `parse_bits` takes for this."""
    if isinstance(bits, Bits):
        return f"w{bits.w}a{bits.a}"
    return f"avg{bits.w:g}" + (f"a{bits.a}" if bits.a != _round_half_up(bits.w) else "")


def canonical_json(value: Any) -> str:
    """One text for one value, whatever the order of its keys. Raises ValueError for NaN and infinity."""
    return json.dumps(_one_zero(value), sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def _one_zero(value: Any) -> Any:
    """The value with every -0.0 as 0.0: they are one number and two texts."""
    if isinstance(value, dict):
        return {key: _one_zero(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_one_zero(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON")


def content_hash(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON: 64 bits, a clash in 10^9 among 190,000 runs."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def validated(model: type[Model], values: Any, where: str) -> Model:
    """``model(**values)``, with the first thing wrong told in one line.

    Args:
        model: The pydantic class to build.
        values: The keys and values as the user gave them.
        where: What the user would call the place, e.g. ``suite quickstart``.

    Raises:
        UserError: A key is unknown (the nearest known one is named), missing, or its value is out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, found {type(values).__name__}")
    try:
        return model(**{str(k): v for k, v in values.items()})
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error, model)}") from None


def _first(error: ValidationError, model: type[BaseModel]) -> str:
    # A misspelt key first: it is why another one is missing.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, model.model_fields)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    shown = reprlib.repr(first["input"])  # bounded: a YAML file of aliases can hold more than any memory
    if first["type"] == "value_error" and shown in message:  # a validator's own words
        return message
    text = f"{key}={shown}: {message[0].lower()}{message[1:]}"
    if first["type"] != "literal_error":
        return text
    meant = nearest(str(first["input"])[:80], re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected"))))
    return text if "; known" in meant else text + meant  # the words themselves are told already
