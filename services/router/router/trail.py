"""What Explain wants to know, gathered along the road by whoever knows it; nobody gathers for a request that did not ask."""

from __future__ import annotations

from dataclasses import dataclass, field

from plait.api.router.v1 import explanation_pb2


@dataclass(slots=True)
class Trail:
    """Reports in the order things happened; `not_in` says why a unit is not in an experiment."""

    rules: list[explanation_pb2.RuleReport] = field(default_factory=list)
    tiers: list[explanation_pb2.TierReport] = field(default_factory=list)
    not_in: dict[str, str] = field(default_factory=dict)
