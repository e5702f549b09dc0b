"""What every replica of the service knows of the registry, so that nobody acts on what one of them has not heard yet.

Each announces, in the Redis that holds the rows, the revision of the oldest snapshot that it still writes by. A replica that is cut off from
Postgres goes on writing by what it knew, and is seen here to be behind; one that cannot reach Redis writes nothing. A replica that ends
takes its announcement with it; one that was killed is forgotten after `LEASE_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from feature_retrieval.store.scripts import ANNOUNCE
from plait.errors import Unavailable
from plait.redis.commands import pack
from plait.redis.dispatch import Dispatch, all_here, late
from plait.registry.records import Snapshot
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

EVERY_S: Final = 1.0
LEASE_S: Final = 15.0
_YOUNG_S: Final = 3 * EVERY_S  # after Redis was lost: by then everyone who is there has announced itself again
_TIMEOUT_S: Final = 5.0
_TAG: Final = b"r1{replicas}"
_NAMES: Final = _TAG + b"n"
_YOUNG: Final = _TAG + b"y"


class Replicas:
    """Announces this replica, called `name`, and knows of the others. `oldest` gives the revision it still writes by."""

    def __init__(self, dispatch: Dispatch, name: str, oldest: Callable[[], int]) -> None:
        self._dispatch = dispatch
        self._name = name.encode()
        self._oldest = oldest
        self._hurry = asyncio.Event()
        self._ended = False

    def __repr__(self) -> str:
        return f"<Replicas {self._name.decode()} oldest={self._oldest()}>"

    def changed(self, _: Snapshot) -> None:
        """There is a new snapshot: announce it soon."""
        self._hurry.set()

    async def run(self) -> None:
        """Announce this replica, again and again until cancelled."""
        while True:
            self._hurry.clear()
            try:
                if not self._ended:
                    await self.announce()
            except Unavailable as error:
                log.info("this replica cannot announce what it knows of the registry", reason=error.reason)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), EVERY_S)

    async def announce(self) -> None:
        """Say what this replica writes by. Raises Unavailable."""
        arguments = [self._name, b"%d" % self._oldest(), b"%d" % (LEASE_S * 1000), b"%d" % (_YOUNG_S * 1000)]
        await self._ask(ANNOUNCE.call([_NAMES, _YOUNG, _key(self._name)], arguments), script=ANNOUNCE)

    async def check_heard(self, revision: int) -> None:
        """Return if no replica writes by less than a revision. Raises Unavailable (REPLICA_BEHIND, STORE_UNAVAILABLE)."""
        await self.announce()  # whoever asks is one of them
        names, young = await self._ask(pack(b"SMEMBERS", [_NAMES])), await self._ask(pack(b"EXISTS", [_YOUNG]))
        known = await self._ask(pack(b"MGET", [_key(name) for name in names]))
        for name in [name for name, it_knows in zip(names, known, strict=True) if it_knows is None]:
            await self._ask(pack(b"SREM", [_NAMES, name]))
        there = [int(it_knows) for it_knows in known if it_knows is not None]
        behind = sum(it_knows < revision for it_knows in there)
        if behind or young:
            found = f"{behind} of {len(there)} replicas have" if behind else "it is not known yet which replicas have"
            raise Unavailable(
                f"{found} not heard of the registry's revision {revision}: retry; if that lasts, see that each of them reaches Postgres",
                reason="REPLICA_BEHIND",
                retry_after_s=EVERY_S,
            )

    async def close(self) -> None:
        """Take the announcement back: this replica writes no more."""
        self._ended = True
        with suppress(Unavailable):
            await self._ask(pack(b"DEL", [_key(self._name)]))
            await self._ask(pack(b"SREM", [_NAMES, self._name]))

    async def _ask(self, command: bytes, script: Any = None) -> Any:
        replies = late(1)
        with suppress(TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self._dispatch.run([_TAG], [command], replies, script=script)
        all_here(replies)
        return replies[0]


def _key(name: bytes) -> bytes:
    return _TAG + b"r" + name
