"""Which tenant a workload belongs to, and what it may do: looked up by SPIFFE id, or by a token's issuer and subject.

Compiled once for each snapshot of the registry, so that a call pays for one or two look-ups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from plait.rpc.identity.roles import granted, scopes_of

SPIFFE: Final = "spiffe://"
ANY: Final = "*"


class Known(Protocol):
    """An identity of a tenant; `registry.policies.WorkloadIdentity` fits. Either `spiffe` or `issuer` and `subject`."""

    @property
    def spiffe(self) -> str: ...
    @property
    def issuer(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def roles(self) -> tuple[str, ...]: ...


class Owner(Protocol):
    """A tenant; `registry.records.Tenant` fits."""

    @property
    def name(self) -> str: ...
    @property
    def identities(self) -> Sequence[Known]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one identity was given."""

    tenant: str
    roles: tuple[str, ...]
    scopes: frozenset[str]

    def within(self, roles: Collection[str] | None) -> frozenset[str]:
        """Return the scopes of those roles that are also among `roles`; None = of all."""
        if roles is None:
            return self.scopes
        common = [role for role in self.roles if role in roles]
        return granted(scopes_of(common)) if common else frozenset()


class Workloads:
    """The identities of all tenants."""

    def __init__(self, tenants: Iterable[Owner] = ()) -> None:
        self._spiffe: dict[str, Grant] = {}
        self._subjects: dict[tuple[str, str], Grant] = {}  # listed by name, which only one tenant may do
        self._of_tenant: dict[tuple[str, str, str], Grant] = {}
        prefixes: list[tuple[str, Grant]] = []
        for tenant in tenants:
            for known in tenant.identities:
                grant = Grant(tenant=tenant.name, roles=known.roles, scopes=granted(scopes_of(known.roles)))
                if known.spiffe.endswith(ANY):
                    prefixes.append((known.spiffe[:-1], grant))
                elif known.spiffe:
                    self._spiffe[known.spiffe] = grant
                else:
                    self._of_tenant[tenant.name, known.issuer, known.subject] = grant
                    if known.subject != ANY:
                        self._subjects[known.issuer, known.subject] = grant
        self._prefixes = sorted(prefixes, key=lambda prefix: -len(prefix[0]))

    def __repr__(self) -> str:
        return f"<Workloads spiffe={len(self._spiffe) + len(self._prefixes)} subjects={len(self._of_tenant)}>"

    def by_spiffe(self, spiffe: str) -> Grant | None:
        """Return what a SPIFFE id was given: the id itself, else the longest prefix that is listed."""
        found = self._spiffe.get(spiffe)
        if found is not None:
            return found
        return next((grant for prefix, grant in self._prefixes if spiffe.startswith(prefix)), None)

    def by_token(self, issuer: str, subject: str, tenant: str) -> Grant | None:
        """Return what a token's subject was given. Where the token names a `tenant`, that tenant must list it, by name or as any subject."""
        if not tenant:
            return self._subjects.get((issuer, subject))
        return self._of_tenant.get((tenant, issuer, subject)) or self._of_tenant.get((tenant, issuer, ANY))
