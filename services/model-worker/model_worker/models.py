"""The models a worker serves: follows the registry, and gives a request its model or the reason why not.

A version is fetched, verified, loaded, proven and warmed beside those that serve; only then can a request see it, and the one it follows
is kept until what it holds is answered. A version that cannot be served says why, and is tried again later; one that keeps failing is
taken out, tested, and brought back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from model_worker import memory, retest
from model_worker.instruments import Instruments
from model_worker.lifecycle import (
    NEVER,
    Entry,
    Key,
    State,
    default_version,
    is_ready,
    next_step,
    retry_after_s,
    wanted,
)
from model_worker.loads import Load, Loads
from model_worker.memory import Ledger, Need
from model_worker.quarantine import Breaker, Health, Phase, Rule
from model_worker.refusals import explained, quarantined, why_not
from model_worker.served import Loader, Prepared, Served
from model_worker.settings import ModelSettings
from plait.errors import DeadlineExceeded, Internal, NotFound, PermissionDenied, PlaitError
from plait.registry.records import Model, ModelVersion, Snapshot, VersionPolicy
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

ANY_VERSION: Final = "-1"
_TESTS_BEFORE_RELOAD: Final = 2  # a model that fails its self-test so often in a row is loaded anew
_CLOSE_S: Final = 5.0  # at the end of the process, when nobody waits any more


class Models:
    """Give `run()` to the process's loops and `adopt` to the registry's watcher."""

    def __init__(self, settings: ModelSettings, loader: Loader, instruments: Instruments, ledger: Ledger | None = None) -> None:
        self._settings = settings
        self._loader = loader
        self._instruments = instruments
        self._ledger = ledger if ledger is not None else Ledger(lambda _: settings.max_memory_bytes or None)
        self._loads = Loads(settings, loader, self._ledger)
        self._rule = Rule(**settings.quarantine.model_dump(exclude={"test_timeout_s"}))
        self._snapshot = Snapshot()
        self._paused: dict[str, Model] = {}  # as the registry described them when they were unloaded by call
        self._entries: dict[Key, Entry] = {}
        self._open: dict[Key, Served] = {}  # what requests meet; (model, "") is the one for requests that name no version
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._leaving: dict[asyncio.Task[None], tuple[Key, Entry]] = {}
        self._hanging: set[asyncio.Task[None]] = set()  # wait for threads that were given up
        self._want: dict[Key, ModelVersion] = {}
        self._following = False  # a snapshot was adopted
        self._settled = False
        self._closing = False

    def __repr__(self) -> str:
        ready = sum(e.state is State.READY for e in self._entries.values())
        return f"<Models ready={ready}/{len(self._entries)} revision={self._snapshot.revision} leaving={len(self._leaving)}>"

    # --- what requests ask

    def get(self, model: str, version: str = "") -> Served:
        """Return a version that is ready; without `version`, or for Triton's "-1", the newest such of those the model's version policy names,
        else of all.

        Raises what `refusals.why_not` returns.
        """
        served = self._open.get((model, version))
        if served is None:
            if version == ANY_VERSION:
                return self.get(model)
            raise why_not(model, version, self._snapshot, self._wanted(), self._entries, time.monotonic())
        return served

    def entries(self) -> list[tuple[str, Entry]]:
        """Return every version held or tried, with its model's name."""
        return [(model, entry) for (model, _), entry in sorted(self._entries.items())]

    def not_held(self) -> list[tuple[str, str, str]]:
        """Return (model, state in the protocol's words, why) of each of the registry's models of which no version is held or tried."""
        held = {model for model, _ in self._entries}
        awaited = {model for model, _ in self._want}
        found = []
        for model in sorted(self._snapshot.models.keys() - held):
            if model in awaited:
                found.append((model, State.LOADING.wire, "waits for its turn to be loaded"))
            else:
                found.append(
                    (model, State.FAILED.wire, "unloaded" if model in self._paused else "no route, alias or version policy refers to it")
                )
        return found

    def serving(self, model: str) -> list[str]:
        """Return the versions of a model that are ready, oldest first."""
        return [v.version for v in self._versions(model) if (model, v.version) in self._open]

    @property
    def queued_rows(self) -> int:
        """Rows waiting for a batch, of all models."""
        return sum(entry.served.batcher.queued_rows for entry in self._entries.values() if entry.served is not None)

    def version_policy(self, model: str) -> VersionPolicy:
        """Return which versions of a model the registry wants held besides those in use."""
        known = self._snapshot.models.get(model)
        return known.version_policy if known is not None else VersionPolicy()

    @property
    def ready(self) -> bool:
        """Whether this worker should get traffic, as models.ready_when says."""
        if not self._following:
            return self._settings.ready_when == "live"
        return is_ready(self._settings.ready_when, self._want, self._entries, settled=self._settled)

    async def readiness(self) -> AsyncIterator[bool]:
        """Yield `ready` now and whenever it has changed, for ever."""
        told: bool | None = None
        while True:
            moved, now = self._moved, self.ready
            if now is not told:
                told = now
                yield now
            else:
                await moved.wait()

    # --- what changes them

    def adopt(self, snapshot: Snapshot) -> None:
        """Follow a new snapshot; what must be loaded is loaded in the background.

        A model that was unloaded by call stays so until the registry says something new of that model, which is the later decision.
        """
        self._snapshot, self._following = snapshot, True
        self._paused = {name: model for name, model in self._paused.items() if snapshot.models.get(name) == model}
        self._notify()

    async def load(self, model: str, timeout_s: float) -> None:
        """Follow the registry for this model again, and return once all its versions are ready.

        What failed is tried at once, what is in quarantine tested at once; what is ready is left alone, since an artifact never changes.

        Raises PermissionDenied (REPOSITORY_CONTROL_OFF), NotFound (MODEL_NOT_FOUND, MODEL_NOT_SERVED), DeadlineExceeded (MODEL_LOADING: it
        goes on), and what `get` would where a version failed.
        """
        self._check_control(model)
        self._paused.pop(model, None)
        before = {key: self._try_at_once(entry) for key, entry in self._entries.items() if key[0] == model}
        self._notify()

        def loaded() -> bool:
            keys = [key for key in self._wanted() if key[0] == model]
            if not keys:
                raise why_not(model, "", self._snapshot, (), self._entries, time.monotonic())
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and _failed_since(entry, before.get(key)):
                    raise why_not(*key, self._snapshot, self._wanted(), self._entries, time.monotonic())
            return all((e := self._entries.get(key)) is not None and e.state is State.READY for key in keys)

        await self._until(loaded, timeout_s, DeadlineExceeded(f"{model} is still being loaded, and will be", reason="MODEL_LOADING"))

    async def unload(self, model: str, timeout_s: float) -> None:
        """Take a model out of sight, and return once what it held was answered. See `adopt` for how long it stays out.

        Raises PermissionDenied (REPOSITORY_CONTROL_OFF), NotFound (MODEL_NOT_FOUND), DeadlineExceeded (MODEL_UNLOADING: it goes on).
        """
        self._check_control(model)
        self._paused[model] = self._snapshot.models[model]
        for key, entry in self._entries.items():
            if key[0] == model:
                entry.unwanted_since_s = -NEVER  # asked for by name: no need to keep it for a router that has not heard
        self._notify()

        def gone() -> bool:
            return all(key[0] != model for key in self._entries) and all(key[0] != model for key, _ in self._leaving.values())

        await self._until(gone, timeout_s, DeadlineExceeded(f"{model} still answers what it holds, then leaves", reason="MODEL_UNLOADING"))

    async def run(self) -> None:
        """Make what is held what is wanted, for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                now_s = time.monotonic()
                shortfalls = self._shortfalls()
                step = next_step(
                    self._wanted(),
                    self._entries,
                    now_s,
                    self._settings.unload_after_s,
                    slots=self._loads.slots,
                    held_up=shortfalls.keys() | self._loads.held_up(),
                    shortfalls=tuple(shortfalls.values()),
                )
                for key in step.unload:
                    self._unload(key)
                for key in step.load:
                    group.create_task(self._load(self._begin(key)), name=f"load {key[0]}/{key[1]}")
                test_again_s = self._test_what_is_due(group, now_s)
                self._notice_settled()
                room_again_s = now_s + self._settings.retry_s if shortfalls else NEVER  # others than models may give memory back
                await self._until_changed(min(step.again_s, test_again_s, room_again_s))

    async def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Answer what is held and end every model's threads; give up on what takes longer than `timeout_s` beyond that."""
        self._closing = True
        self._notify()
        for key in tuple(self._entries):
            self._unload(key)
        while self._leaving:
            await asyncio.wait(tuple(self._leaving))
        await self._loads.settle(timeout_s)
        for waiting in self._hanging:
            waiting.cancel()

    # --- loading

    def _begin(self, key: Key) -> Load:
        version = self._wanted()[key]
        entry = self._entries.setdefault(key, Entry(version=version))
        if entry.version != version:
            entry.version, entry.attempts = version, 0
        entry.state, entry.attempts = State.LOADING, entry.attempts + 1
        return self._loads.begin(key, entry, version)

    async def _load(self, load: Load) -> None:
        prepared = await self._result(load)
        if load.overdue and prepared is None:
            prepared = await self._result(load)  # better late than never
        if prepared is None:
            return
        entry = load.entry
        if self._closing or not self._is_current(load) or entry.served is not None:
            await self._loads.drop(load, prepared)
            self._notify()
            return
        try:
            self._serve(load, prepared)
        except Exception as error:  # no thread could be started, say: that is this version's failure and not the process's
            self._failed(load, error)
            await self._loads.drop(load, prepared)

    async def _result(self, load: Load) -> Prepared | None:
        first = not load.overdue
        try:
            return await self._loads.result(load)
        except Exception as error:
            if first and self._is_current(load) and load.entry.state is State.LOADING:
                self._failed(load, error)
            return None
        finally:
            self._instruments.overdue.set(self._loads.overdue)
            self._changed.set()

    def _is_current(self, load: Load) -> bool:
        return self._entries.get(load.key) is load.entry and load.entry.version.digest == load.version.digest

    def _serve(self, load: Load, prepared: Prepared) -> None:
        key, entry = load.key, load.entry
        entry.breaker = entry.breaker or Breaker(self._rule)
        entry.served = self._loader.serve(*key, prepared, Health(entry.breaker, lambda: self._quarantine(key, entry)))
        entry.claim, entry.sample, entry.need = load.claim, load.sample, None
        entry.state, entry.error, entry.attempts = State.READY, None, 0
        entry.breaker.restored(time.monotonic())
        instruments = self._instruments.of(*key)
        instruments.ready.set(1)
        instruments.memory.set(sum(claim.size_bytes for claim in entry.claim.all()) if entry.claim is not None else 0)
        self._instruments.loaded(key[0], "READY")
        seconds = round(time.monotonic() - load.began_s, 3)
        log.info("a model is ready", model=key[0], version=key[1], seconds=seconds, proven=repr(prepared.proven))
        self._notify()

    def _failed(self, load: Load, error: Exception) -> None:
        (model, version), entry = load.key, load.entry
        if isinstance(error, PlaitError):
            entry.error = explained(error)
            log.error("a model cannot be served", model=model, version=version, reason=error.reason, error=entry.error.message)
        else:
            entry.error = Internal(f"it could not be loaded because of {type(error).__name__}: see the worker's log")
            log.error("a model cannot be served", model=model, version=version, exc_info=error)
        entry.state = State.FAILED
        entry.need = load.need if entry.error.reason == memory.REASON else None
        entry.due_s = time.monotonic() + retry_after_s(entry.attempts, self._settings.retry_s, self._settings.max_retry_s)
        self._instruments.of(model, version).ready.set(0)
        self._instruments.loaded(model, entry.error.reason)
        self._notify()

    def _shortfalls(self) -> dict[Key, Need]:
        """Return, for each version that was refused for want of memory and still would be, what is missing once what leaves has left."""
        leaving = [entry.claim for _, entry in self._leaving.values() if entry.claim is not None]
        found: dict[Key, Need] = {}
        for key in self._want:
            entry = self._entries.get(key)
            if entry is None or entry.need is None or entry.state is not State.FAILED:
                continue
            need, missing_bytes = entry.need, self._ledger.shortfall_bytes(entry.need)
            if missing_bytes <= 0:
                entry.due_s = -NEVER
            else:
                coming_bytes = sum(claim.on(need.device) for claim in leaving)
                found[key] = Need(device=need.device, size_bytes=missing_bytes - coming_bytes)
        return found

    # --- quarantine

    def _quarantine(self, key: Key, entry: Entry) -> None:
        if self._entries.get(key) is not entry or entry.state is not State.READY or entry.breaker is None:
            return
        entry.state = State.QUARANTINED
        entry.error = quarantined(*key, entry.breaker.reason())
        instruments = self._instruments.of(*key)
        instruments.ready.set(0)
        instruments.quarantined.inc()
        log.error("a model is taken out because it keeps failing", model=key[0], version=key[1], breaker=repr(entry.breaker))
        self._notify()

    def _test_what_is_due(self, group: asyncio.TaskGroup, now_s: float) -> float:
        again_s = NEVER
        for key, entry in self._entries.items():
            if (
                entry.state is not State.QUARANTINED
                or entry.breaker is None
                or entry.served is None
                or entry.breaker.phase is not Phase.OPEN
            ):
                continue
            if entry.breaker.until_s <= now_s:
                entry.breaker.test()
                group.create_task(self._test(key, entry, entry.breaker, entry.served), name=f"test {key[0]}/{key[1]}")
            else:
                again_s = min(again_s, entry.breaker.until_s)
        return again_s

    async def _test(self, key: Key, entry: Entry, breaker: Breaker, served: Served) -> None:
        """Send a version its own self-test the way a request goes. It comes back, stays out, or is loaded anew."""
        error = await retest.run(served, entry.sample, self._settings.quarantine.test_timeout_s)
        if self._entries.get(key) is not entry or entry.state is not State.QUARANTINED:
            return
        now_s = time.monotonic()
        if error is None:
            entry.state, entry.error = State.READY, None
            breaker.restored(now_s)
            self._instruments.of(*key).ready.set(1)
            log.info("a model is back: it passed its self-test", model=key[0], version=key[1])
        else:
            breaker.test_failed(now_s)
            entry.error = quarantined(*key, f"{explained(error).message} ({error.reason})")
            log.error("a model stays out: it failed its self-test", model=key[0], version=key[1], reason=error.reason)
            if breaker.failed_tests >= _TESTS_BEFORE_RELOAD:
                self._reload(key, entry)
        self._notify()

    def _reload(self, key: Key, entry: Entry) -> None:
        """Replace a version by itself, loaded anew; what was held goes first, since nobody uses it."""
        self._unload(key)
        fresh = Entry(version=entry.version, state=State.FAILED, error=entry.error, breaker=entry.breaker)
        self._entries[key] = fresh

    # --- leaving

    def _unload(self, key: Key) -> None:
        """Take a version out of sight, then let it finish what it holds."""
        entry = self._entries.pop(key)
        task = asyncio.create_task(self._leave(key, entry), name=f"unload {key[0]}/{key[1]}")
        self._leaving[task] = key, entry
        task.add_done_callback(self._left)
        self._notify()

    async def _leave(self, key: Key, entry: Entry) -> None:
        if entry.served is not None:
            await self._end(key, entry.served)
            if entry.served.hangs and not self._closing:
                log.error("a model was given up while it computes: its memory is counted until it comes back", model=key[0], version=key[1])
                hanging = asyncio.create_task(self._release_later(entry, entry.served), name=f"wait for {key[0]}/{key[1]}")
                self._hanging.add(hanging)
                hanging.add_done_callback(self._hanging.discard)
            elif entry.claim is not None:
                self._ledger.release(entry.claim)
        if key not in self._entries:
            self._instruments.forget(*key)
        log.info("a model was unloaded", model=key[0], version=key[1])

    async def _end(self, key: Key, served: Served) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S if self._closing else self._settings.unload_timeout_s):
                await served.close()
        except TimeoutError:
            log.exception("a model does not end and is given up", model=key[0], version=key[1])
            await served.abandon()
        except Exception:  # it is out of use in any case
            log.exception("a model did not end as it should", model=key[0], version=key[1])

    async def _release_later(self, entry: Entry, served: Served) -> None:
        await served.instances.ended()
        if entry.claim is not None:
            self._ledger.release(entry.claim)
        self._notify()

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._leaving[task]
        self._notify()

    # --- how

    def _wanted(self) -> dict[Key, ModelVersion]:
        return self._want

    def _versions(self, model: str) -> tuple[ModelVersion, ...]:
        known = self._snapshot.models.get(model)
        return known.versions if known is not None else ()

    def _notify(self) -> None:
        """Something changed: let requests see it, and wake `run` and whoever waits for a model."""
        self._want = {} if self._closing else wanted(self._snapshot, self._settings.only, self._paused, self._settings.pool)
        open_ = {key: e.served for key, e in self._entries.items() if e.state is State.READY and e.served is not None}
        for name in {name for name, _ in open_}:
            known = self._snapshot.models.get(name)
            default = default_version(known, {version for model, version in open_ if model == name}) if known is not None else None
            if default is not None:
                open_[name, ""] = open_[name, default]
        self._open = open_
        self._changed.set()
        self._tell_who_waits()

    def _tell_who_waits(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _until_changed(self, again_s: float) -> None:
        try:
            async with asyncio.timeout(None if again_s == NEVER else max(0.0, again_s - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _until(self, true: Callable[[], bool], timeout_s: float, late: DeadlineExceeded) -> None:
        try:
            async with asyncio.timeout(None if timeout_s == NEVER else timeout_s):
                while not true():
                    await self._moved.wait()
        except TimeoutError:
            raise late from None

    def _notice_settled(self) -> None:
        tried = [(e := self._entries.get(key)) is not None and (e.state is not State.LOADING or e.error is not None) for key in self._want]
        if not self._settled and self._following and all(tried):
            self._settled = True
            self._tell_who_waits()

    def _try_at_once(self, entry: Entry) -> tuple[int, int]:
        """Return a mark by which a later failure can be told from an earlier one."""
        entry.due_s, entry.need = -NEVER, None
        tests = 0
        if entry.breaker is not None:
            tests = entry.breaker.failed_tests
            entry.breaker.until_s = -NEVER
        return entry.attempts - (entry.state is State.LOADING), tests

    def _check_control(self, model: str) -> None:
        if not self._settings.repository_control:
            raise PermissionDenied(
                "loading and unloading by call is switched off: models follow the registry (setting models.repository_control)",
                reason="REPOSITORY_CONTROL_OFF",
            )
        if model not in self._snapshot.models:
            raise NotFound(f"Request for unknown model: {model[:80]} is not in the registry", reason="MODEL_NOT_FOUND")


def _failed_since(entry: Entry, before: tuple[int, int] | None) -> bool:
    """Say whether an entry stands failed, by an attempt that came after the mark `before` and with no other one due."""
    if entry.state is State.FAILED:
        return entry.due_s > -NEVER and (before is None or entry.attempts != before[0])
    if entry.state is State.QUARANTINED and entry.breaker is not None:
        return entry.breaker.phase is Phase.OPEN and (before is None or entry.breaker.failed_tests != before[1])
    return False
