"""What discovery finds: the seam between those who know where endpoints are and those who call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One endpoint: `address` is host:port. `ready`: it wants calls. `terminating`: it is going, and only finishes what it has."""

    address: str
    zone: str = ""
    ready: bool = True
    terminating: bool = False


Tell = Callable[[frozenset[Found]], None]


class Discovery(Protocol):
    """Finds the endpoints of one service."""

    async def run(self, tell: Tell) -> None:
        """Tell of all endpoints, at once and whenever they change, until cancelled. What cannot be asked just now is retried for ever."""
