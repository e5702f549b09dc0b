"""Endpoints from the settings: a list that does not change while the process lives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Final

from router.discovery.found import Found, Tell

_ADDRESS: Final = re.compile(r"(?:dns:///|ipv4:|ipv6:)?(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})\Z")
_MAX_PORT: Final = 65535


def parse(addresses: str) -> tuple[str, ...]:
    """Return the addresses ("host:port", comma separated) in order; ValueError for none, one that is no address, or one listed twice."""
    found = tuple(part.strip() for part in addresses.split(",") if part.strip())
    if not found:
        raise ValueError("expected at least one host:port")
    for address in found:
        port = _ADDRESS.match(address)
        if port is None or not 0 < int(port.group(1)) <= _MAX_PORT:
            raise ValueError(f"{address!r} is not host:port with a port of 1 to {_MAX_PORT}")
    if len(set(found)) < len(found):
        raise ValueError("an address is listed twice: set connections for more than one connection to a replica")
    return found


class StaticDiscovery:
    """Endpoints that were listed."""

    def __init__(self, endpoints: Iterable[Found]) -> None:
        self._found = frozenset(endpoints)

    def __repr__(self) -> str:
        return f"<StaticDiscovery of {len(self._found)}>"

    async def run(self, tell: Tell) -> None:
        """Tell of them once, and then nothing for ever."""
        tell(self._found)
        await asyncio.Event().wait()
