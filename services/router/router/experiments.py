"""Which variant a subject gets: sticky, in proportion to the weights, and moving as few subjects as possible when weights change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from plait.registry.entity_ids import Id, IdPart

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
    tail = _composite(subject) if isinstance(subject, tuple) else _part(subject)
    return min(variants, key=lambda variant: (_draw(route, variant.name, tail) / variant.weight, variant.name))


def _part(part: IdPart) -> bytes:
    return b"s" + part.encode("utf-8", "surrogatepass") if isinstance(part, str) else b"i" + str(part).encode()


def _composite(parts: tuple[IdPart, ...]) -> bytes:
    """Return each part with its length before it, so that ("a|b", "c") and ("a", "b|c") differ."""
    return b"c" + b"".join(len(data).to_bytes(4, "little") + data for data in map(_part, parts))


def _draw(route: str, variant: str, subject: bytes) -> float:
    """Return a standard exponential variate; the parts cannot run into each other because names hold no NUL."""
    raw = hashlib.blake2b(b"\0".join((route.encode(), variant.encode(), subject)), digest_size=8).digest()
    return -math.log((int.from_bytes(raw, "little") + 0.5) / _SPAN)
