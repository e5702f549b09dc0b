"""Conditions of rules and experiments, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plait.api.types.v1 import types_pb2
from plait.registry.policies import Condition, Range
from router.rules import Facts, compile_condition, first_failing


def number(name: str, value: Any, dtype: str = "<f4", kind: Any = types_pb2.DATA_TYPE_FLOAT32) -> types_pb2.Tensor:
    return types_pb2.Tensor(name=name, dtype=kind, data=np.array(value, dtype).tobytes())


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "tenant": "shop",
        "metadata": (("x-staff", "0"), ("x-staff", "1"), ("x-raw-bin", b"1")),
        "labels": {"country": "de"},
        "candidates": 100,
        "top_k": 10,
        "request_features": [number("hour", 18.5)],
        "subject": "u1",
        "request_id": "r1",
    }
    return Facts(**{**fields, **changes})


@pytest.mark.parametrize(
    ("condition", "failed"),
    [
        (Condition(), ""),
        (Condition(tenants=("other", "shop")), ""),
        (Condition(tenants=("other",)), "tenants"),
        (Condition(headers={"x-staff": ("1",)}), ""),  # any of a header's values
        (Condition(headers={"x-staff": ("2",)}), "headers.x-staff"),
        (Condition(headers={"x-none": ("1",)}), "headers.x-none"),
        (Condition(headers={"x-raw-bin": ("1",)}), "headers.x-raw-bin"),
        (Condition(labels={"country": ("at", "de")}), ""),
        (Condition(labels={"country": ("at",)}), "labels.country"),
        (Condition(labels={"surface": ("app",)}), "labels.surface"),
        (Condition(fields={"candidates": Range(at_least=100, at_most=100)}), ""),
        (Condition(fields={"candidates": Range(at_most=99)}), "fields.candidates"),
        (Condition(fields={"top_k": Range(at_least=11)}), "fields.top_k"),
        (Condition(request_features={"hour": Range(at_least=18)}), ""),
        (Condition(request_features={"hour": Range(at_most=18)}), "request_features.hour"),
        (Condition(request_features={"day": Range(at_least=0)}), "request_features.day"),
        (Condition(labels={"country": ("de",)}, fields={"top_k": Range(at_most=1)}, tenants=("shop",)), "fields.top_k"),
    ],
)
def test_a_condition_names_the_first_part_that_does_not_hold(condition: Condition, failed: str) -> None:
    assert first_failing(compile_condition(condition), facts()) == failed


@pytest.mark.parametrize(
    ("sent", "value"),
    [
        (number("hour", 3, "<i8", types_pb2.DATA_TYPE_INT64), 3.0),
        (number("hour", True, "?", types_pb2.DATA_TYPE_BOOL), 1.0),
        (number("hour", [1, 2]), None),  # one per candidate
        (number("day", 3), None),
        (types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_BYTES, data=b"\1\0\0\0x"), None),
        (types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_FLOAT32, data=b"\1"), None),
        (types_pb2.Tensor(name="hour", dtype=999, data=b"\1"), None),  # type: ignore[arg-type]
    ],
)
def test_a_number_is_one_number_of_whatever_type(sent: types_pb2.Tensor, value: float | None) -> None:
    assert facts(request_features=[sent]).number("hour") == value


def test_nan_is_within_no_range() -> None:
    asked = facts(request_features=[number("hour", np.nan)])
    assert first_failing(compile_condition(Condition(request_features={"hour": Range(at_most=1e9)})), asked)


@pytest.mark.parametrize(
    ("of", "unit"),
    [
        ("subject", "u1"),
        ("tenant", "shop"),
        ("request", "r1"),
        ("label:country", "de"),
        ("label:surface", "r1"),
        ("header:x-staff", "0"),
        ("header:x-none", "r1"),
    ],
)
def test_who_is_assigned(of: str, unit: str) -> None:
    assert facts().unit(of) == unit


def test_a_request_about_nobody_in_particular_stands_for_itself() -> None:
    assert facts(subject=None).unit("subject") == "r1"
    assert facts(subject=0).unit("subject") == 0
