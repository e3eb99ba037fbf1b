"""The one reader of suites, plans and settings."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from qatbench.bench.errors import UserError
from qatbench.bench.yaml import LARGEST, NotYaml, load, parse


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text, "here")
    message = str(caught.value)
    assert message.startswith("here"), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("+3", 3),
        ("0", 0),
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("010.5", 10.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("yes", "yes"),
        ("off", "off"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2020-01-01", "2020-01-01"),
        ("2020-13-45", "2020-13-45"),
        ("1.2.3", "1.2.3"),
        ("lodo:mnist", "lodo:mnist"),
        ("avg2.81", "avg2.81"),
        ("w4a4", "w4a4"),
        ("e5", "e5"),
        ("0x", "0x"),
        ("'010'", "010"),
        ('"0x10"', "0x10"),
        ("'1_000'", "1_000"),
        ("a_1", "a_1"),
        ("_1", "_1"),
        ("＋3", "＋3"),
        ("٣", "٣"),
    ],
)
def test_plain_values_are_what_they_look_like(text: str, value: Any) -> None:
    """Seed 010 would be 8 and seed 08 the text "08": two seeds, one run; and lr=1:30 would train at 90."""
    found = parse(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["0x10", "0o17", "0b1", "1_000", "-1_0.5", "1_0e3", "+0X1f", "1__0"])
def test_numbers_that_readers_differ_about_are_refused(text: str) -> None:
    """One reader's 16 is another's text, and both would be silent about it."""
    assert "read in different ways" in refusal(text)
    assert "line 3" in refusal(f"a:\n- 1\n- {text}")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("lr: 0.1\nepochs: 3\nlr: 0.5", 3, "lr"),
        ("a:\n  b: 1\n  b: 1", 3, "b"),
        ("- {x: 1, x: 2}", 1, "x"),
        ("1: a\n'1': b", 2, "1"),
        ("a: {b: [{c: 1,\n c: 2}]}", 2, "c"),
        ("a: &m {x: 1}\nb:\n  <<: *m\n  <<: *m", 4, "<<"),
        ("'a': 1\n\"a\": 2", 2, "a"),
        ("? a\n: 1\n? a\n: 2", 3, "a"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, line: int, key: str) -> None:
    """The last one would count: half of a suite, or of a method's settings, would be gone without a word."""
    assert f"line {line}: key '{key}' stands twice" in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "!!bool x",
        "!!int ''",
        "!!timestamp x",
        "a: !!float 3",
        "!!str 5",
        "! x",
        "!x y",
        "- !!set {a}",
        "!!python/name:os.system x",
        "!!int x: 1",
    ],
)
def test_tags_are_refused(text: str) -> None:
    """A tag whose value does not fit is an error inside of the YAML library, of whatever type."""
    assert "tag" in refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 2000, "in each other"),
        ("{a: " * 2000, "in each other"),
        ("- " * 2000 + "x", "in each other"),
        ("&a [*a]", "nothing that is complete"),
        ("*a", "nothing that is complete"),
        ("[&a x, &a y]", "stands twice"),
        ("&k a: 1", "has an anchor"),
        ("[a]: 1", "a key is a name"),
        ("{{a: 1}: 1}", "a key is a name"),
        ("&a x: 1\n*a : 2", "has an anchor"),
        ("a\n---\nb", "second document"),
        ("---\n---", "second document"),
        ("<<: 3", "must be a mapping"),
        ("<<: [{a: 1}, 3]", "must be a mapping"),
        ("1" * 5000, "5000 digits"),
        ('"\\0"', "character"),
        ('"\\ud800"', "character"),
    ],
)
def test_what_is_no_plain_document_is_refused_in_one_line(text: str, words: str) -> None:
    """It would be a traceback, or a value that nobody meant."""
    began = time.monotonic()
    assert words in refusal(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        "[1",
        "a: b: c",
        "\tx: 1",
        "a: @x",
        '"\\UFFFFFFFF"',
        '"\\U00110000"',
        "\udcff",
        "\0",
        "%YAML 9.9\n---\na",
        "&a &b x",
        "'x",
    ],
)
def test_other_grammar_is_told_apart(text: str) -> None:
    """`--set` takes such words as text; for a file they are the mistake. The library's own errors are of four types."""
    with pytest.raises(NotYaml, match="here is not YAML"):
        parse(text, "here")
    refusal(text)


def test_aliases_and_merges_have_their_meaning_within_bounds() -> None:
    """A suite that shares settings by an anchor would be refused; or a kilobyte of aliases would become gigabytes."""
    text = "a: &a {lr: 1, epochs: 2}\nb: {<<: *a, lr: 3}\nc: {<<: [{lr: 4}, *a]}\nd: *a\ne: {'<<': 1}"
    assert parse(text, "here") == {
        "a": {"lr": 1, "epochs": 2},
        "b": {"lr": 3, "epochs": 2},
        "c": {"lr": 4, "epochs": 2},
        "d": {"lr": 1, "epochs": 2},
        "e": {"<<": 1},
    }
    laughs = "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
    assert "line 5" in refusal("a: &a [" + "x, " * 20 + "x]\n" + laughs)
    quick = "x: &x {a: 1}\ny: {<<: [" + ", ".join(["*x"] * 50_000) + "]}"
    assert "aliases repeat" in refusal(quick + "\nz: {<<: [" + ", ".join(["*x"] * 50_000) + "]}")


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A suite that is a pipe would wait for ever, and one that is /dev/zero fill the memory."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, words in (
        ("pipe", "pipe or a device"),
        ("link", "pipe or a device"),
        ("folder", "is a directory"),
        ("large", "262 kB"),
        ("binary", "is not text"),
        ("loop", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path / f"{name}.yaml", "suite")
        assert "suite" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.yaml", "suite")
    (tmp_path / "good.yaml").write_text("\ufeffa: é\r\nb: 1\r\n")
    assert load(tmp_path / "good.yaml", "suite") == {"a": "é", "b": 1}


@pytest.mark.parametrize(
    "text", ["[" + "1," * 120_000 + "]", "a: 1\n" + "#" * 250_000, "- x\n" * 60_000, '"' + "a\\n" * 80_000 + '"']
)
def test_the_largest_file_is_read_in_seconds(text: str) -> None:
    """A request of the size that is allowed would look like one that hangs."""
    began = time.monotonic()
    parse(text, "here")
    assert time.monotonic() - began < 10
