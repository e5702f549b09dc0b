"""Which variant a unit gets: by experiment, in layers that exclude each other, or by the weights of a route; sticky, in proportion, and
moving as few units as possible when weights change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from plait.registry.entity_ids import Id, IdPart
from plait.registry.records import Experiment
from plait.registry.route_rules import BUCKETS
from router.rules import Test, compile_condition

_SPAN: Final = 2.0**64


class Weighted(Protocol):
    """A variant as assignment sees it; the weight is positive."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...


W = TypeVar("W", bound=Weighted)


def assign(route: str, subject: Id, variants: Sequence[W]) -> W:
    """Return the subject's variant.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights after Schindelhauer and Schomaker, "Weighted distributed hash
    tables", SPAA 2005): each variant draws an exponential variate of its weight from hash(route, variant, subject), the smallest wins.
    So a share is weight over the sum of weights, the order of variants does not matter, and when one weight grows subjects only move
    to that variant, when it shrinks only away from it. "1", 1 and the composite ("1",) are different subjects.
    """
    if len(variants) == 1:
        return variants[0]
    tail = typed(subject)
    return min(variants, key=lambda variant: (_draw(route, variant.name, tail) / variant.weight, variant.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A variant of a route, and its relative weight in an experiment."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingExperiment:
    """A running experiment as requests meet it: who is looked at (`unit`), which buckets are its own, and how it deals (`key`)."""

    name: str
    layer: str
    unit: str
    key: str
    buckets: range
    tests: tuple[Test, ...]
    shares: tuple[Share, ...]

    def variant_of(self, unit: Id) -> str:
        """Return the variant that a unit of this experiment gets."""
        return assign(self.key, unit, self.shares).name


def compile_experiments(experiments: Sequence[Experiment]) -> tuple[ServingExperiment, ...]:
    """Return those of a route's that run, in the order they are asked: by layer, then by their first bucket."""
    running = [e for e in experiments if e.status == "running" and e.arms]
    return tuple(
        ServingExperiment(
            name=experiment.name,
            layer=experiment.layer,
            unit=experiment.unit,
            key=experiment.salt or experiment.name,
            buckets=range(experiment.buckets.first, experiment.buckets.first + experiment.buckets.count),
            tests=compile_condition(experiment.when),
            shares=tuple(Share(name=arm.variant, weight=arm.weight) for arm in experiment.arms),
        )
        for experiment in sorted(running, key=lambda e: (e.layer, e.buckets.first, e.name))
    )


def bucket_of(layer: str, unit: Id) -> int:
    """Return where a unit falls in a layer, 0 to 9 999.

    Layers and their ranges are those of Tang et al., "Overlapping Experiment Infrastructure" (KDD 2010): experiments that own disjoint
    ranges of one layer never share a unit, and different layers deal independently of each other.
    """
    raw = hashlib.blake2b(b"\0".join((b"layer", layer.encode(), typed(unit))), digest_size=8).digest()
    return int.from_bytes(raw, "little") % BUCKETS


def typed(unit: Id) -> bytes:
    """Return a unit as bytes that tell its type, too."""
    return _composite(unit) if isinstance(unit, tuple) else _part(unit)


def _part(part: IdPart) -> bytes:
    return b"s" + part.encode("utf-8", "surrogatepass") if isinstance(part, str) else b"i" + str(part).encode()


def _composite(parts: tuple[IdPart, ...]) -> bytes:
    """Return each part with its length before it, so that ("a|b", "c") and ("a", "b|c") differ."""
    return b"c" + b"".join(len(data).to_bytes(4, "little") + data for data in map(_part, parts))


def _draw(route: str, variant: str, subject: bytes) -> float:
    """Return a standard exponential variate; the parts cannot run into each other because names hold no NUL."""
    raw = hashlib.blake2b(b"\0".join((route.encode(), variant.encode(), subject)), digest_size=8).digest()
    return -math.log((int.from_bytes(raw, "little") + 0.5) / _SPAN)
