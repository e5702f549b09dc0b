"""One tracking connection, several who hear of changes."""

from __future__ import annotations

from collections.abc import Sequence

from feature_retrieval.store.tracking import Listener


class Audience(Listener):
    """Passes on what it hears, in order."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """Tell everybody."""
        for listener in self._listeners:
            listener.connected(prefixes)

    def disconnected(self) -> None:
        """Tell everybody."""
        for listener in self._listeners:
            listener.disconnected()

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """Tell everybody."""
        for listener in self._listeners:
            listener.changed(keys)
