"""What a route's rules and experiments may ask of a request, compiled once per snapshot into tests that cost one look-up each.

Pure. Facts are the caller's own words: they are compared here and never logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NUMBER
from plait.registry.entity_ids import Id
from plait.registry.policies import Condition, Range

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(slots=True, kw_only=True)  # (one per request of a route that looks at them; frozen would triple the cost)
class Facts:
    """What is known of a request before its variant is. `subject` is None where a Predict is not about exactly one."""

    tenant: str
    metadata: Metadata
    labels: Mapping[str, str]
    candidates: int
    top_k: int
    request_features: Sequence[types_pb2.Tensor]
    subject: Id | None
    request_id: str

    def unit(self, of: str) -> Id:
        """Return who is assigned, `of` as in a route's `sticky`. Where the request does not say, it stands for itself: nothing sticks."""
        kind, _, name = of.partition(":")
        found: Id | None
        match kind:
            case "subject":
                found = self.subject
            case "tenant":
                found = self.tenant
            case "label":
                found = self.labels.get(name)
            case "header":
                found = next(iter(self.header(name)), None)
            case _:
                found = None
        return self.request_id if found is None else found

    def header(self, name: str) -> list[str]:
        """Return the values of a header, which may come several times."""
        return [value for key, value in self.metadata if key == name and isinstance(value, str)]

    def number(self, name: str) -> float | None:
        """Return a request feature sent once for the whole request, None where it is not there or no single number."""
        sent = next((tensor for tensor in self.request_features if tensor.name == name), None)
        known = None if sent is None else BY_NUMBER.get(sent.dtype)
        if sent is None or known is None or not known.size_bytes or known.name == "bfloat16" or len(sent.data) != known.size_bytes:
            return None
        return float(np.frombuffer(sent.data, known.numpy)[0])


@dataclass(frozen=True, slots=True)
class Test:
    """One part of a condition: its path in the manifest, and whether it holds."""

    name: str
    holds: Callable[[Facts], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRule:
    """A rule whose `variant` is meant when all tests hold."""

    name: str
    variant: str
    tests: tuple[Test, ...]


def compile_condition(condition: Condition) -> tuple[Test, ...]:
    """Return the tests of a condition, the cheapest first."""
    tests = []
    if condition.tenants:
        tests.append(_tenant(frozenset(condition.tenants)))
    tests += [_field(name, bounds) for name, bounds in condition.fields.items()]
    tests += [_label(name, frozenset(values)) for name, values in condition.labels.items()]
    tests += [_header(name, frozenset(values)) for name, values in condition.headers.items()]
    tests += [_feature(name, bounds) for name, bounds in condition.request_features.items()]
    return tuple(tests)


def first_failing(tests: Iterable[Test], facts: Facts) -> str:
    """Return the first part of a condition that does not hold, an empty string where all do."""
    for test in tests:
        if not test.holds(facts):
            return test.name
    return ""


def _tenant(allowed: frozenset[str]) -> Test:
    return Test("tenants", lambda facts: facts.tenant in allowed)


def _field(name: str, bounds: Range) -> Test:
    if name == "candidates":
        return Test("fields.candidates", lambda facts: _within(facts.candidates, bounds))
    return Test("fields.top_k", lambda facts: _within(facts.top_k, bounds))


def _label(name: str, allowed: frozenset[str]) -> Test:
    return Test(f"labels.{name}", lambda facts: facts.labels.get(name) in allowed)


def _header(name: str, allowed: frozenset[str]) -> Test:
    return Test(f"headers.{name}", lambda facts: not allowed.isdisjoint(facts.header(name)))


def _feature(name: str, bounds: Range) -> Test:
    return Test(f"request_features.{name}", lambda facts: _within(facts.number(name), bounds))


def _within(value: float | None, bounds: Range) -> bool:
    """NaN is within nothing."""
    if value is None or math.isnan(value):
        return False
    return (bounds.at_least is None or value >= bounds.at_least) and (bounds.at_most is None or value <= bounds.at_most)
