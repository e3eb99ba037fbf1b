"""Guards the hooks of methods and quantizers: whatever a plugin's hook raises or returns, the run fails with the hook's name.

Without a guard a `StopIteration` would end an epoch early without a word, a `SystemExit` the sweep, and a missing ``return`` would
be reported somewhere else in other words. Each hook that a class defines gets its guard when the class is made, so the guard also
holds where one member of a chain calls another's hook.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import edges
from .errors import RunFailed, UserError, nearest
from .secrets import scrub
from .spec import WIDTHS, Frozen

Check = Callable[..., str | None]
"""Of owner, result and the hook's arguments: what was expected, or None if the result is right."""


def guard(cls: type, base: type, checks: Mapping[str, Check]) -> None:
    """Guard the hooks that a class itself defines.

    Args:
        cls: A class of methods or quantizers.
        base: The harness's own class, whose hooks need no guard.
        checks: Hook -> what its result must be.

    Raises:
        TypeError: What has the name of a hook is no function.
    """
    for name, check in checks.items():
        hook = vars(cls).get(name)
        if hook is None and name not in vars(cls):
            continue
        if not inspect.isfunction(hook):
            raise TypeError(f"{cls.__name__}.{name} is {_shown(hook)}; it must be a function, def {name}(self, ...)")
        if hook is not vars(base).get(name) and not hasattr(hook, "hook"):  # taken from a class where it is guarded
            setattr(cls, name, _guarded(hook, name, check))


def _guarded(hook: Callable[..., Any], name: str, check: Check) -> Callable[..., Any]:
    @functools.wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with failing_as(self, name):
            result = hook(self, *args, **kwargs)
        if torch.compiler.is_compiling():  # e.g. exported: a check would fix the number of images
            return result
        try:
            expected = check(self, result, *args, **kwargs)
        except Exception:  # it has not even the attributes that the check looks at
            expected = "see its docstring in the base class"
        if expected is not None:
            raise RunFailed(f"{_owner(self)}.{name} returned {_shown(result)}; expected {expected}")
        return result

    call.hook = hook  # type: ignore[attr-defined]
    return call


class failing_as:  # noqa: N801  a context manager, written as a class: a generator could not pass on a StopIteration
    """Turn whatever is raised in here, but Ctrl-C and a word to the user, into a `RunFailed` that names the hook."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, RunFailed | UserError | KeyboardInterrupt):
            return
        text = " ".join(str(error).split())
        raise RunFailed(
            f"{_owner(self.owner)}.{self.name} raised {type(error).__name__}{text and f': {text}'}"
        ) from error


def _owner(owner: Any) -> str:
    cls = owner if isinstance(owner, type) else type(owner)
    return getattr(cls, "name", "") or cls.__name__


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {list(value.shape)}"
    text = scrub(" ".join(repr(value).split()))  # before it is cut, which would leave half a secret
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_attributes(method: Any) -> None:
    """Refuse class attributes of a method that are not of the kind which `Method` documents.

    Args:
        method: A method, or its class.

    Raises:
        TypeError: One is not; the message is one line.
    """
    for name, (right, expected) in _ATTRIBUTES.items():
        if name == "candidates" and isinstance(method, type):  # a property
            continue
        value = None
        try:
            value = getattr(method, name)
            fits = right(value)
        except Exception as error:
            fits, value = False, error if value is None else value
        if not fits:
            raise TypeError(f"{_owner(method)}.{name} is {_shown(value)}; expected {expected}{_meant(name, value)}")


def _meant(name: str, value: Any) -> str:
    """The nearest word to one that is unknown, of an attribute that is a word."""
    known = _CHOICES.get(name, ())
    wrong = [
        v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, str) and v not in known
    ]
    return nearest(wrong[0], known) if known and wrong else ""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "first_last": edges.WORDS,
    "fidelity": ("paper", "reconstruction", "baseline"),
    "teacher": ("float", "ema", "student"),
}

_ATTRIBUTES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "version": (_is_count, "a whole number from 1 on"),
    "views": (_is_count, "a whole number from 1 on"),
    "fidelity": (lambda v: v in _CHOICES["fidelity"], "'paper', 'reconstruction' or 'baseline'"),
    "teacher": (lambda v: v is None or v in _CHOICES["teacher"], "None, 'float', 'ema' or 'student'"),
    "first_last": (lambda v: bool(edges.pair(v)), "'8bit', 'fp' or 'same', or two of them"),
    **dict.fromkeys(
        ("bits", "candidates"),
        (lambda v: len(v) > 0 and all(type(b) is int and b in WIDTHS for b in v), "widths, e.g. range(2, 9)"),
    ),
    "alters": (lambda v: isinstance(v, frozenset | set) and all(isinstance(n, str) for n in v), "a frozenset of names"),
    "test_params": (lambda v: isinstance(v, Mapping), "a dict of settings"),
    "Params": (lambda v: issubclass(v, Frozen), "a subclass of qatbench.bench.spec.Frozen"),
    **dict.fromkeys(("trains", "changes_net", "weights_only"), (_is_bool, "True or False")),
    "paper": (lambda v: isinstance(v, str), "text"),
}


# --- what the hooks of a method return


def _anything(method: Any, result: Any, *_: Any, **__: Any) -> str | None:
    return None


def _losses(method: Any, result: Any, *_: Any, **__: Any) -> str | None:
    named = isinstance(result, Mapping) and bool(result) and all(isinstance(name, str) for name in result)
    if not named or not all(isinstance(v, Tensor) and v.ndim == 0 and v.is_floating_point() for v in result.values()):
        return "a dict of names and scalar losses, float []"
    return None


def _logits(method: Any, result: Any, net: Any, batch: Any) -> str | None:
    shape = [len(batch.x), method.task.outputs]
    right = isinstance(result, Tensor) and list(result.shape) == shape and result.is_floating_point()
    return None if right else f"logits, float {shape}"


def _plan(method: Any, result: Any, sites: Any, *_: Any) -> str | None:
    layers = [site.name for site in sites if site.kind == "layer"]
    if not isinstance(result, Mapping) or any(name not in layers for name in result):
        return f"a dict of the layers ({', '.join(layers)}) and their bits"
    if not all(len(bits) == 2 and all(type(b) is int and b in WIDTHS for b in bits) for bits in result.values()):
        return f"Bits(w, a) for each layer, each of {', '.join(map(str, WIDTHS))}"
    return None


def _quantizer(method: Any, result: Any, bits: int, *_: Any) -> str | None:
    from .quant import Quantizer

    right = isinstance(result, Quantizer) and result.bits == bits
    return None if right else f"a Quantizer of {bits} bits"


def _module(method: Any, result: Any, *_: Any) -> str | None:
    return None if isinstance(result, nn.Module) else "an nn.Module"


def _names(method: Any, result: Any, *_: Any) -> str | None:
    right = isinstance(result, Sequence) and not isinstance(result, str) and all(isinstance(n, str) for n in result)
    return None if right else "a list of names of modules"


def _parameters(method: Any, result: Any, *_: Any) -> str | None:
    right = isinstance(result, Collection) and all(isinstance(p, nn.Parameter) for p in result)
    return None if right else "a collection of nn.Parameter"


def _param_groups(method: Any, result: Any, *_: Any) -> str | None:
    keys = {"params", "lr_scale", "weight_decay"}
    if not isinstance(result, list) or not all(isinstance(group, dict) and set(group) == keys for group in result):
        return f"a list of dicts with the keys {', '.join(sorted(keys))}"
    parameters = [p for group in result for p in group["params"]]
    if not all(isinstance(p, nn.Parameter) for p in parameters) or len(set(parameters)) < len(parameters):
        return "groups of nn.Parameter, none of them twice"
    return None


def _stages(method: Any, result: Any, epochs: int) -> str | None:
    from .method import Stage

    if not isinstance(result, list) or not result or not all(isinstance(stage, Stage) for stage in result):
        return "a list of Stage"
    right = all(stage.epochs >= 0 for stage in result) and sum(stage.epochs for stage in result) == epochs
    return None if right else f"stages of {epochs} epochs together"


def _harm(method: Any, result: Any, sites: Any, widths: Any, *_: Any) -> str | None:
    if set(result) == {site.name for site in sites} and all(
        set(costs) == set(widths) and all(math.isfinite(c) for c in costs.values()) for costs in result.values()
    ):
        return None
    return "layer -> width -> a finite number, for each layer and width that was asked for"


def _widths(method: Any, result: Any, harm: Any, *_: Any) -> str | None:
    right = set(result) == set(harm) and all(width in harm[name] for name, width in result.items())
    return None if right else "layer -> width, for each layer one of its candidates"


def _reason(method: Any, result: Any, *_: Any) -> str | None:
    return None if result is None or (isinstance(result, str) and result) else "None, or the reason in words"


OF_METHOD: Mapping[str, Check] = {
    "plan": _plan,
    "harm": _harm,
    "quantized": lambda method, result, *_: None if callable(result) else "a function of a layer's name and a width",
    "allocate": _widths,
    "weight_quantizer": _quantizer,
    "act_quantizer": _quantizer,
    "replace": _module,
    "taps": _names,
    "param_groups": _param_groups,
    "stages": _stages,
    "frozen": _parameters,
    "losses": _losses,
    "predict": _logits,
    "deploy": _module,
    "skip": _reason,
    **dict.fromkeys(
        ("prepare", "start", "epoch_start", "before_update", "after_update", "validated", "step"), _anything
    ),
}

# --- and those of a quantizer


def _like_input(quantizer: Any, result: Any, x: Tensor) -> str | None:
    right = isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype
    return None if right else f"a tensor like the input, {x.dtype} {list(x.shape)}"


def _codes(quantizer: Any, result: Any, x: Tensor) -> str | None:
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not isinstance(result[0], Tensor)
        or not callable(result[1])
    ):
        return "integer codes, and the function that decodes them"
    codes = result[0]
    right = codes.shape == x.shape and not codes.is_floating_point() and not codes.is_complex()
    return None if right else f"integer codes {list(x.shape)}"


OF_QUANTIZER: Mapping[str, Check] = {
    "quantize": _like_input,
    "encode": _codes,
    "redo": lambda quantizer, result, x: None if result is None or callable(result) else "a function, or None",
    "constants": lambda quantizer, result: None if type(result) is int and result >= 0 else "a number, 0 or more",
    **dict.fromkeys(("fit", "project"), _anything),
}
