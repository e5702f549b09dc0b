"""YAML documents with a header into dataclasses, with every problem at its line: shared by manifests and `model.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from plait.registry.explain import explain, shown, suggestion
from plait.registry.problems import Problem, path
from plait.registry.specs import Validator
from plait.registry.yaml_tree import Node

API_VERSION: Final = "plait.dev/v1"

Steps = tuple[str | int, ...]


@dataclass(slots=True)
class Report:
    """Collects the problems of one source; knows how to find the line of a field."""

    source: str
    problems: list[Problem] = field(default_factory=list)

    def at(self, line: int, message: str, name: str = "") -> None:
        self.problems.append(Problem(where=f"{self.source}:{line}", field=name, message=message))

    def below(self, root: Node, steps: Steps, message: str, prefix: Steps = ()) -> None:
        """Report at the deepest node of `steps` that exists below `root`; `prefix` leads the field's path in the text only."""
        self.at(line_of(root, steps), message, path((*prefix, *steps)))


def line_of(root: Node, steps: Steps) -> int:
    """Return the line of the deepest existing node on the way."""
    node = root
    for step in steps:
        deeper = node.child(step)
        if deeper is None:
            break
        node = deeper
    return node.line


def header(root: Node, report: Report, *, kinds: Sequence[str], fields: Sequence[str]) -> str | None:
    """Check that the document is a mapping of `fields` with our apiVersion and a known kind; return the kind, or None."""
    if not isinstance(root.value, dict):
        report.at(root.line, f"expected a mapping with {', '.join(fields)}; found {shown(root.plain())}")
        return None
    for name, node in root.value.items():
        if name not in fields:
            report.at(node.line, f"is not a field of this{suggestion(name, fields) or '; the fields here are ' + ', '.join(fields)}", name)
    _constant(root.value, report, root.line)
    return _kind(root.value, report, root.line, kinds)


def _constant(fields: Mapping[str, Node], report: Report, line: int) -> None:
    node = fields.get("apiVersion")
    if node is None:
        report.at(line, f"is required; write apiVersion: {API_VERSION}", "apiVersion")
    elif node.value != API_VERSION:
        report.at(node.line, f"expected {API_VERSION}, found {shown(node.plain())}", "apiVersion")


def _kind(fields: Mapping[str, Node], report: Report, line: int, kinds: Sequence[str]) -> str | None:
    node = fields.get("kind")
    listed = f"one of {', '.join(kinds)}" if len(kinds) > 1 else kinds[0]
    if node is None:
        report.at(line, f"is required; write {listed}", "kind")
        return None
    if not isinstance(node.value, str) or node.value not in kinds:
        close = suggestion(node.value, kinds) if isinstance(node.value, str) else ""
        report.at(node.line, f"expected {listed}, found {shown(node.plain())}{close}", "kind")
        return None
    return node.value


def validated(validator: Validator, data: Mapping[str, Any], root: Node, report: Report, *, prefix: Steps = ()) -> Any | None:
    """Return the dataclass, or report every wrong field (its line found below `root`) and return None."""
    try:
        return validator(data)
    except ValidationError as error:
        found = explain(error, dict(data), validator.cls)
        for steps, message in sorted(found, key=lambda each: line_of(root, each[0])):
            report.below(root, steps, message, prefix)
        return None
