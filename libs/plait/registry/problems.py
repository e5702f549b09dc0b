"""One problem found in what somebody gave us, and the error that carries all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import PlaitError, Violation


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What was expected (`message`) where: `where` is "file:line" or "Kind name", `field` the path below it, may be empty."""

    where: str
    field: str = ""
    message: str

    def __str__(self) -> str:
        return f"{self.violation().field}: {self.message}"

    def violation(self) -> Violation:
        return Violation(f"{self.where} {self.field}".strip(), self.message)


def refusal(error: type[PlaitError], problems: Sequence[Problem], what: str, *, reason: str) -> PlaitError:
    """Make the error that lists every problem as a violation; `what` opens its sentence ("the manifests")."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
    return error(f"{what}: {count} found", reason=reason, violations=[p.violation() for p in problems])


def path(steps: Sequence[str | int]) -> str:
    """Write a location as people do: ("features", 3, "dtype") → "features[3].dtype"."""
    text = ""
    for step in steps:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
