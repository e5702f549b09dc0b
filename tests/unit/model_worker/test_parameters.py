"""Parameters: known ones are read by type, wrong ones named, unknown ones ignored."""

from __future__ import annotations

from typing import Any

import pytest

from model_worker import parameters
from plait.api.inference.v2 import inference_pb2 as pb


def request(**values: tuple[str, Any]) -> Any:
    message = pb.ModelInferRequest()
    for name, (kind, value) in values.items():
        setattr(message.parameters[name], kind, value)
    return message.parameters


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, None)),
        ({"priority": ("uint64_param", 2)}, (2, None)),
        ({"priority": ("int64_param", 1), "timeout": ("int64_param", 1500)}, (1, 0.0015)),
        ({"timeout": ("uint64_param", 2**64 - 1)}, (0, (2**64 - 1) / 1e6)),
        ({"timeout": ("int64_param", 0)}, (0, None)),
        ({"sequence_id": ("int64_param", 3), "sequence_start": ("bool_param", True), "sequence_end": ("bool_param", True)}, (0, None)),
        ({"sequence_id": ("string_param", "s")}, (0, None)),
        ({"anything": ("double_param", 0.5), "triton_enable_empty_final_response": ("bool_param", True)}, (0, None)),
    ],
)
def test_what_is_right_is_read(given: Any, expected: Any) -> None:
    assert parameters.schedule(request(**given)) == (*expected, [])


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("priority", "string_param", "high"),
        ("priority", "bool_param", True),
        ("priority", "int64_param", -1),
        ("timeout", "double_param", 0.5),
        ("timeout", "int64_param", -1),
        ("sequence_id", "bool_param", True),
        ("sequence_start", "int64_param", 1),
        ("sequence_end", "string_param", "true"),
        ("triton_enable_empty_final_response", "string_param", "true"),
    ],
)
def test_what_is_wrong_is_named(name: str, kind: str, value: Any) -> None:
    priority, timeout_s, [problem] = parameters.schedule(request(**{name: (kind, value)}))
    assert (priority, timeout_s, problem.field) == (0, None, f"parameters[{name}]")


def test_a_parameter_without_a_value_is_wrong() -> None:
    given = request()
    given["priority"].SetInParent()
    assert [p.description for p in parameters.schedule(given)[2]] == ["expected int64_param or uint64_param, found nothing"]


def test_asking_for_parameters_adds_none() -> None:
    given = request()
    parameters.schedule(given)
    parameters.classes(given, "outputs[0]")
    assert len(given) == 0


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [("int64_param", 3, 3), ("uint64_param", 1, 1), ("int64_param", 0, 0), ("int64_param", -2, 0), ("string_param", "3", 0)],
)
def test_classes_are_a_number_of_one_or_more(kind: str, value: Any, expected: int) -> None:
    count, problems = parameters.classes(request(classification=(kind, value)), "outputs[1]")
    assert count == expected
    assert [p.field for p in problems] == ([] if expected else ["outputs[1].parameters[classification]"])


def test_shared_memory_is_not_offered() -> None:
    [problem] = parameters.shared_memory(request(shared_memory_region=("string_param", "r")), "inputs[0]")
    assert problem.field == "inputs[0].parameters[shared_memory_region]"
