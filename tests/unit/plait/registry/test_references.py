"""The grammar of references: what each form says, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.registry.records import Feature
from plait.registry.references import Reference, parse, width_of

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
references = st.one_of(
    st.builds(Reference, st.just("stored"), names, st.none() | st.integers(1, 2**31 - 1), names),
    st.builds(Reference, st.sampled_from(["request", "transform"]), st.just(""), st.none(), names),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("stats:price", Reference("stored", "stats", None, "price")),
        ("stats@2:price", Reference("stored", "stats", 2, "price")),
        ("stats@2147483647:price", Reference("stored", "stats", 2**31 - 1, "price")),
        ("$request:hour", Reference("request", "", None, "hour")),
        ("$transform:heat", Reference("transform", "", None, "heat")),
    ],
)
def test_each_form_is_read(text: str, found: Reference) -> None:
    assert parse(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "price",
        ":price",
        "stats:",
        "stats:price:more",
        "stats :price",
        "stats:price\n",
        "stats@:price",
        "stats@0:price",
        "stats@02:price",
        "stats@-1:price",
        "stats@x:price",
        "stats@1@2:price",
        "stats@2147483648:price",
        "@2:price",
        "$request:",
        "$request@1:hour",
        "$requests:hour",
        "$other:hour",
        "$:hour",
    ],
)
def test_what_is_no_reference_is_told(text: str) -> None:
    assert parse(text) is None


@given(references)
def test_what_is_written_reads_back(reference: Reference) -> None:
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("feature", "columns"),
    [
        (Feature(name="a"), 1),
        (Feature(name="a", dtype="int8", width=384), 384),
        (Feature(name="a", dtype="int16", max_length=8), 8),
        (Feature(name="a", dtype="string", vocabulary=("red", "green")), 1),
    ],
)
def test_a_feature_takes_as_many_columns_as_it_has_values(feature: Feature, columns: int) -> None:
    assert width_of(feature) == columns
