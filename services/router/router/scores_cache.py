"""Scores of single candidates, kept by subject: for models whose rows do not look at each other, so that a score holds whatever it is asked beside.

A request then asks the model only for what is not known. Scores lie in arrays, a table per subject and variant; the least recently used
table goes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from plait.registry.entity_ids import Id
from plait.registry.records import Snapshot
from plait.telemetry.metrics import Metrics
from router.cache_key import Keys
from router.entries import Entries
from router.invalidation import Invalidations, Space, ids_of
from router.question import Question

_ROW_BYTES: Final = 8 + 4 + 8
_MOST_SHARE: Final = 16  # of the memory is what one table may take


@dataclass(slots=True)
class _Table:
    """Scores by hash of the id, which are in order; `position`: of the log of invalidations, up to which all are known to be untouched."""

    hashes: NDArray[np.int64]
    scores: NDArray[np.float32]
    made_s: NDArray[np.float64]
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a question's candidates: `mask` [N] says of which, `scores` [N] holds theirs; the oldest is `age_s` old."""

    mask: NDArray[np.bool_]
    scores: NDArray[np.float32]
    age_s: float

    @property
    def all(self) -> bool:
        """Whether nothing is missing."""
        return bool(self.mask.all())


class Scores:
    """Keeps scores in this process, bounded by bytes. A question with features of its own is answered by them: `usable` says of which it is not."""

    def __init__(self, max_bytes: int, invalidations: Invalidations, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._invalidations = invalidations
        self._clock = clock
        self._keys = Keys()
        self._tables: Entries[_Table] = Entries(max_bytes, max_bytes // _MOST_SHARE)
        self._looked = metrics.counter("plait_router_scores", "scores of candidates, by whether they were known", ("route", "outcome"))
        metrics.gauge("plait_router_scores_bytes", "bytes of scores kept in memory").set_function(lambda: self._tables.size_bytes)

    def __repr__(self) -> str:
        return f"<Scores {self._tables!r}>"

    @property
    def position(self) -> int:
        """Where the log of invalidations is; to be read before a score's features are."""
        return self._invalidations.position

    def adopt(self, snapshot: Snapshot) -> None:
        """Tell models and subjects apart by a new snapshot from now on."""
        self._keys.adopt(snapshot)

    @staticmethod
    def usable(question: Question) -> bool:
        """Whether the scores of a question depend on nothing but subject and candidates."""
        return not (question.inline or question.request.request_features)

    def known(self, question: Question, max_age_s: float) -> Known:
        """Return what is known of a Rank's candidates and at most so old."""
        table = self._table(question)
        wanted = _hashes(question.candidates)
        if table is None or not len(table.hashes):
            return Known(mask=np.zeros(len(wanted), np.bool_), scores=np.zeros(len(wanted), np.float32), age_s=0.0)
        places = np.minimum(np.searchsorted(table.hashes, wanted), len(table.hashes) - 1)
        ages_s = self._clock() - table.made_s[places]
        mask = (table.hashes[places] == wanted) & (ages_s <= max_age_s)
        return Known(mask=mask, scores=table.scores[places], age_s=float(ages_s[mask].max(initial=0.0)))

    def keep(
        self, question: Question, candidates: Sequence[Id], scores: NDArray[np.float32], *, begun_s: float, position: int, keep_s: float
    ) -> None:
        """Keep the scores of some candidates, whose features were read no earlier than `begun_s` and `position`; what is older than `keep_s` goes."""
        named = self._named(question)
        if self._invalidations.touched(position, named):
            return
        table = self._table(question)
        hashes = _hashes(candidates)
        told = self._told(position, question)
        fresh = ~np.isin(hashes, told) if len(told) else np.ones(len(hashes), np.bool_)
        parts = [(hashes[fresh], scores[fresh].astype(np.float32), np.full(int(fresh.sum()), begun_s))]
        if table is not None:
            young = self._clock() - table.made_s <= keep_s
            parts.append((table.hashes[young], table.scores[young], table.made_s[young]))
        self._put(question, parts) or self._put(question, parts[:1])

    def count(self, route: str, known: int, computed: int) -> None:
        """Count the candidates of an answer."""
        self._looked.labels(route, "known").inc(known)
        self._looked.labels(route, "computed").inc(computed)

    def now_s(self) -> float:
        """Return now, on the clock that ages are measured by."""
        return self._clock()

    def _put(self, question: Question, parts: Sequence[tuple[NDArray[Any], ...]]) -> bool:
        """Make a table of parts, the first of which wins; return whether it is small enough to be kept."""
        hashes, scores, made_s = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        kept, first = np.unique(hashes, return_index=True)
        table = _Table(kept, scores[first], made_s[first], self._invalidations.position)
        return self._tables.put(self._keys.of_subject(question), table, len(kept) * _ROW_BYTES)

    def _table(self, question: Question) -> _Table | None:
        """Return the table of a question's subject without what was told to be forgotten since."""
        key = self._keys.of_subject(question)
        table = self._tables.get(key)
        if table is None or table.position == self._invalidations.position:
            return table
        if self._invalidations.touched(table.position, self._named(question)):
            self._tables.drop(key)
            return None
        told = self._told(table.position, question)
        if len(told):
            gone = np.isin(table.hashes, told)
            table.hashes, table.scores, table.made_s = table.hashes[~gone], table.scores[~gone], table.made_s[~gone]
        table.position = self._invalidations.position
        return table

    def _told(self, since: int, question: Question) -> NDArray[np.int64]:
        space: Space = (question.tenant, "entity", question.route.candidate)
        return _hashes(list(self._invalidations.told(since, space)))

    @staticmethod
    def _named(question: Question) -> list[tuple[Space, Sequence[Id]]]:
        """What makes a whole table go: its route, its model, its subject, and whatever else the features are about."""
        tenant, route = question.tenant, question.route
        others = [(kind, ids) for kind, ids in question.ids.items() if kind != route.candidate]
        return [
            ((tenant, "route", ""), [route.name]),
            ((tenant, "model", ""), [question.arm.model]),
            *(((tenant, "entity", kind), ids_of(ids)) for kind, ids in others),
        ]


def _hashes(ids: Sequence[Id]) -> NDArray[np.int64]:
    """Return one number per id. Python's hash of a text is keyed and has 64 bits; that of a number has fewer, so numbers stand for themselves."""
    if not len(ids) or isinstance(ids[0], int):
        return np.array(ids, np.int64)
    texts = ids if isinstance(ids[0], str) else map(repr, ids)
    return np.fromiter(map(hash, texts), np.int64, len(ids))
