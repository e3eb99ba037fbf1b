from __future__ import annotations

import hashlib
import json
import random
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from qatbench.bench.errors import UserError, nearest
from qatbench.bench.seeds import seed_for
from qatbench.bench.spec import (
    Bits,
    Budget,
    Frozen,
    RunSpec,
    SuiteSpec,
    bits_text,
    canonical_json,
    content_hash,
    params_of,
    parse_bits,
    validated,
)

PLAIN = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def refusal(values: Any, model: type = RunSpec) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as caught:
        validated(model, values, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("typo", "meant"), [("epoch", "epochs"), ("wheight_decay", "weight_decay"), ("Batch", "batch")]
)
def test_unknown_key_names_the_nearest(typo: str, meant: str) -> None:
    """A misspelt setting would be ignored, or the user would have to look its name up."""
    assert f"did you mean '{meant}'?" in refusal({"method": "lsq", typo: 1})


def test_unknown_key_far_from_all_lists_them() -> None:
    """A user with no idea of the name would get no help."""
    message = refusal({"method": "lsq", "zzzzqqq": 1})
    assert "known: " in message
    assert "epochs" in message


def test_suite_with_unknown_key_names_the_nearest() -> None:
    """A misspelt axis of a suite would silently not be swept."""
    assert "did you mean 'method'?" in refusal({"name": "s", "methods": ["lsq"]}, SuiteSpec)


def test_missing_key_is_named() -> None:
    """A suite without a method would end in a traceback."""
    assert "'method' is missing" in refusal({"name": "s"}, SuiteSpec)


@pytest.mark.parametrize("values", [[], "lsq", None, 3])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    """A YAML file that holds a list would end in a traceback."""
    assert "expected keys and values" in refusal(values)


@pytest.mark.parametrize("key", ["lr", "float_lr", "momentum", "weight_decay", "clip"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_no_nan_and_no_infinity(key: str, value: Any) -> None:
    """A run whose learning rate is NaN would train, fail and be hashed to an id that equals nothing, itself included."""
    assert key in refusal({"method": "lsq", key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", -1), ("float_epochs", -1), ("seed", -1), ("seed", 2**31),
        ("seed", 0.5), ("batch", 0), ("lr", 0), ("lr", -0.1), ("momentum", 1),
        ("accumulate", 0), ("clip", 0), ("threads", 0), ("calibration", 0), ("optimizer", "lion"), ("schedule", "cos"),
        ("first_last", "4bit"), ("selection", "test"), ("precision", "fp64"),
    ],
)  # fmt: skip
def test_out_of_range_is_refused_in_one_line(key: str, value: Any) -> None:
    """A value that cannot be trained with would be found out minutes later, by a traceback."""
    message = refusal({"method": "lsq", key: value})
    assert key in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [("first_last", "8bits", "8bit"), ("first_last", "Native", "native"), ("optimizer", "adamm", "adam"),
     ("selection", "bestt", "best")],
)  # fmt: skip
def test_an_unknown_word_is_refused_with_the_nearest(key: str, value: str, meant: str) -> None:
    """Whoever misspells a word would have to look for the difference."""
    assert refusal({"method": "lsq", key: value}).endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("value", ["fp16", "16", 16])
def test_fp16_is_refused_with_its_reason(value: Any) -> None:
    """Loss scaling would corrupt the gradients that methods read between backward and update."""
    assert "loss scaling" in refusal({"method": "lsq", "precision": value})


@pytest.mark.parametrize(
    "bits", ["w4b4", "w0a4", "w33a4", "w4a0", "w9a4", "w4a16", "w4", "a4", "4", "", "w-1a4", "w4a4 ", "W4A4", "w4.0a4", "w４a4x"]
)  # fmt: skip
def test_bad_bits_are_refused_in_one_line(bits: str) -> None:
    """A misspelt width would be trained as something else, or end in a traceback."""
    assert repr(bits) in refusal({"method": "lsq", "bits": bits})


@pytest.mark.parametrize(
    ("text", "bits"), [("w4a4", (4, 4)), ("w1a8", (1, 8)), ("w32a32", (32, 32)), ("w2a32", (2, 32)), ("w04a4", (4, 4))]
)
def test_good_bits(text: str, bits: tuple[int, int]) -> None:
    """A width that the harness offers could not be asked for."""
    assert parse_bits(text) == bits
    assert RunSpec(method="lsq", bits=text).bits == f"w{bits[0]}a{bits[1]}"


def test_frozen() -> None:
    """A run could change after it was named, and its record would tell of another run."""
    spec = RunSpec(method="lsq")
    with pytest.raises(ValidationError, match="frozen"):
        spec.epochs = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        SuiteSpec(name="s", method="lsq").epochs = 5  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("key", "ways"),
    [
        ("lr", [0.1, 1e-1, "0.1", "1e-1", 0.10000000000000000001]),
        ("float_lr", [1, 1.0, "1", "1.0", 1e0]),
        ("momentum", [0, 0.0, "0"]),
        ("weight_decay", [1e-4, 0.0001, "1e-4", "1.0E-4"]),
        ("epochs", [4, 4.0, "4"]),
    ],
)
def test_canonical_form_does_not_depend_on_how_a_number_is_written(key: str, ways: list[Any]) -> None:
    """The same run would have two ids, and be trained twice (YAML reads ``1e-1`` as a text, JSON may write 1 for 1.0)."""
    forms = {validated(RunSpec, {"method": "lsq", key: way}, "here").canonical() for way in ways}
    assert len(forms) == 1


numbers = st.floats(min_value=1e-8, max_value=1e8)
recipes = st.fixed_dictionaries(
    {"method": st.just("kd+lsq")},
    optional={
        "lr": numbers, "float_lr": numbers, "weight_decay": numbers, "clip": st.none() | numbers, "epochs": st.integers(0, 100_000),
        "seed": st.integers(0, 2**31 - 1),
        "params": st.dictionaries(st.sampled_from(["kd", "lsq"]), st.dictionaries(st.text(max_size=4), numbers)),
        "data_params": st.dictionaries(st.text(max_size=4), st.lists(st.text(max_size=3), max_size=3)),
    },
)  # fmt: skip


@given(recipes, st.randoms(use_true_random=False))
@PLAIN
def test_hash_does_not_depend_on_key_order(recipe: dict, rng: random.Random) -> None:
    """The same suite with its lines in another order would be trained again."""

    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        rng.shuffle(keys)
        return {k: shuffled(value[k]) for k in keys}

    one, other = RunSpec(**recipe), RunSpec(**shuffled(recipe))
    assert one.canonical() == other.canonical()
    assert content_hash(one.model_dump()) == content_hash(other.model_dump())


@given(recipes)
@PLAIN
def test_canonical_json_is_read_back_whole(recipe: dict) -> None:
    """A record's spec could not be run again: a float would lose its last digit on the way through the file."""
    spec = RunSpec(**recipe)
    again = RunSpec(**json.loads(spec.canonical()))
    assert again == spec
    assert again.canonical() == spec.canonical()


@given(numbers, numbers)
@PLAIN
def test_different_numbers_have_different_hashes(one: float, other: float) -> None:
    """Two runs would share an id, and the second would never be trained."""
    hashes = {content_hash(RunSpec(method="lsq", lr=value).model_dump()) for value in (one, other)}
    assert len(hashes) == (1 if one == other else 2)


def test_content_hash_is_pinned() -> None:
    """Every finished run of every store would be forgotten: ids are the first 16 digits of SHA-256 of the canonical JSON."""
    text = '{"a":[0.1,null,"\\u00e9"],"b":1}'
    assert canonical_json({"b": 1, "a": (0.1, None, "é")}) == text
    assert content_hash({"b": 1, "a": [0.1, None, "é"]}) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert content_hash({}) == "44136fa355b3678a"


def test_canonical_json_refuses_what_has_no_single_text() -> None:
    """NaN is no JSON, and other readers of a store would choke on it."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})
    with pytest.raises(TypeError, match="no canonical JSON"):
        canonical_json({"x": object()})
    assert canonical_json({"b", "a"}) == '["a","b"]'


def test_suite_expands_to_every_combination() -> None:
    """A cell of the table would be missing, or be run twice."""
    suite = SuiteSpec(
        name="s", method=["fp32", "lsq"], bits=["w4a4", "w2a2"], seed=[0, 1, 2], protocol=["mdl", None], epochs=7
    )  # type: ignore[arg-type]
    cells = suite.cells()
    assert len(cells) == 2 * 2 * 3 * 2
    assert len({cell.canonical() for cell in cells}) == len(cells)
    assert {cell.epochs for cell in cells} == {7}
    assert {(c.method, c.bits, c.seed, c.protocol) for c in cells} >= {
        ("lsq", "w2a2", 2, None),
        ("fp32", "w4a4", 0, "mdl"),
    }


def test_suite_takes_one_value_for_a_list_of_one() -> None:
    """``method: lsq`` in a YAML file would be read as the methods l, s and q."""
    assert [c.method for c in SuiteSpec(name="s", method="lsq").cells()] == ["lsq"]  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["method", "data", "protocol", "network", "bits", "seed"])
def test_empty_axis_is_refused(axis: str) -> None:
    """A suite would expand to nothing, and be reported as done."""
    assert axis in refusal({"name": "s", "method": ["lsq"], axis: []}, SuiteSpec)


def test_bad_cell_of_a_suite_is_refused_in_one_line() -> None:
    """Wrong bits in one of many cells would end the expansion in a traceback."""
    with pytest.raises(UserError, match="suite s: bits 'w0a4'") as caught:
        SuiteSpec(name="s", method="lsq", bits=["w4a4", "w0a4"]).cells()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "x" * 65, "a b"])
def test_suite_name_is_a_file_name(name: str) -> None:
    """A suite's name becomes a file of the store; one with a slash would write elsewhere."""
    assert "name" in refusal({"name": name, "method": "lsq"}, SuiteSpec)


def test_a_cell_keeps_the_params_of_its_own_chain() -> None:
    """A suite with ``params`` for one method would be refused by all others, or move their ids."""
    params = {"kd": {"weight": 0.3}, "pact": {"alpha": 4.0}}
    assert params_of(["kd", "lsq"], params) == {"kd": {"weight": 0.3}}
    suite = SuiteSpec(name="s", method=["lsq", "pact", "kd+pact"], params=params)  # type: ignore[arg-type]
    assert [set(cell.params) for cell in suite.cells()] == [set(), {"pact"}, {"kd", "pact"}]


@pytest.mark.parametrize("chain", ["kd + lsq", " kd+lsq", "kd +lsq "])
def test_blanks_in_a_chain_are_none(chain: str) -> None:
    """`kd + lsq` would train as kd+lsq, but without its settings, and under another name."""
    suite = SuiteSpec(name="s", method=chain, params={"kd": {"weight": 0.3}})  # type: ignore[arg-type]
    assert suite.cells() == SuiteSpec(name="s", method="kd+lsq", params={"kd": {"weight": 0.3}}).cells()  # type: ignore[arg-type]
    assert RunSpec(method=chain).method == "kd+lsq"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "kd+lsq", "params": {"kdd": {}}}, "'kdd' is no method of it; did you mean 'kd'?"),
        ({"method": "lsq", "params": {"kd": {}}}, "'kd' is no method of it; known: lsq"),
        ({"method": "lsq", "params": [{}, {"lqs": {}}]}, "'lqs' is no method of it; did you mean 'lsq'?"),
        ({"method": "lsq", "params": {"lsq": {}}, "also": [{"bits": "w2a2", "params": {"lsqq": {}}}]}, "also: params: 'lsqq'"),
        ({"method": "lsq", "params": {"pact": {}}, "also": [{"method": "pact", "params": {"lsq": {}}}]}, "also: params: 'lsq'"),
    ],
)  # fmt: skip
def test_params_of_no_method_of_the_suite_are_refused(values: dict, words: str) -> None:
    """A misspelt method's settings would be left out, and its default trained under their name."""
    with pytest.raises(UserError, match="suite s") as caught:
        validated(SuiteSpec, {"name": "s", **values}, "suite s").cells()
    assert words in str(caught.value)


def test_params_may_be_those_of_one_cell_alone() -> None:
    """A suite could not give settings to a method of `also`, or to what a wrapper brings along."""
    values = {
        "name": "s",
        "method": "lsq",
        "params": {"pact": {"alpha": 2}},
        "also": [{"method": "kd+pact"}, {"seed": 1}],
    }
    assert [c.params for c in validated(SuiteSpec, values, "s").cells()] == [{}, {"pact": {"alpha": 2}}, {}]
    inner = SuiteSpec(name="s", method="wrap", params={"lsq": {"x": 1}})  # type: ignore[arg-type]
    assert inner.cells(lambda chain: [*chain.split("+"), "lsq"])[0].params == {"lsq": {"x": 1}}


@pytest.mark.parametrize("key", ["lr", "epochs", "seed", "clip", "batch", "momentum"])
@pytest.mark.parametrize("value", [True, False])
def test_truth_is_no_number(key: str, value: bool) -> None:
    """`lr: true` would train at 1.0, and `seed: [true, 0]` at seed 1."""
    assert "not true or false" in refusal({"method": "lsq", key: value})
    if key == "seed":
        assert "not true or false" in refusal({"name": "s", "method": "lsq", "seed": [0, value]}, SuiteSpec)


def test_truth_is_no_number_among_a_plugins_settings_either() -> None:
    """`--set emaq.momentum=true` would be 1.0."""

    class Params(Frozen):
        share: float | None = None
        steps: Annotated[tuple[int, ...], Field(max_length=3)] = ()
        mixed: int | bool = 1
        flag: bool = False
        free: dict[str, Any] = Field(default_factory=dict)

    for wrong in ({"share": True}, {"steps": [1, True]}):
        assert "not true or false" in refusal(wrong, Params)
    assert validated(Params, {"mixed": True, "flag": True, "free": {"a": True}}, "here").free == {"a": True}


def test_a_suite_has_so_many_cells_at_most() -> None:
    """Five short lists would fill the memory before the first run."""
    lists = {"method": ["lsq"] * 50, "network": ["a"] * 50, "data": ["b"] * 50}
    with pytest.raises(UserError, match=r"125,000 cells"):
        validated(SuiteSpec, {"name": "s", **lists}, "suite s").cells()
    half = {"name": "s", "method": ["lsq"] * 100, "network": ["a"] * 100}
    nested = half | {"also": [{"seed": 1}, {"seed": 2, "also": [{"seed": 3}]}]}
    with pytest.raises(UserError, match=r"more than 20,000 cells"):
        validated(SuiteSpec, nested, "suite s").cells()


def test_nearest_names_one_or_lists_all() -> None:
    """The tail of every "unknown name" message would be wrong."""
    assert nearest("lqs", ["lsq", "pact"]) == "; did you mean 'lsq'?"
    assert nearest("LSQ", ["lsq", "pact"]) == "; did you mean 'lsq'?"
    assert nearest("zzz", ["pact", "lsq"]) == "; known: lsq, pact"
    assert nearest("zzz", []) == "; known: none"


def test_seeds_are_the_same_everywhere_and_differ_by_what_they_name() -> None:
    """Splits and initial weights would change with Python's hash seed, or two draws would be the same numbers."""
    assert (
        seed_for("split", "optdigits", 0) == int(hashlib.sha256(b'["split", "optdigits", 0]').hexdigest()[:16], 16) >> 1
    )
    draws = [
        ("split", "a", 0),
        ("split", "a", 1),
        ("order", "a", 0),
        ("split", "a0"),
        ("split", "a", "0"),
        ("spl", "ita", 0),
    ]
    assert len({seed_for(*draw) for draw in draws}) == len(draws)
    assert all(0 <= seed_for("x", k) < 2**63 for k in range(100))


def test_minus_zero_is_zero() -> None:
    """`weight_decay: -0.0` would be trained again as another run."""
    assert canonical_json({"a": -0.0, "b": [-0.0], "c": "x:-0.0,"}) == '{"a":0.0,"b":[0.0],"c":"x:-0.0,"}'


# --- budgets, plans, and suites of settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed", "normal"),
    [
        ("avg2.81", Budget(2.81, 3), "avg2.81"), ("avg2.5", Budget(2.5, 3), "avg2.5"), ("avg3", Budget(3.0, 3), "avg3"),
        ("avg2.810", Budget(2.81, 3), "avg2.81"), ("avg2.81a3", Budget(2.81, 3), "avg2.81"),
        ("avg2.4a4", Budget(2.4, 4), "avg2.4a4"), ("avg4a32", Budget(4.0, 32), "avg4a32"), ("w04a4", Bits(4, 4), "w4a4"),
    ],
)  # fmt: skip
def test_bits_and_budgets(text: str, parsed: Bits | Budget, normal: str) -> None:
    """One budget would be two cells of a table, or its activations would have other bits than its average rounded."""
    assert parse_bits(text) == parsed
    assert type(parse_bits(text)) is type(parsed)
    assert bits_text(parsed) == normal
    assert RunSpec(method="adq", bits=text).bits == normal


@pytest.mark.parametrize("text", ["avg", "avg9", "avg0.5", "avg2.81a9", "avg-2", "2.81", "avg2,81"])
def test_a_wrong_budget_is_one_line(text: str) -> None:
    """A typo in an average would be a traceback, or be taken for something else."""
    assert text in refusal({"method": "adq", "bits": text})


def test_a_plan_from_a_file(tmp_path: Any) -> None:
    """A plan that was found elsewhere, or by another run, could not be used; or its path, not its content, would name the run."""
    file = tmp_path / "plan.yaml"
    file.write_text("conv1: w8a8\nbody: w2a4\nhead: [32, 8]\n")
    spec = validated(RunSpec, {"method": "lsq", "plan": str(file)}, "run")
    assert spec.plan == {"conv1": Bits(8, 8), "body": Bits(2, 4), "head": Bits(32, 8)}
    assert spec.bits.startswith("plan-")
    record = tmp_path / "result.json"
    record.write_text(json.dumps({"cost": {"plan": {"conv1": [8, 8], "body": [2, 4], "head": [32, 8]}}}))
    assert validated(RunSpec, {"method": "lsq", "plan": str(record), "bits": "w2a2"}, "run") == spec
    assert RunSpec(**json.loads(spec.canonical())) == spec
    file.write_text("0: w8a8\nlayer1.010: w2a4\n")
    assert set(validated(RunSpec, {"method": "lsq", "plan": str(file)}, "run").plan or ()) == {"0", "layer1.010"}
    file.write_text("conv1: w8a8\nbody: w3a4\nhead: [32, 8]\n")
    assert validated(RunSpec, {"method": "lsq", "plan": str(file)}, "run").bits != spec.bits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("conv1: w9a4", "weights take 1 to 8 bits"), ("conv1: 4", "not of the form"), ("conv1: avg3", "is an average"),
        ("- a", "holds no plan"), ("", "holds no plan"), ("a: [", "is not YAML"), (None, "No such file"),
        ("a: w4a4\na: w2a2", "line 2: key 'a' stands twice"), ("a: !!bool x", "tag '!!bool'"), ("a: [true, 4]", "not of the form"),
    ],
)  # fmt: skip
def test_a_wrong_plan_file_is_one_line(text: str | None, words: str, tmp_path: Any) -> None:
    """A broken plan file would be a traceback, or be run as something else."""
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_text(text)
    assert words in refusal({"method": "lsq", "plan": str(file)})


def test_bits_that_name_a_plan_need_it() -> None:
    """A label copied from a table would be taken for bits."""
    assert "plan=FILE" in refusal({"method": "lsq", "bits": "plan-0123abcd"})


def test_a_suite_may_list_settings_and_add_cells() -> None:
    """An ablation over a method's settings, or one more cell for one method, would need a suite of its own each."""
    values = {
        "name": "s", "method": ["lsq", "adq"], "params": [{"adq": {"period": 1}}, {"adq": {"period": 5}}],
        "also": [{"method": "adq", "bits": ["avg2.5", "avg3"], "params": {}}],
    }  # fmt: skip
    cells = validated(SuiteSpec, values, "suite s").cells()
    found = [(c.method, c.bits, c.params.get("adq", {}).get("period")) for c in cells]
    assert found == [
        ("lsq", "w4a4", None), ("lsq", "w4a4", None), ("adq", "w4a4", 1), ("adq", "w4a4", 5),
        ("adq", "avg2.5", None), ("adq", "avg3", None),
    ]  # fmt: skip
    assert {c.first_last for c in cells} == {"8bit"}
    assert RunSpec(method="lsq").first_last == "native"
    wrong = values | {"also": [{"mehtod": "adq"}]}
    with pytest.raises(UserError, match="suite s, also: unknown key 'mehtod'; did you mean 'method'"):
        validated(SuiteSpec, wrong, "suite s").cells()
