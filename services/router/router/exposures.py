"""Who was shown what: an answer by a variant that an experiment, or the weights, assigned is an exposure, once it was really that variant.

What is written names nobody: the unit is a hash under a key of the operator's, equal for equal units as long as the key is.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from plait.api.events.v1 import outcomes_pb2
from plait.api.router.v1 import explanation_pb2
from plait.telemetry.metrics import Metrics
from router.experiments import typed
from router.journal import Journal
from router.question import TIER_FULL, Question

_KNOWN: Final = 100_000  # exposures of the last hour that are not written again
_HOUR_S: Final = 3600.0


class Exposures:
    """Counts and writes exposures. An Explain is none, nor is an answer of a lower tier: it says nothing of the variant.

    Each (experiment or route, unit, variant) is written once an hour. `key`: what units are hashed with; with an empty one, a key that is
    forgotten with this process.
    """

    def __init__(
        self, metrics: Metrics, journal: Journal | None = None, *, key: bytes = b"", clock: Callable[[], float] = time.time
    ) -> None:
        self._counted = metrics.counter(
            "plait_router_exposures", "answers by a variant that an experiment assigned", ("experiment", "variant")
        )
        self._journal = journal
        self._key = hashlib.blake2b(key or secrets.token_bytes(32)).digest()
        self._clock = clock
        self._written: OrderedDict[tuple[str, str, bytes], float] = OrderedDict()

    def note(self, question: Question) -> None:
        """Take down the exposures of an answered question."""
        if question.tier != TIER_FULL or question.trail is not None:
            return
        for given in question.assignments:
            if given.experiment:
                self._counted.labels(given.experiment, given.variant).inc()
            if self._journal is not None:
                self._write(self._journal, question, given)

    def _write(self, journal: Journal, question: Question, given: explanation_pb2.Assignment) -> None:
        now_s = self._clock()
        unit_hash = self._hash(question.tenant, typed(question.request_id if question.unit is None else question.unit))
        known = (given.experiment or f"route {question.route.name}", given.variant, unit_hash)
        if now_s - self._written.get(known, -_HOUR_S) < _HOUR_S:
            return
        exposure = outcomes_pb2.Exposure(
            request_id=question.request_id,
            tenant=question.tenant,
            route=question.route.name,
            experiment=given.experiment,
            layer=given.layer,
            variant=given.variant,
            model=question.arm.model,
            model_version=question.arm.version,
            unit_hash=unit_hash,
            registry_revision=question.revision,
            tier=question.tier,
        )
        exposure.exposed_at.FromNanoseconds(int(now_s * 1e9))
        if journal.put(exposure):
            self._written[known] = now_s
            self._written.move_to_end(known)
            if len(self._written) > _KNOWN:
                self._written.popitem(last=False)

    def _hash(self, tenant: str, unit: bytes) -> bytes:
        """BLAKE2b-16, keyed (RFC 7693)."""
        digest = hashlib.blake2b(key=self._key, digest_size=16, person=b"plait-exposure")
        for part in (tenant.encode(), unit):
            digest.update(len(part).to_bytes(4, "big"))
            digest.update(part)
        return digest.digest()
