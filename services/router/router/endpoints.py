"""One endpoint behind the router: where it is, how it is called, what it holds, and how balancing sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from plait.errors import PlaitError
from plait.rpc.deadline import Deadline
from router.discovery.found import Found
from router.replica import Replica

Versions = frozenset[tuple[str, str]]
OnLoad = Callable[[Any], None]
Metadata = Sequence[tuple[str, str | bytes]]
INFERENCE: Final = "/inference.GRPCInferenceService/"


class Transport(Protocol):
    """How calls reach one endpoint: over plait's multiplexed streams, or as unary calls of a foreign server.

    Errors are `plait.errors` classes; CONNECTION_LOST is the reason of one that did not reach the endpoint.
    """

    async def typed(self, frame: Any, *, deadline: Deadline, tenant: str, request_id: str) -> Any:
        """Send a frame whose `.request` is filled, and return the response message."""

    async def raw(self, request: bytes, *, deadline: Deadline, tenant: str, request_id: str, metadata: Metadata = ()) -> bytes:
        """Send a serialized ModelInferRequest, and return the serialized response."""

    async def ask(self, method: str, request: bytes, deadline: Deadline) -> bytes:
        """Call another method of the Open Inference Protocol, bytes for bytes."""

    async def ready_versions(self, deadline: Deadline) -> Versions | None:
        """Return the (model, version) pairs that are ready there; None where it cannot say."""

    async def close(self) -> None:
        """Close the connections; calls still waiting fail."""


Open = Callable[[str, OnLoad], Transport]


class Endpoint:
    """An endpoint in use.

    `wanted`: discovery says that it takes calls; `quiet_until_s`: it said itself that it is about to stop. `loss` is the error of the last
    connection that broke: all calls on it failed with that very one. `leaving`, when it is found no more, is set once it has answered all.
    """

    __slots__ = ("address", "leaving", "loss", "quiet_until_s", "ready", "replica", "transport", "wanted")

    def __init__(self, address: str, replica: Replica, transport: Transport) -> None:
        self.address = address
        self.replica = replica
        self.transport = transport
        self.ready: Versions | None = None
        self.loss: PlaitError | None = None
        self.wanted = True
        self.quiet_until_s = 0.0
        self.leaving: asyncio.Event | None = None

    def __repr__(self) -> str:
        return repr(self.replica)

    def may_hold(self, model: str, version: str) -> bool:
        """Whether it has the version ready, as far as is known."""
        return self.ready is None or (model, version) in self.ready or (not version and any(name == model for name, _ in self.ready))


def takes_calls(found: Found) -> bool:
    """Whether discovery says that new calls may go there."""
    return found.ready and not found.terminating
