from __future__ import annotations

import pytest

from plait.errors import InvalidArgument
from plait.registry.problems import Problem, path, refusal


@pytest.mark.parametrize(
    ("steps", "text"),
    [((), ""), (("spec",), "spec"), (("features", 3, "dtype"), "features[3].dtype"), (("a", 0, 1), "a[0][1]")],
)
def test_paths_are_written_as_people_do(steps: tuple[str | int, ...], text: str) -> None:
    assert path(steps) == text


def test_a_refusal_carries_every_problem() -> None:
    problems = [Problem(where="a.yaml:3", field="spec.x", message="is required"), Problem(where="b.yaml:1", message="is empty")]
    error = refusal(InvalidArgument, problems, "the manifests", reason="MANIFEST_INVALID")
    assert str(error) == "the manifests: 2 problems found\n  a.yaml:3 spec.x: is required\n  b.yaml:1: is empty"
    assert str(problems[0]) == "a.yaml:3 spec.x: is required"
    assert error.reason == "MANIFEST_INVALID"
    assert "one problem found" in str(refusal(InvalidArgument, problems[:1], "it", reason="X"))
