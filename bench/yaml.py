"""YAML for suites, plans and ``--set``, read as it looks: no value twice, none otherwise than a person reads it.

Plain values are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2, 10.3.2): ``010`` is ten, and ``yes``, ``1:30``
and ``2020-01-01`` are text. Keys are text as written. Tags, ``0x10`` and ``1_000`` are refused: people and readers differ
about them. Aliases and ``<<`` may be used, within the limits below.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

LARGEST = 256 * 1024  # bytes of a file; to read so many takes seconds
_DEPTH = 20  # of lists and mappings in each other; a suite has five
_VALUES = 200_000  # of one document, what aliases repeat counted again
_DIGITS = 100  # of one number

_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{f"{sign}.{word}": float(sign + "inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNCLEAR = re.compile(
    r"[-+]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9]+_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?)"
)


class NotYaml(UserError):
    """The text does not follow YAML's grammar."""


def load(path: Path, what: str) -> Any:
    """The one document of a file; see `parse`.

    Args:
        path: The file.
        what: What it should be, e.g. ``suite``.

    Raises:
        FileNotFoundError: It is not there; the caller knows what else may be meant.
        UserError: It is no file, cannot be read, is too large, or `parse` refuses it.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path} is a directory; a {what} is a .yaml file")
        if not stat.S_ISREG(status.st_mode):  # a pipe waits for ever, /dev/zero never ends
            raise UserError(f"{path} is a pipe or a device; a {what} is a .yaml file")
        if status.st_size > LARGEST:
            size = status.st_size
            shown = f"{size / 1e6:.0f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
            raise UserError(f"{path} has {shown}; a {what} is a few lines of YAML (at most {LARGEST // 1024} kB)")
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)  # a file of /proc says that it has 0 bytes
        if len(raw) > LARGEST:
            raise UserError(f"{path} has more than {LARGEST // 1024} kB; a {what} is a few lines of YAML")
        text = raw.decode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a .yaml file as the {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; a {what} is a YAML file") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """The value of a text of one document: texts, numbers, truth values and None, in lists and in mappings of text.

    Args:
        text: YAML.
        where: What the user would call the place, for errors.

    Raises:
        NotYaml: The text does not follow the grammar.
        UserError: A key stands twice, there is a tag or a number that can be read in two ways, or it is too much.
    """
    try:
        return _Reader(text, where).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}: " if mark else ""
        raise NotYaml(f"{where} is not YAML: {at}{' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" is an error of chr
        raise NotYaml(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None


class _Reader:
    """Builds the values from the parser's events, which come one by one: what is too much is not read to its end."""

    def __init__(self, text: str, where: str) -> None:
        self.events: Any = yaml.parse(text, Loader=yaml.SafeLoader)
        self.where, self.values = where, 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # name -> value, and of how many values it is made

    def document(self) -> Any:
        next(self.events)  # the stream begins
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._value(next(self.events), 0)
        next(self.events)  # the document ends
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._refusal(event, "a second document begins; leave one")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._refusal(
                event, f"tag {tag!r}: write the value without a tag, and text that looks otherwise in quotes"
            )
        if depth > _DEPTH:
            raise self._refusal(event, f"more than {_DEPTH} lists or mappings in each other")
        before = self.values
        self._count(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(depth)
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            if event.anchor in self.anchors:
                raise self._refusal(event, f"anchor {event.anchor!r} stands twice; rename one")
            self.anchors[event.anchor] = value, self.values - before
        return value

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise self._refusal(event, f"alias {event.anchor!r} names nothing that is complete before it")
        value, size = self.anchors[event.anchor]
        self._count(event, size)
        return value

    def _list(self, depth: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] | None = None
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self._refusal(event, "a key is a name; this one is a list, a mapping, an alias or has a tag")
            key = self._text(event)
            merges = key == "<<" and event.style is None
            if event.anchor is not None or (merged is not None if merges else key in values):
                how = "has an anchor; anchors name values" if event.anchor is not None else "stands twice; keep one"
                raise self._refusal(event, f"key {key!r} {how}")
            value = self._value(next(self.events), depth + 1)
            if merges:
                merged = self._merged(event, value)
            else:
                values[key] = value
        return (merged or {}) | values

    def _merged(self, event: Any, value: Any) -> dict[str, Any]:
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise self._refusal(event, "what `<<` takes in must be a mapping, or a list of mappings")
        self._count(event, sum(map(len, mappings)))
        return {k: v for mapping in reversed(mappings) for k, v in mapping.items()}  # the first one counts

    def _scalar(self, event: Any) -> Any:
        text = self._text(event)
        if event.style is not None:  # in quotes, or a block of lines
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _UNCLEAR.fullmatch(text):
            raise self._refusal(event, f"{text[:40]} is read in different ways; write plain digits, or text in quotes")
        if _FLOAT.fullmatch(text):
            if len(text) > _DIGITS:
                raise self._refusal(event, f"a number of {len(text)} digits")
            return int(text) if _INT.fullmatch(text) else float(text)
        return text

    def _text(self, event: Any) -> str:
        if "\0" in event.value or any("\ud800" <= c <= "\udfff" for c in event.value):
            raise self._refusal(event, "text with a character that no file or name can have")
        return event.value

    def _count(self, event: Any, more: int) -> None:
        self.values += more
        if self.values > _VALUES:
            raise self._refusal(event, f"more than {_VALUES:,} values, those that aliases repeat counted each time")

    def _refusal(self, event: Any, problem: str) -> UserError:
        return UserError(f"{self.where}, line {event.start_mark.line + 1}: {problem}")
