"""Loads under way: how many at once, how long each may take, what memory each has claimed, and what became of those that hang.

A thread cannot be ended from outside. One whose load is overdue therefore gives its slot back, so that an artifact store that hangs does
not keep other versions from loading, but stays counted: at most MAX_PER_VERSION of one version and `max_overdue_loads` in all.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from model_worker import background, memory, memory_limit
from model_worker.artifacts import Artifact, Sample
from model_worker.lifecycle import Entry, Key
from model_worker.memory import Claim, Ledger, Need
from model_worker.served import Loader, Prepared
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition, PlaitError
from plait.registry.records import ModelVersion
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

MAX_PER_VERSION: Final = 2
# While something is loaded, a thread that wants the interpreter's lock waits so long before it asks for it, not Python's usual 5 ms: reading a
# torch.export graph is Python for as long as it takes. Each turn costs the load some microseconds.
_TURN_S: Final = 0.0005


@dataclass(slots=True, eq=False, kw_only=True)
class Load:
    """One attempt. `need`, `claim` and `sample` are known once the artifact was fetched and let in."""

    key: Key
    entry: Entry
    version: ModelVersion
    began_s: float = field(default_factory=time.monotonic)
    need: Need | None = None
    claim: Claim | None = None
    sample: Sample | None = None
    overdue: bool = False
    work: asyncio.Future[Prepared] = field(init=False)


class Loads:
    """Runs `Loader.prepare` in threads of their own."""

    def __init__(self, settings: ModelSettings, loader: Loader, ledger: Ledger) -> None:
        self._settings = settings
        self._loader = loader
        self._ledger = ledger
        self._running: set[Load] = set()
        self._calm_turn_s = sys.getswitchinterval()

    def __repr__(self) -> str:
        return f"<Loads running={len(self._running) - self.overdue}/{self._settings.load_concurrency} overdue={self.overdue}>"

    @property
    def overdue(self) -> int:
        """How many are past their time and may never end."""
        return sum(load.overdue for load in self._running)

    @property
    def slots(self) -> int:
        """How many more may begin now."""
        overdue = self.overdue
        if overdue >= self._settings.max_overdue_loads > 0:
            return 0
        return self._settings.load_concurrency - (len(self._running) - overdue)

    def held_up(self) -> set[Key]:
        """Return the versions that may not begin again before one of their overdue loads ends."""
        return {key for key, n in Counter(load.key for load in self._running if load.overdue).items() if n >= MAX_PER_VERSION}

    def begin(self, key: Key, entry: Entry, version: ModelVersion) -> Load:
        """Start a load; it takes a slot until it ends or is overdue."""
        load = Load(key=key, entry=entry, version=version)
        load.work = background.start(f"load {key[0]}/{key[1]}", lambda: self._prepare(load))
        load.work.add_done_callback(lambda work: self._ended(load, work))
        self._running.add(load)
        sys.setswitchinterval(min(_TURN_S, self._calm_turn_s))
        return load

    async def result(self, load: Load) -> Prepared:
        """Return what was loaded. Raises what `Loader.prepare` does, FailedPrecondition (MEMORY_EXCEEDED, LOAD_TIMEOUT)."""
        await asyncio.wait({load.work}, timeout=None if load.overdue else self._settings.load_timeout_s)
        if load.work.done():
            return load.work.result()
        load.overdue = True
        raise FailedPrecondition(
            f"it was not loaded within {self._settings.load_timeout_s:g} s: see whether its artifact can be read, or raise models.load_timeout_s",
            reason="LOAD_TIMEOUT",
        )

    async def drop(self, load: Load, prepared: Prepared) -> None:
        """Let go of what was loaded and is not going to serve."""
        try:
            await asyncio.to_thread(prepared.close)
        except Exception:  # it is out of use in any case
            log.exception("what was loaded did not end as it should", model=load.key[0], version=load.key[1])
        self.release(load)

    def release(self, load: Load) -> None:
        """Give back the memory a load has claimed."""
        if load.claim is not None:
            self._ledger.release(load.claim)
            load.claim = None

    async def settle(self, timeout_s: float) -> None:
        """Wait so long for the loads that are not overdue: a process that ends under a library's feet may crash."""
        works = [load.work for load in self._running if not load.overdue]
        if works:
            await asyncio.wait(works, timeout=timeout_s)

    def _prepare(self, load: Load) -> Prepared:
        """In the loading thread."""
        before_bytes = memory_limit.resident_bytes()

        def admit(artifact: Artifact, device: str, copies: int) -> None:
            load.sample = artifact.sample
            load.need = memory.estimate(artifact.manifest, device, copies)
            load.claim = self._ledger.claim(load.key, load.need, beside=load.claim)

        prepared = self._loader.prepare(load.version, admit)
        if load.claim is not None:
            self._measure(load, load.claim, prepared, memory_limit.resident_bytes() - before_bytes)
        return prepared

    def _measure(self, load: Load, claim: Claim, prepared: Prepared, grown_bytes: int) -> None:
        """Replace the estimate with what the version holds: its weights, or by how much the process has grown where that is more (what a
        library adds to them, activations) but no more than the estimate, since others grow the process at the same time."""
        grown_bytes = min(grown_bytes, claim.size_bytes) if claim.device == memory.CPU else 0
        size_bytes = max(prepared.memory_bytes, grown_bytes)
        load.need = Need(device=claim.device, size_bytes=max(size_bytes, claim.size_bytes))
        try:
            self._ledger.settle(claim, size_bytes)
        except PlaitError:
            prepared.close()
            raise

    def _ended(self, load: Load, work: asyncio.Future[Prepared]) -> None:
        self._running.discard(load)
        if not self._running:
            sys.setswitchinterval(self._calm_turn_s)
        if not work.cancelled() and work.exception() is not None:
            self.release(load)
