"""What Explain wants to know, gathered along the road by whoever knows it; nobody gathers for a request that did not ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plait.api.router.v1 import explanation_pb2
from plait.errors import PlaitError

_UNKNOWN = -1


@dataclass(slots=True)
class Trail:
    """Reports in the order things happened; `not_in` says why a unit is not in an experiment, `cache` what a cache would have done."""

    rules: list[explanation_pb2.RuleReport] = field(default_factory=list)
    not_in: dict[str, str] = field(default_factory=dict)
    cache: explanation_pb2.CacheStatus.ValueType = explanation_pb2.CACHE_STATUS_UNSPECIFIED
    ages: list[explanation_pb2.AgeReport] = field(default_factory=list)
    tiers: list[explanation_pb2.TierReport] = field(default_factory=list)
    stages: list[explanation_pb2.StageReport] = field(default_factory=list)
    attempts: list[explanation_pb2.AttemptReport] = field(default_factory=list)
    endpoints: bool = False  # whether to say where calls went

    def tried(self, what: str, kind: str, endpoint: str, took_s: float, error: BaseException | None) -> None:
        """Note one attempt to call a service behind the router; one that was cancelled had lost to another."""
        outcome = "OK" if error is None else f"{error.code.name} {error.reason}" if isinstance(error, PlaitError) else "CANCELLED"
        self.attempts.append(
            explanation_pb2.AttemptReport(
                what=what, endpoint=endpoint if self.endpoints else "", kind=kind, outcome=outcome, took_us=int(took_s * 1e6)
            )
        )

    def aged(self, views: Iterable[Any], versions: Mapping[str, int]) -> None:
        """Note how old the rows of each `ViewReport` are; rows that are not there have no age."""
        for view in views:
            ages = np.frombuffer(view.ages_us, "<i8")
            known = ages[ages >= 0]
            self.ages.append(
                explanation_pb2.AgeReport(
                    feature_view=view.feature_view,
                    view_version=versions.get(view.feature_view, 0),
                    oldest_us=int(known.max()) if known.size else _UNKNOWN,
                    median_us=int(np.median(known)) if known.size else _UNKNOWN,
                )
            )
