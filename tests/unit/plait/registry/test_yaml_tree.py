from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.registry.yaml_tree import MAX_DEPTH, YamlProblem, documents, dump


def plain(text: str) -> list[Any]:
    return [document.root.plain() for document in documents(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0xZZ", "0xZZ"),
        ("1_000", "1_000"),
        ('"1"', "1"),
        ("'true'", "true"),
        ("!!str 1", "1"),
        ("tr\u00fce", "tr\u00fce"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    (found,) = plain(f"a: {text}")
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(plain("[.nan]")[0][0])


texts = st.from_regex(r"[-+0-9.eExo~]{1,6}|null|true|no|<<|=", fullmatch=True) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0")
)
printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]))
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | floats | printable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz_", min_size=1), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc", min_size=1), json_values, min_size=1))
def test_json_reads_as_itself(value: dict[str, Any]) -> None:
    assert plain(json.dumps(value, ensure_ascii=False)) == [value]


@given(st.dictionaries(st.text("abc", min_size=1), json_values, min_size=1))
def test_what_is_dumped_reads_as_itself(value: dict[str, Any]) -> None:
    assert plain(dump(value)) == [value]


@given(st.dictionaries(texts, texts, min_size=1))
def test_text_stays_text_whatever_it_looks_like(value: dict[str, str]) -> None:
    assert plain(dump(value)) == [value]


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    line = 1
    with contextlib.suppress(YamlProblem):
        try:
            plain(text)
        except YamlProblem as problem:
            line = problem.line
            raise
    assert 1 <= line <= len(text.splitlines()) + 1


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: c: d", 2, "not YAML"),
        ("a: 1\nb: {x: 1,\n  x: 2}", 3, "'x' is given twice; the first is on line 2"),
        ("a: *nobody", 1, "*nobody refers to an anchor that was not defined before"),
        ("a: &a {x: 1}\nb:\n  <<: *a", 3, "merge keys (<<) are not supported"),
        ("a: !!python/object:os.system x", 1, "is not supported; write plain values"),
        ("? [a]\n: 1", 1, "plain text"),
        ("a: 1\nb: \x01", 2, "a character that YAML does not allow"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 1, "nested more than"),
        ("[" * 100_000, 1, "nested more than"),
        ("a: " + "9" * 5000, 1, "digits"),
    ],
)
def test_what_is_refused_names_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlProblem) as caught:
        plain(text)
    assert (caught.value.line, message in caught.value.message) == (line, True), caught.value.message


def test_aliases_are_values_but_cannot_multiply_without_end() -> None:
    assert plain("a: &x [1, 2]\nb: *x") == [{"a": [1, 2], "b": [1, 2]}]
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(YamlProblem, match="values in one document"):
        plain(bomb)


def test_a_stream_has_many_documents_and_empty_ones_are_passed_over() -> None:
    found = list(documents("---\n---\n# nothing\n---\na: 1\n---\nb: \u00fc\n...\n"))
    assert [(d.root.plain(), d.line) for d in found] == [({"a": 1}, 5), ({"b": "\u00fc"}, 7)]
    assert found[1].size_bytes >= len("b: \u00fc".encode())


def test_an_entry_stands_on_the_line_of_its_key() -> None:
    (document,) = documents("a:\n  b:\n    - x: 1\n      y: 2\n")
    node = document.root.child("a")
    assert node is not None
    assert node.line == 1
    b = node.child("b")
    assert b is not None
    first = b.child(0)
    assert first is not None
    y = first.child("y")
    assert y is not None
    assert (b.line, first.line, y.line) == (2, 3, 4)
    assert b.child(1) is None
    assert y.child("z") is None
