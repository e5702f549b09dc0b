"""Who was shown what: an answer of an experiment's variant is an exposure, once it was really the variant that answered."""

from __future__ import annotations

from plait.telemetry.metrics import Metrics
from router.question import TIER_FULL, Question


class Exposures:
    """Counts exposures by experiment and variant. An Explain is none, nor is an answer of a lower tier: it says nothing of the variant."""

    def __init__(self, metrics: Metrics) -> None:
        self._counted = metrics.counter(
            "plait_router_exposures", "answers by a variant that an experiment assigned", ("experiment", "variant")
        )

    def note(self, question: Question) -> None:
        """Count the exposures of an answered question."""
        if question.tier != TIER_FULL or question.trail is not None:
            return
        for given in question.assignments:
            if given.experiment:
                self._counted.labels(given.experiment, given.variant).inc()
