from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from plait.registry.explain import explain, fields_at, shown, suggestion
from plait.registry.records import FeatureView, Model, Route
from plait.registry.specs import Validator


def findings(cls: type[Any], data: dict[str, Any]) -> dict[tuple[str | int, ...], str]:
    with pytest.raises(ValidationError) as caught:
        Validator(cls, forbid_unknown=True)(data)
    return dict(explain(caught.value, data, cls))


VIEW: dict[str, Any] = {"name": "v", "entity": {"type": "user"}, "features": [{"name": "a"}]}


@pytest.mark.parametrize(
    ("change", "steps", "sentence"),
    [
        ({"version": "1"}, ("version",), "expected a whole number, found '1'; take the quotes away"),
        ({"version": 1.5}, ("version",), "expected a whole number, found the number 1.5"),
        ({"version": True}, ("version",), "expected a whole number, found the truth value true"),
        ({"version": None}, ("version",), "expected a whole number, found nothing"),
        ({"max_age_s": "soon"}, ("max_age_s",), "expected a number, found 'soon'"),
        ({"description": 7}, ("description",), 'expected text, found the number 7; put it in quotes: "7"'),
        ({"description": True}, ("description",), 'expected text, found the truth value true; put it in quotes: "true"'),
        ({"features": {"a": 1}}, ("features",), "expected a list, found a mapping"),
        ({"features": ["a"]}, ("features", 0), "expected a mapping of fields, found 'a'"),
        ({"features": [{"dtype": "int8"}]}, ("features", 0, "name"), "is required"),
        (
            {"features": [{"name": "a", "default": [1]}]},
            ("features", 0, "default"),
            "expected a number or a whole number or true or false or text, found a list",
        ),
        (
            {"entity": {"type": "u", "key": "strng"}},
            ("entity", "key"),
            "expected one of string, int64 or composite, found 'strng'; did you mean 'string'?",
        ),
        ({"entity": {"type": "u", "key": 3}}, ("entity", "key"), "expected one of string, int64 or composite, found the number 3"),
        ({"entity": {"typ": "u"}}, ("entity", "typ"), "is not a field of this; did you mean 'type'?"),
        (
            {"zzz": 1},
            ("zzz",),
            (
                "is not a field of this; the fields here are entity, features, version, max_age_s, retention_s, description, "
                "readers, writers, durable, aggregation, feast"
            ),
        ),
    ],
)
def test_each_fault_becomes_one_sentence_at_its_place(change: dict[str, Any], steps: tuple[str | int, ...], sentence: str) -> None:
    assert findings(FeatureView, VIEW | change)[steps] == sentence


def test_mappings_point_at_the_entry() -> None:
    data = {"name": "m", "versions": [{"version": "1", "artifact": "x"}], "aliases": {"champion": 1}}
    assert findings(Model, data) == {("aliases", "champion"): 'expected text, found the number 1; put it in quotes: "1"'}
    assert findings(Model, data | {"aliases": [1]}) == {("aliases",): "expected a mapping of names to values, found a list"}


def test_fields_are_found_through_lists_optionals_and_mappings() -> None:
    assert fields_at(Route, ("variants", 0)) == ["name", "model", "use", "weight"]
    assert fields_at(Model, ("versions", 0, "signature", "inputs", 1)) == ["name", "dtype", "shape", "per"]
    assert "versions" in fields_at(Model, ())
    assert not {"name", "schemas", "versions"} & {*fields_at(FeatureView, ())}
    assert fields_at(Route, ("timeout_s",)) == []


def test_values_are_shown_short() -> None:
    assert shown("x" * 500) == repr("x" * 59 + "…")
    values: list[object] = [{}, [], None, False, 3]
    assert [shown(v) for v in values] == ["a mapping", "a list", "nothing", "the truth value false", "the number 3"]


def test_a_suggestion_is_made_only_where_something_is_close() -> None:
    assert suggestion("pric", ["price", "views"]) == "; did you mean 'price'?"
    assert suggestion("colour", ["price", "views"]) == ""
