from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench.chain import build, chain_params, members, normal_name
from qatbench.bench.errors import UserError

Plug = Callable[..., Path]


def refusal(text: str, params: Mapping[str, Any] | None = None) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as caught:
        chain_params(text, params or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_chain_is_built_inside_out() -> None:
    """``kd+lsq`` would be another method than distillation around LSQ."""
    method = build("kd+lsq", {"kd": {"weight": 0.25}})
    assert [type(m).name for m in method.members] == ["lsq", "kd"]
    assert method.params.weight == 0.25
    assert method.inner.name == "lsq"
    assert [cls.name for cls in members(" kd + lsq ")] == ["kd", "lsq"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("lsq+kd", "method 'lsq+kd': lsq is not a wrapper, so it can only stand last"),
        ("lsq+pact", "lsq is not a wrapper"),
        ("kd", "kd is a wrapper; name what it wraps, e.g. kd+lsq"),
        ("kd+kd+lsq", "kd stands twice"),
        ("kd+kd", "kd is a wrapper; name what it wraps"),
        ("", "is not a chain of names"),
        ("+", "is not a chain of names"),
        ("kd+", "is not a chain of names"),
        ("+lsq", "is not a chain of names"),
        ("kd++lsq", "is not a chain of names"),
        ("kd+lqs", "unknown method 'lqs'; did you mean 'lsq'?"),
        ("kd,lsq", "unknown method 'kd,lsq'"),
    ],
)
def test_what_is_no_chain_is_refused_with_a_hint(text: str, answer: str) -> None:
    """A chain that makes no sense would be trained as something else, or end in a traceback."""
    assert answer in refusal(text)


WRAPPERS = """
class One(Wrapper):
    name = "one"
    alters = frozenset({"joint", "logits"})

class Other(Wrapper):
    name = "other"
    alters = frozenset({"joint", "norm"})

class Free(Wrapper):
    name = "free"
    alters = frozenset({"head"})

class StepOne(Wrapper):
    name = "step_one"
    def step(self, run):
        self.inner.step(run)

class StepOther(Wrapper):
    name = "step_other"
    def step(self, run):
        self.inner.step(run)

class OwnStep(LSQ):
    name = "own_step"
    def step(self, run):
        super().step(run)
"""


def test_two_that_alter_the_same_are_refused(plug: Plug) -> None:
    """The outer one would throw away what the inner one put there, and the row would still carry both names."""
    plug(WRAPPERS)
    assert refusal("one+other+lsq") == "method 'one+other+lsq': one and other both alter the joint; use one of them"
    assert refusal("other+free+one+lsq").startswith("method 'other+free+one+lsq': other and one both alter")
    assert [m.name for m in build("one+free+kd+lsq", {}).members] == ["lsq", "kd", "free", "one"]


@pytest.mark.parametrize("text", ["step_one+step_other+lsq", "step_one+own_step", "step_one+kd+own_step"])
def test_two_steps_of_their_own_are_refused(text: str, plug: Plug) -> None:
    """Only the outermost step runs, so the inner method would silently not be the method it says."""
    plug(WRAPPERS)
    assert "both have a training step of their own" in refusal(text)


def test_one_step_of_its_own_is_fine(plug: Plug) -> None:
    """A sharpness wrapper could not be put around anything."""
    plug(WRAPPERS)
    assert len(members("step_one+kd+lsq")) == 3
    assert len(members("kd+own_step")) == 2


DEFAULTS = """
class Deep(Wrapper):
    name = "deep"
    default_inner = "lsq"

class Deeper(Wrapper):
    name = "deeper"
    default_inner = "deep"

class Pair(Wrapper):
    name = "pair"
    default_inner = "kd+lsq"

class Odd(Wrapper):
    name = "odd"
    default_inner = "no_such"
"""


@pytest.mark.parametrize(
    ("text", "normal", "chain"),
    [
        ("deep", "deep", ["deep", "lsq"]),
        ("deep+lsq", "deep", ["deep", "lsq"]),
        ("deep+pact", "deep+pact", ["deep", "pact"]),
        ("kd+deep+lsq", "kd+deep", ["kd", "deep", "lsq"]),
        ("kd+lsq", "kd+lsq", ["kd", "lsq"]),
        ("deeper", "deeper", ["deeper", "deep", "lsq"]),
        ("deeper+deep+lsq", "deeper", ["deeper", "deep", "lsq"]),
        ("deeper+deep+pact", "deeper+deep+pact", ["deeper", "deep", "pact"]),
        ("pair+kd+lsq", "pair", ["pair", "kd", "lsq"]),
        ("pair+kd+pact", "pair+kd+pact", ["pair", "kd", "pact"]),
    ],
)
def test_a_default_inner_method_may_be_left_out(text: str, normal: str, chain: list[str], plug: Plug) -> None:
    """``fqat`` and ``fqat+lsq`` would be two rows, each trained on its own."""
    plug(DEFAULTS)
    assert normal_name(text) == normal
    assert [cls.name for cls in members(text)] == chain
    assert [cls.name for cls in members(normal)] == chain


def test_a_default_that_does_not_exist_is_told(plug: Plug) -> None:
    """A plugin author's slip would end in a KeyError."""
    plug(DEFAULTS)
    assert "unknown method 'no_such'" in refusal("odd")


@pytest.mark.parametrize(
    ("params", "answer"),
    [
        ({"pact": {"alpha": 3}}, "params: 'pact' is not part of method 'kd+lsq'"),
        ({"kdd": {}}, "did you mean 'kd'?"),
        ({"kd": {"wieght": 0.5}}, "params of kd: unknown key 'wieght'; did you mean 'weight'?"),
        ({"kd": {"weight": 2}}, "params of kd: weight=2: "),
        ({"kd": {"weight": float("nan")}}, "weight=nan"),
        ({"lsq": {"x": 1}}, "params of lsq: unknown key 'x'"),
    ],
)
def test_params_are_checked_against_their_member(params: dict, answer: str) -> None:
    """A setting that nobody reads would be swept over, at the price of many runs that are all the same."""
    assert answer in refusal("kd+lsq", params)


def test_params_are_filled_in() -> None:
    """Defaults would not be in the record, so a later change of a default would change what an old record means."""
    filled = chain_params("kd+lsq", {"kd": {"temperature": 2}})
    assert filled["kd"].model_dump() == {"weight": 0.5, "temperature": 2.0}
    assert set(filled) == {"kd", "lsq"}


def test_a_wrapper_takes_what_it_does_not_say_from_the_inner_method() -> None:
    """``kd+ptq`` would claim to train, ``kd+fp32`` to have 4 bits."""
    assert build("kd+ptq", {}).trains is False
    assert tuple(build("kd+fp32", {}).bits) == (32,)
    assert tuple(build("kd+lsq", {}).bits) == tuple(range(2, 9))


def test_views_are_the_most_that_a_member_wants(plug: Plug) -> None:
    """A method inside a chain would not get the second view of each image."""
    plug(
        "class Views(LSQ):\n    name = 'two_views'\n    views = 2\nclass Three(Wrapper):\n    name = 'three'\n    views = 3\n"
    )
    assert build("kd+two_views", {}).views == 2
    assert build("three+two_views", {}).views == 3
    assert build("kd+three+lsq", {}).views == 3


@pytest.mark.parametrize("inner", ["ptq", "kd+ptq"])
def test_a_wrapper_around_what_does_not_train_is_skipped(inner: str) -> None:
    """Distillation around post-training quantization would be a row of its own with ptq's number."""
    method = build(f"kd+{inner}" if inner == "ptq" else inner, {})
    reason = method.skip(None)  # type: ignore[arg-type]
    assert reason is not None
    assert "ptq does not train" in reason
