"""pydantic's findings as plain sentences, each at the deepest place of the input that exists."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from plait.registry.records import Kind
from plait.registry.specs import filled_in

Steps = tuple[str | int, ...]

_EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of names to values",
    "dataclass_type": "a mapping of fields",
    "none_required": "nothing",
}
_LONGEST = 60


def explain(error: ValidationError, data: object, cls: type[Any]) -> list[tuple[Steps, str]]:
    """Return (where, sentence) for each wrong place of `data`, which was to become a `cls`.

    A field with several allowed types (number or text) gets one sentence, not one per type.
    """
    grouped: dict[Steps, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        steps = details["loc"][1:]  # the 0 of the validator's one-tuple
        missing = details["type"] == "missing"
        grouped.setdefault(steps if missing else _existing(steps, data), []).append(details)
    return [(steps, _sentence(found, cls, steps)) for steps, found in grouped.items()]


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" where something known is close, else ""."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Return a value as a message may show it: short, and as YAML has it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    text = str(value)
    return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _existing(steps: Steps, data: object) -> Steps:
    """Return the leading part of `steps` that the input has; what follows are pydantic's names for the types it tried."""
    for index, step in enumerate(steps):
        in_list = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if not in_list and not (isinstance(data, dict) and step in data):
            return steps[:index]
        data = cast("Any", data)[step]
    return steps


def _sentence(found: Sequence[ErrorDetails], cls: type[Any], steps: Steps) -> str:
    first = found[0]
    if first["type"] == "missing":
        return "is required"
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(str(steps[-1]), cls, steps[:-1])
    if first["type"] == "literal_error":
        return _choice(first)
    expected = " or ".join(dict.fromkeys(_expected(d) for d in found))
    return f"expected {expected}, found {shown(first['input'])}{_hint(first)}"


def _expected(details: ErrorDetails) -> str:
    return _EXPECTED.get(details["type"], details["msg"].removeprefix("Input should be ").rstrip("."))


def _hint(details: ErrorDetails) -> str:
    value = details["input"]
    if details["type"] == "string_type" and isinstance(value, int | float):
        written = str(value).lower() if isinstance(value, bool) else str(value)
        return f'; put it in quotes: "{written}"'
    if details["type"] in ("int_type", "float_type") and isinstance(value, str) and _number(value):
        return "; take the quotes away"
    return ""


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choice(details: ErrorDetails) -> str:
    expected = str(details.get("ctx", {}).get("expected", "")).replace("'", "")
    value = details["input"]
    close = suggestion(value, expected.replace(" or ", ", ").split(", ")) if isinstance(value, str) else ""
    return f"expected one of {expected}, found {shown(value)}{close}"


def _unknown(name: str, cls: type[Any], parents: Steps) -> str:
    known = fields_at(cls, parents)
    listed = f"; the fields here are {', '.join(known)}" if known else ""
    return f"is not a field of this{suggestion(name, known) or listed}"


def fields_at(cls: type[Any], steps: Steps) -> list[str]:
    """Return the fields of the dataclass found by walking `steps` through the annotations of `cls`."""
    current: Any = cls
    for step in steps:
        current = _dataclass_in(current)
        if current is None:
            return []
        if isinstance(step, str):
            current = typing.get_type_hints(current).get(step)
    found = _dataclass_in(current)
    if found is None:
        return []
    hidden = () if steps else ("name", *filled_in(cast("Kind", found.__name__)))
    return [f.name for f in dataclasses.fields(found) if f.name not in hidden]


def _dataclass_in(annotation: Any) -> type[Any] | None:
    return next(_dataclasses(annotation), None)


def _dataclasses(annotation: Any) -> Iterator[type[Any]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and dataclasses.is_dataclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _dataclasses(argument)
