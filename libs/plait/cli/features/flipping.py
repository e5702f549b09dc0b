"""From an epoch that is built to one that is served, without losing anything that was streamed on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.cli import progress
from plait.cli.author import author
from plait.cli.features.uploading import PATIENCE_S, follow
from plait.errors import Aborted, FailedPrecondition, Unavailable
from plait.registry.records import Epochs, FeatureView
from plait.registry.store import Store

T = TypeVar("T")

_PAUSE_S: Final = 1.0


async def _over_outages(ask: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """Return what the registry answers to what may be asked twice. Raises what stood in the way for `patience_s`, or for good."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            return await ask()
        except (Unavailable, Aborted):
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(_PAUSE_S)


class Flip:
    """The flip of one view's version for one tenant. `service` is feature-retrieval's stub."""

    def __init__(self, store: Store, service: Any, metadata: Any, tenant: str, view: str, version: int) -> None:
        self._store = store
        self._service = service
        self._metadata = metadata
        self._tenant = tenant
        self._view = view
        self._version = version

    async def epochs(self) -> Epochs:
        """Return the epochs as they are now."""
        return await _over_outages(lambda: self._store.epochs(self._tenant, self._view, version=self._version))

    async def complete(self, epoch: int, *, reason: str) -> None:
        """Note that an epoch holds all it shall. Raises FailedPrecondition (EPOCH_NOT_FOUND) where another one is built by now."""
        await _over_outages(
            lambda: self._store.complete_epoch(self._tenant, self._view, epoch, version=self._version, actor=author(), reason=reason)
        )

    async def complete_epoch(self, *, incomplete: bool) -> int:
        """Return which epoch may be flipped to; `incomplete`: also one whose materialize did not come to its end.

        Raises FailedPrecondition (EPOCH_NOT_FOUND, EPOCH_INCOMPLETE).
        """
        epochs = await self.epochs()
        if epochs.building is None:
            raise FailedPrecondition("no epoch is being built: there is nothing to flip to", reason="EPOCH_NOT_FOUND")
        if not (epochs.built or incomplete):
            raise FailedPrecondition(
                f"the materialize of epoch {epochs.building} runs still, or was cut off: let it end, or finish it with --resume; "
                "'plait features flip --incomplete' serves what there is",
                reason="EPOCH_INCOMPLETE",
            )
        return epochs.building

    async def flip(self, epoch: int, *, reason: str) -> int:
        """Carry over what was streamed, flip to an epoch, and carry over once more; return how many rows were carried over.

        Rows that are counted from events are not carried over: the events are replayed, and live ones counted in every epoch.
        The service carries over once every replica writes what is streamed to both epochs, so that the first time is enough. The second one
        is for a replica that stood still, and went on after it had been taken for gone.
        Raises FailedPrecondition (EPOCH_NOT_FOUND) where another epoch is built by now, Unavailable (REPLICA_BEHIND).
        """
        copied = 0 if await self._is_counted() else await self._carry_over((await self.epochs()).serving, epoch)
        await _over_outages(lambda: self._flip(epoch, reason))
        return copied + await self.carry_over_again()

    async def carry_over_again(self) -> int:
        """Carry over what was streamed into the kept epoch only; return how many rows. May be repeated."""
        epochs = await self.epochs()
        return 0 if epochs.previous is None or await self._is_counted() else await self._carry_over(epochs.previous, epochs.serving)

    async def _flip(self, epoch: int, reason: str) -> None:
        """Flip, if an answer that was lost did not say so already."""
        if (await self._store.epochs(self._tenant, self._view, version=self._version)).serving != epoch:
            await self._store.flip_epoch(self._tenant, self._view, epoch=epoch, version=self._version, actor=author(), reason=reason)

    async def _is_counted(self) -> bool:
        view = (await _over_outages(lambda: self._store.get("FeatureView", self._view))).record
        return isinstance(view, FeatureView) and view.aggregation is not None

    async def _carry_over(self, source: int, built: int) -> int:
        request = pb.CarryOverEpochRequest(feature_view=self._view, view_version=self._version, from_epoch=source, to_epoch=built)
        copied = 0
        with progress.rows("carrying over what was streamed", 0) as show:

            def told(answer: Any) -> None:
                nonlocal copied
                copied = answer.copied
                show(answer.scanned, answer.total)

            await follow(lambda asked: self._service.CarryOverEpoch(asked, metadata=self._metadata), request, told)
        return copied
