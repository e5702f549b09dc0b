"""What is wrong with a field, as the registry's checks tell it, and the small checks that all of them are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

Steps = tuple[str | int, ...]
Finding = tuple[Steps, str]

MAX_TEXT: Final = 4096
NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
NAME_HELP: Final = "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"


def name(steps: Steps, given: str) -> Iterator[Finding]:
    """Yield what keeps a text from being a name."""
    if not NAME.match(given):
        yield steps, f"{given[:80]!r} is not a name: use {NAME_HELP}"


def text(steps: Steps, given: str) -> Iterator[Finding]:
    """Yield what keeps a text from being stored."""
    if len(given) > MAX_TEXT:
        yield steps, f"is {len(given)} characters long; at most {MAX_TEXT} are allowed"
    if unstorable(given):
        yield steps, "holds a character that cannot be stored (NUL or half of a surrogate pair)"


def unstorable(given: str) -> bool:
    """Return whether Postgres' jsonb or UTF-8 has no place for it."""
    return "\0" in given or any("\ud800" <= c <= "\udfff" for c in given)


def count(steps: Steps, items: Sequence[object], most: int, what: str) -> Iterator[Finding]:
    """Yield a number of entries outside 1 to `most`."""
    if not items:
        yield steps, f"needs at least one {what}"
    if len(items) > most:
        yield steps, f"has {len(items)} entries; at most {most} are allowed"


def unique(steps: Steps, names: Iterable[str], leaf: Steps = ("name",)) -> Iterator[Finding]:
    """Yield every entry that was there before."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in seen:
            yield (*steps, index, *leaf), f"{name!r} is listed twice, first as entry {seen[name]}"
        seen.setdefault(name, index)


def in_range(steps: Steps, value: float, low: float, high: float, *, open_low: bool = False) -> Iterator[Finding]:
    """Yield a number that is not finite or not between the bounds."""
    inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
    if not inside:
        bounds = f"more than {low:g}" if open_low else f"at least {low:g}"
        most = f" and at most {high:g}" if math.isfinite(high) else ""
        yield steps, f"expected a number of {bounds}{most}, found {value:g}"
