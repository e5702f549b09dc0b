"""The models a worker serves: follows the registry, and gives a request its model or the reason why not.

A version is fetched, verified, loaded, proven and warmed beside those that serve; only then can a request see it, and the one it follows
is kept until what it holds is answered. A version that cannot be served says why, and is tried again later.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from model_worker.instruments import Instruments
from model_worker.lifecycle import NEVER, Entry, Key, State, next_step, retry_after_s, wanted
from model_worker.served import Loader, Served
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition, Internal, NotFound, PermissionDenied, PlaitError, Unavailable
from plait.registry.records import ModelVersion, Snapshot, VersionPolicy
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_LOADING_RETRY_S: Final = 0.25
_SHOWN_CHARS: Final = 80  # of what a caller calls a model: messages travel in headers, which are small


class Models:
    """Give `run()` to the process's loops and `adopt` to the registry's watcher."""

    def __init__(self, settings: ModelSettings, loader: Loader, instruments: Instruments) -> None:
        self._settings = settings
        self._loader = loader
        self._instruments = instruments
        self._snapshot = Snapshot()
        self._paused: set[str] = set()
        self._entries: dict[Key, Entry] = {}
        self._changed = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False

    def __repr__(self) -> str:
        ready = sum(e.state is State.READY for e in self._entries.values())
        return f"<Models ready={ready}/{len(self._entries)} revision={self._snapshot.revision} leaving={len(self._leaving)}>"

    # --- what requests ask

    def get(self, model: str, version: str = "") -> Served:
        """Return a version that is ready; without `version` the newest such of the model.

        Raises NotFound (MODEL_NOT_FOUND), Unavailable (MODEL_LOADING, with a time to retry), FailedPrecondition (MODEL_FAILED).
        """
        if version:
            entry = self._entries.get((model, version))
            if entry is not None and entry.served is not None:
                return entry.served
            raise self._why_not(model, version)
        for candidate in reversed(self._versions(model)):
            entry = self._entries.get((model, candidate.version))
            if entry is not None and entry.state is State.READY and entry.served is not None:
                return entry.served
        raise self._why_not(model, version)

    def entries(self) -> list[tuple[str, Entry]]:
        """Return every version held or tried, with its model's name."""
        return [(model, entry) for (model, _), entry in sorted(self._entries.items())]

    def serving(self, model: str) -> list[str]:
        """Return the versions of a model that are ready, oldest first."""
        ready = [v.version for v in self._versions(model)]
        return [v for v in ready if (e := self._entries.get((model, v))) is not None and e.state is State.READY]

    def version_policy(self, model: str) -> VersionPolicy:
        """Return which versions of a model the registry wants held besides those in use."""
        known = self._snapshot.models.get(model)
        return known.version_policy if known is not None else VersionPolicy()

    @property
    def ready(self) -> bool:
        """Whether every version that should be served is."""
        return all((e := self._entries.get(key)) is not None and e.state is State.READY for key in self._wanted())

    # --- what changes them

    def adopt(self, snapshot: Snapshot) -> None:
        """Follow a new snapshot; what must be loaded is loaded in the background."""
        self._snapshot = snapshot
        self._changed.set()

    def pause(self, model: str) -> None:
        """Unload a model until `resume`. Raises PermissionDenied (REPOSITORY_CONTROL_OFF), NotFound."""
        self._check_control(model)
        self._paused.add(model)
        for (name, _), entry in self._entries.items():
            if name == model:
                entry.unwanted_since_s = -NEVER  # asked for by name: no need to keep it for a router that has not heard
        self._changed.set()

    def resume(self, model: str) -> None:
        """Load a model that was unloaded, and try again at once what failed. Raises as `pause` does."""
        self._check_control(model)
        self._paused.discard(model)
        for (name, _), entry in self._entries.items():
            if name == model:
                entry.due_s = -NEVER
        self._changed.set()

    async def run(self) -> None:
        """Make what is held what is wanted, for ever."""
        while True:
            self._changed.clear()
            step = next_step(self._wanted(), self._entries, time.monotonic(), self._settings.unload_after_s)
            for key in step.unload:
                self._unload(key)
            if step.load is not None:
                await self._load(step.load, self._wanted()[step.load])
            else:
                await self._until_changed(step.again_s)

    async def close(self) -> None:
        """Answer what is held and end every model's thread."""
        self._closing = True
        for key in tuple(self._entries):
            self._unload(key)
        while self._leaving:
            await asyncio.wait(tuple(self._leaving))

    # --- how

    def _wanted(self) -> dict[Key, ModelVersion]:
        return {} if self._closing else wanted(self._snapshot, self._settings.only, self._paused)

    def _versions(self, model: str) -> tuple[ModelVersion, ...]:
        known = self._snapshot.models.get(model)
        return known.versions if known is not None else ()

    async def _until_changed(self, again_s: float) -> None:
        try:
            async with asyncio.timeout(None if again_s == NEVER else max(0.0, again_s - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _load(self, key: Key, version: ModelVersion) -> None:
        entry = self._entries.setdefault(key, Entry(version=version))
        if entry.version != version:
            entry.version, entry.attempts = version, 0
        entry.state, entry.attempts = State.LOADING, entry.attempts + 1
        began_s = time.monotonic()
        try:
            prepared = await asyncio.to_thread(self._loader.prepare, version)
        except Exception as error:
            self._failed(key, entry, error)
            return
        if self._closing:
            return
        entry.served = self._loader.serve(*key, prepared)
        entry.state, entry.error, entry.attempts = State.READY, None, 0
        self._instruments.of(*key).ready.set(1)
        self._instruments.loaded(key[0], "READY")
        log.info(
            "a model is ready", model=key[0], version=key[1], seconds=round(time.monotonic() - began_s, 3), proven=repr(prepared.proven)
        )

    def _failed(self, key: Key, entry: Entry, error: Exception) -> None:
        model, version = key
        if isinstance(error, PlaitError):
            entry.error = _explained(error)
            log.error("a model cannot be served", model=model, version=version, reason=error.reason, error=entry.error.message)
        else:
            entry.error = Internal(f"it could not be loaded because of {type(error).__name__}: see the worker's log")
            log.error("a model cannot be served", model=model, version=version, exc_info=error)
        entry.state = State.FAILED
        entry.due_s = time.monotonic() + retry_after_s(entry.attempts, self._settings.retry_s, self._settings.max_retry_s)
        self._instruments.of(*key).ready.set(0)
        self._instruments.loaded(model, entry.error.reason)

    def _unload(self, key: Key) -> None:
        """Take a version out of sight, then let it finish what it holds."""
        entry = self._entries.pop(key)
        task = asyncio.create_task(self._leave(key, entry), name=f"unload {key[0]}/{key[1]}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, key: Key, entry: Entry) -> None:
        if entry.served is not None:
            await entry.served.close()
        if key not in self._entries:
            self._instruments.forget(*key)
        log.info("a model was unloaded", model=key[0], version=key[1])

    def _why_not(self, model: str, version: str) -> PlaitError:
        shown = model[:_SHOWN_CHARS]
        name = f"{shown} version {version[:_SHOWN_CHARS]}" if version else shown
        found = [v for v in self._versions(model) if version in ("", v.version)]
        awaited = [self._entries.get(key) for key in self._wanted() if key[0] == model and version in ("", key[1])]
        errors = [entry.error if entry is not None else None for entry in awaited]
        if None in errors:
            return Unavailable(f"{name} is being loaded: retry", reason="MODEL_LOADING", retry_after_s=_LOADING_RETRY_S)
        if errors and (error := errors[-1]) is not None:
            return FailedPrecondition(f"{name} could not be loaded: {error.message} ({error.reason})", reason="MODEL_FAILED")
        if not found:
            known = ", ".join(sorted(self._snapshot.models)[:10]) or "none"
            return NotFound(f"Request for unknown model: {name} is not in the registry; models it has: {known}", reason="MODEL_NOT_FOUND")
        return NotFound(
            f"Request for unknown model: {name} is not served here: no route or alias refers to it, or it was unloaded",
            reason="MODEL_NOT_SERVED",
        )

    def _check_control(self, model: str) -> None:
        if not self._settings.repository_control:
            raise PermissionDenied(
                "loading and unloading by call is switched off: models follow the registry (setting models.repository_control)",
                reason="REPOSITORY_CONTROL_OFF",
            )
        if model not in self._snapshot.models:
            raise NotFound(f"Request for unknown model: {model[:_SHOWN_CHARS]} is not in the registry", reason="MODEL_NOT_FOUND")


def _explained(error: PlaitError) -> PlaitError:
    """Return the error with what was found in its message: RepositoryIndex and the log have room for one sentence only."""
    found = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in error.violations[:3])
    return type(error)(f"{error.message}: {found}", reason=error.reason) if found else error
