"""What a pool must satisfy on its own: somewhere to call, and addresses that are ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from plait.registry import findings
from plait.registry.findings import Finding
from plait.registry.records import Pool

DEFAULT: Final = "default"  # where models run that name no pool
MAX_ENDPOINTS: Final = 1000

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})\Z")
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")  # as Kubernetes names namespaces, services and ports


def check_pool(pool: Pool) -> Iterator[Finding]:
    """Yield what is wrong with a pool."""
    if pool.name == DEFAULT:
        yield (), f"{DEFAULT!r} is what the router's own workers are called: choose another name"
    if bool(pool.endpoints) == (pool.kubernetes is not None):
        yield ("endpoints",), "give either endpoints or kubernetes: where the workers are has to be known once"
    if len(pool.endpoints) > MAX_ENDPOINTS:
        yield ("endpoints",), f"has {len(pool.endpoints)} entries; at most {MAX_ENDPOINTS} are allowed"
    yield from findings.unique(("endpoints",), (endpoint.address for endpoint in pool.endpoints), ("address",))
    for index, endpoint in enumerate(pool.endpoints):
        found = _ADDRESS.match(endpoint.address)
        if found is None or not 0 < int(found[2]) < 65_536:
            yield ("endpoints", index, "address"), f"expected host:port, found {endpoint.address[:80]!r}"
        yield from findings.text(("endpoints", index, "zone"), endpoint.zone)
    if pool.kubernetes is not None:
        for name in ("namespace", "service", "port"):
            if not _LABEL.match(getattr(pool.kubernetes, name)):
                yield ("kubernetes", name), f"{getattr(pool.kubernetes, name)[:80]!r} is not a name that Kubernetes allows"
