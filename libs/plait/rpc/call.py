"""Who is calling, on whose behalf, and how much time is left: the facts of the call under way."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from plait.rpc.deadline import Deadline


@dataclass(slots=True, kw_only=True)  # nobody changes it; frozen would triple the cost of making one, and one is made per call
class Call:
    """One call as the domain sees it. `caller` is a key's id or "service"; `is_service` marks an authenticated plait service.

    `metadata` is what came with it, as gRPC holds it: it may name credentials, so no part of it is ever logged.
    """

    method: str
    tenant: str
    caller: str = ""
    scopes: frozenset[str] = frozenset()
    is_service: bool = False
    request_id: str = ""
    deadline: Deadline
    metadata: Sequence[tuple[str, str | bytes]] = field(default=(), repr=False)


_current: ContextVar[Call] = ContextVar("plait_call")


def current() -> Call:
    """Return the call under way in this task; LookupError outside of one."""
    return _current.get()


def enter(call: Call) -> None:
    """Make `call` the current one of this task. Every call runs in a task of its own, so nothing needs undoing."""
    _current.set(call)
