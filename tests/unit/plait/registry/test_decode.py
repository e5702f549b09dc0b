from __future__ import annotations

import pytest

from plait.registry.decode import Report, header, line_of, validated
from plait.registry.records import Tenant
from plait.registry.specs import Validator
from plait.registry.yaml_tree import Node, documents


def root(text: str) -> Node:
    (document,) = documents(text)
    return document.root


@pytest.mark.parametrize(("steps", "line"), [((), 1), (("a",), 1), (("a", "b"), 2), (("a", "b", 1), 4), (("a", "zzz"), 1), (("zzz",), 1)])
def test_the_line_is_that_of_the_deepest_place_that_exists(steps: tuple[str | int, ...], line: int) -> None:
    assert line_of(root("a:\n  b:\n    - 1\n    - 2\n"), steps) == line


def test_a_good_header_gives_its_kind() -> None:
    report = Report("f")
    assert header(root("apiVersion: plait.dev/v1\nkind: A\n"), report, kinds=("A", "B"), fields=("apiVersion", "kind")) == "A"
    assert report.problems == []


def test_validation_reports_in_the_order_of_lines() -> None:
    report = Report("f")
    node = root("x: 1\ny: 2\ndescription: 3\n")
    assert validated(Validator(Tenant, forbid_unknown=True), {"name": "t", **node.plain()}, node, report, prefix=("spec",)) is None
    assert [(p.where, p.field) for p in report.problems] == [("f:1", "spec.x"), ("f:2", "spec.y"), ("f:3", "spec.description")]
