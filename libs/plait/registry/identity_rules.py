"""What the identities of a tenant must satisfy, alone and beside those of other tenants: nobody may belong to two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from plait.registry.findings import Finding
from plait.registry.policies import WorkloadIdentity
from plait.registry.records import Snapshot, Tenant
from plait.rpc.identity.roles import ROLES
from plait.rpc.identity.workloads import ANY

MAX_IDENTITIES: Final = 1000
MAX_BYTES: Final = 256
# https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md: a trust domain, then segments; here the last one may end in "*".
_SPIFFE: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/[A-Za-z0-9._-]+)*/(?:[A-Za-z0-9._-]+\*?|\*)\Z")


def check(tenant: Tenant) -> Iterator[Finding]:
    """Yield what is wrong with a tenant's identities."""
    if len(tenant.identities) > MAX_IDENTITIES:
        yield ("identities",), f"has {len(tenant.identities)} entries; at most {MAX_IDENTITIES} are allowed"
    seen: set[str] = set()
    for index, identity in enumerate(tenant.identities):
        at = ("identities", index)
        if bool(identity.spiffe) == bool(identity.issuer or identity.subject):
            yield at, "give either spiffe, or issuer and subject"
        elif identity.spiffe and (not _SPIFFE.match(identity.spiffe) or len(identity.spiffe) > MAX_BYTES):
            yield (*at, "spiffe"), 'expected spiffe://trust-domain/path of at most 256 bytes; only its end may be "*"'
        elif not identity.spiffe and not all(0 < len(text.encode()) <= MAX_BYTES for text in (identity.issuer, identity.subject)):
            yield at, 'give issuer and subject ("*" = any), each of at most 256 bytes'
        unknown = sorted(set(identity.roles) - set(ROLES))
        if unknown or not identity.roles:
            yield (*at, "roles"), f"expected roles out of {', '.join(ROLES)}; found {', '.join(unknown) or 'none'}"
        if _named(identity) in seen:
            yield at, "is listed twice"
        seen.add(_named(identity))


def check_shared(tenant: Tenant, snapshot: Snapshot) -> Iterator[Finding]:
    """Yield which identities another tenant lists, too. Any subject of an issuer may be in several: there the token names the tenant."""
    others = {
        _named(identity): other.name for other in snapshot.tenants.values() if other.name != tenant.name for identity in other.identities
    }
    for index, identity in enumerate(tenant.identities):
        if identity.subject != ANY and (other := others.get(_named(identity))):
            yield ("identities", index), f"belongs to tenant {other!r} already: nobody can call for two without saying for which"


def _named(identity: WorkloadIdentity) -> str:
    return identity.spiffe or f"{identity.issuer}\0{identity.subject}"
