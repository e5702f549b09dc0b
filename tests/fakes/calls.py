"""Calls as the domain sees them, for tests that go past the wire."""

from __future__ import annotations

from plait.rpc.call import Call
from plait.rpc.deadline import Deadline


def call_of(tenant: str = "default", caller: str = "key-1", *, service: bool = False, scopes: tuple[str, ...] = ("features",)) -> Call:
    """Return a call under way that has a minute left."""
    return Call(method="test", tenant=tenant, caller=caller, is_service=service, scopes=frozenset(scopes), deadline=Deadline.after(60))


ADMIN = call_of(scopes=("features", "admin"))
