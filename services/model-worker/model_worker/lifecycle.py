"""Which versions a worker should hold, decided without I/O: what to load next, what to let go, and when to look again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from model_worker.served import Served
from plait.errors import PlaitError
from plait.registry.records import Model, ModelVersion, Snapshot

Key = tuple[str, str]  # model, version
NEVER: Final = math.inf


class State(Enum):
    """Where a version stands. A version that FAILED is tried again later."""

    LOADING = "LOADING"
    READY = "READY"
    FAILED = "UNAVAILABLE"  # the protocol's word for it


@dataclass(slots=True, kw_only=True)
class Entry:
    """One version the worker holds or tries to. `served` while READY, `error` since it last failed; times on the monotonic clock."""

    version: ModelVersion
    state: State = State.LOADING
    served: Served | None = None
    error: PlaitError | None = None
    attempts: int = 0
    due_s: float = -math.inf
    unwanted_since_s: float = NEVER

    def __repr__(self) -> str:
        return (
            f"<Entry {self.version.version} {self.state.value} attempts={self.attempts} error={self.error.reason if self.error else None}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do now: at most one version to load, versions to unload, and when to look again if nothing changes (monotonic seconds)."""

    load: Key | None
    unload: tuple[Key, ...]
    again_s: float


def wanted(snapshot: Snapshot, only: Collection[str], paused: Collection[str]) -> dict[Key, ModelVersion]:
    """Return the versions that routes and aliases refer to, then the newest of each model: what is in use is loaded first."""
    models = [m for m in snapshot.models.values() if m.name not in paused and (not only or m.name in only)]
    found = {(m.name, v.version): v for m in models for v in _referred(m, snapshot)}
    for model in models:
        for newest in model.versions[-1:]:
            found.setdefault((model.name, newest.version), newest)
    return found


def _referred(model: Model, snapshot: Snapshot) -> list[ModelVersion]:
    uses = [v.use for route in snapshot.routes.values() for v in route.variants if v.model == model.name]
    resolved = [model.resolve(use) for use in (*uses, *model.aliases)]
    return [version for version in resolved if version is not None]


def next_step(wanted: Mapping[Key, ModelVersion], entries: Mapping[Key, Entry], now_s: float, unload_after_s: float) -> Step:
    """Compare what is wanted with what is held; marks in `entries` since when a version is unwanted.

    A version that serves is not let go before every wanted version of its model is ready: until then it is the one to fall back on.
    One whose digest is no longer the registry's is let go at once.
    """
    unload, unload_again_s = _unwanted(wanted, entries, now_s, unload_after_s)
    load, load_again_s = _due(wanted, {key: entry for key, entry in entries.items() if key not in unload}, now_s)
    return Step(load=load, unload=tuple(unload), again_s=now_s if load is not None else min(unload_again_s, load_again_s))


def _unwanted(
    wanted: Mapping[Key, ModelVersion], entries: Mapping[Key, Entry], now_s: float, unload_after_s: float
) -> tuple[list[Key], float]:
    awaited = {key[0] for key in wanted if (e := entries.get(key)) is None or e.state is not State.READY}
    unload: list[Key] = []
    again_s = NEVER
    for key, entry in entries.items():
        if key in wanted:
            entry.unwanted_since_s = NEVER
            if entry.version.digest != wanted[key].digest:
                unload.append(key)
        elif entry.state is State.READY and key[0] in awaited:
            entry.unwanted_since_s = NEVER
        else:
            entry.unwanted_since_s = min(entry.unwanted_since_s, now_s)
            leaves_s = entry.unwanted_since_s + (unload_after_s if entry.state is State.READY else 0.0)
            if leaves_s <= now_s:
                unload.append(key)
            again_s = min(again_s, leaves_s)
    return unload, again_s


def _due(wanted: Mapping[Key, ModelVersion], entries: Mapping[Key, Entry], now_s: float) -> tuple[Key | None, float]:
    again_s = NEVER
    for key, version in wanted.items():
        tried = entries.get(key)
        if tried is None:
            return key, now_s
        if tried.state is State.READY:
            continue
        if tried.due_s <= now_s or tried.version != version:
            return key, now_s
        again_s = min(again_s, tried.due_s)
    return None, again_s


def retry_after_s(attempts: int, first_s: float, most_s: float) -> float:
    """Return how long to wait after so many failed attempts: doubling up to a limit."""
    return min(most_s, first_s * 2.0 ** min(attempts - 1, 30))
