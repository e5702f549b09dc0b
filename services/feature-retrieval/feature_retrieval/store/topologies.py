"""Which server holds a key: one server, or whatever replaces this answer, behind one seam.

A topology only knows; `dispatch` asks. One server is `Single`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from feature_retrieval.store.connections import Access, Address, Node


class Topology(Protocol):
    """Where keys are. Of `slotted` ones a command may name keys of one slot only."""

    slotted: bool

    async def ready(self) -> None:
        """Find out where keys are, where this is not known or was doubted. Raises Unavailable."""
        ...

    def node(self, key: bytes) -> Node:
        """Return the server that takes reads and writes of a key. Raises Unavailable where nobody does."""
        ...

    def at(self, address: Address) -> Node:
        """Return the server at an address that another one named."""
        ...

    def primaries(self) -> Sequence[Node]:
        """Return every server that takes writes."""
        ...

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return a key that begins with a name and that this server holds."""
        ...

    def doubt(self) -> None:
        """A server no longer did what it should: find out anew before the next use."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Single:
    """One server, for ever."""

    slotted = False

    def __init__(self, access: Access) -> None:
        self._node = access.node()

    async def ready(self) -> None:
        """There is nothing to find out."""

    def node(self, key: bytes) -> Node:
        """Return the one there is."""
        return self._node

    def at(self, address: Address) -> Node:
        """Return the one there is."""
        return self._node

    def primaries(self) -> Sequence[Node]:
        """Return the one there is."""
        return (self._node,)

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return the name: every key is here."""
        return name

    def doubt(self) -> None:
        """There is no other."""

    async def close(self) -> None:
        """Close every connection."""
        await self._node.close()
