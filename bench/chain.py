"""Chains: ``"kd+lsq"`` is the wrapper ``kd`` around the method ``lsq``, so that composition is an axis of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from .errors import UserError, nearest
from .hooks import check_attributes, failing_as
from .method import Method, Wrapper
from .registry import find
from .spec import Frozen, chain_names, validated


def members(text: str) -> list[type[Method]]:
    """The classes of a chain, the outermost first, with a wrapper's default inner method filled in.

    Raises:
        UserError: A name is unknown, a method stands where only a wrapper can, or two members clash.
    """
    names = chain_names(text)
    if not all(names):
        raise UserError(f"method {text!r} is not a chain of names joined by '+', e.g. kd+lsq")
    classes = [find("methods", name) for name in names]
    for cls in classes[:-1]:
        if not issubclass(cls, Wrapper):
            raise UserError(f"method {text!r}: {cls.name} is not a wrapper, so it can only stand last")
    while issubclass(classes[-1], Wrapper):
        inner = classes[-1].default_inner
        if inner is None:
            raise UserError(f"{classes[-1].name} is a wrapper; name what it wraps, e.g. {classes[-1].name}+lsq")
        classes += [find("methods", name) for name in chain_names(inner)]
    _refuse_clashes(text, classes)
    return classes


def normal_name(text: str) -> str:
    """The shortest name of a chain: a wrapper's default inner method is left out (``fqat+lsq`` is ``fqat``)."""
    names = [cls.name for cls in members(text)]
    for k in range(len(names) - 1, 0, -1):
        inner = getattr(find("methods", names[k - 1]), "default_inner", None)
        if inner == "+".join(names[k:]):
            names = names[:k]
    return "+".join(names)


def _refuse_clashes(text: str, classes: list[type[Method]]) -> None:
    for one, other in combinations(classes, 2):
        if one is other:
            raise UserError(f"method {text!r}: {one.name} stands twice")
        both = one.alters & other.alters
        if both:
            raise UserError(
                f"method {text!r}: {one.name} and {other.name} both alter the {', '.join(sorted(both))}; use one of them"
            )
        if "loss" in one.alters and issubclass(other, Wrapper) and other.losses is not Wrapper.losses:
            raise UserError(
                f"method {text!r}: {one.name} replaces the task's loss, and with it what {other.name} does to that; "
                f"name {other.name} before {one.name}"
            )
        own_steps = [cls for cls in (one, other) if cls.step not in (Method.step, Wrapper.step)]
        if len(own_steps) == 2:
            raise UserError(
                f"method {text!r}: {one.name} and {other.name} both have a training step of their own; use one of them"
            )


def chain_params(text: str, params: Mapping[str, Mapping[str, Any]]) -> dict[str, Frozen]:
    """The validated settings of every member of a chain, defaults filled in.

    Raises:
        UserError: ``params`` names a method that is not in the chain, or a setting that the method does not have.
    """
    classes = {cls.name: cls for cls in members(text)}
    for name in params:
        if name not in classes:
            raise UserError(f"params: {name!r} is not part of method {text!r}{nearest(name, classes)}")
    return {
        name: validated(cls.Params, dict(params.get(name, {})), f"params of {name}") for name, cls in classes.items()
    }


def build(text: str, params: Mapping[str, Mapping[str, Any]]) -> Method:
    """The outermost method of a chain, with its inner methods inside; not yet attached to a network.

    Raises:
        UserError: See `chain_params`.
        RunFailed: A member cannot be made, or its attributes are not of the kind that `Method` documents.
    """
    settings = chain_params(text, params)
    *wrappers, innermost = members(text)
    method = _made(innermost, settings[innermost.name])
    for cls in reversed(wrappers):
        method = _made(cls, method, settings[cls.name])
    return method


def _made(cls: type[Method], *args: Any) -> Method:
    with failing_as(cls, "__init__"):
        method = cls(*args)
        check_attributes(method)  # once more: the object may have set its own
    return method
