"""Which versions a worker should hold, decided without I/O: what to load next, what to let go, and when to look again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from model_worker.artifacts import Sample
from model_worker.memory import Claim, Need
from model_worker.quarantine import Breaker
from model_worker.served import Served
from plait.errors import PlaitError
from plait.registry.pool_rules import DEFAULT
from plait.registry.records import Model, ModelVersion, Snapshot
from plait.registry.references_of import models_of

Key = tuple[str, str]  # model, version
NEVER: Final = math.inf


class State(Enum):
    """Where a version stands. A version that FAILED is tried again later, one that is QUARANTINED is tested again later."""

    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"
    QUARANTINED = "QUARANTINED"

    @property
    def wire(self) -> str:
        """The protocol's word for it."""
        return "UNAVAILABLE" if self in (State.FAILED, State.QUARANTINED) else self.value


@dataclass(slots=True, kw_only=True)
class Entry:
    """One version the worker holds or tries to.

    `served` while READY or QUARANTINED, `error` since it last failed; times on the monotonic clock. `attempts`: loads begun since it was last
    ready. `claim`: its memory; `need`: what it would take, known once it was refused for want of memory. `sample`: its self-test.
    """

    version: ModelVersion
    state: State = State.LOADING
    served: Served | None = None
    error: PlaitError | None = None
    attempts: int = 0
    due_s: float = -math.inf
    unwanted_since_s: float = NEVER
    claim: Claim | None = None
    need: Need | None = None
    sample: Sample | None = None
    breaker: Breaker | None = None

    def __repr__(self) -> str:
        return (
            f"<Entry {self.version.version} {self.state.value} attempts={self.attempts} error={self.error.reason if self.error else None}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do now: versions to load, at most as many as there were slots, and to unload; when to look again if nothing changes
    (monotonic seconds)."""

    load: tuple[Key, ...]
    unload: tuple[Key, ...]
    again_s: float


def wanted(snapshot: Snapshot, only: Collection[str], paused: Collection[str], pool: str = DEFAULT) -> dict[Key, ModelVersion]:
    """Return the versions that routes and aliases refer to, then those of each model's version policy: what is in use is loaded first.

    Models of other pools are others' to load.
    """
    here = [m for m in snapshot.models.values() if (m.pool or DEFAULT) == pool]
    models = [m for m in here if m.name not in paused and (not only or m.name in only)]
    found = {(m.name, v.version): v for m in models for v in _referred(m, snapshot)}
    for model in models:
        for version in by_policy(model):
            found.setdefault((model.name, version.version), version)
    return found


def _referred(model: Model, snapshot: Snapshot) -> list[ModelVersion]:
    uses = [use for route in snapshot.routes.values() for name, use in models_of(route) if name == model.name]
    resolved = [model.resolve(use) for use in (*uses, *model.aliases)]
    return [version for version in resolved if version is not None]


def by_policy(model: Model) -> list[ModelVersion]:
    """Return the versions a model's policy names, newest first. A version is newer than those listed before it."""
    policy, newest_first = model.version_policy, model.versions[::-1]
    if policy.all:
        return list(newest_first)
    latest = newest_first[: policy.latest] if not policy.specific else ()
    return [v for v in newest_first if v in latest or v.version in policy.specific]


def default_version(model: Model, ready: Collection[str]) -> str | None:
    """Return the version that answers a request which names none: the newest ready one of the policy, else the newest ready one."""
    for version in (*by_policy(model), *reversed(model.versions)):
        if version.version in ready:
            return version.version
    return None


def is_ready(when: Literal["all", "any", "live"], wanted: Collection[Key], entries: Mapping[Key, Entry], *, settled: bool) -> bool:
    """Say whether the worker is ready. `settled`: every version that was wanted when it started has been tried.

    "any" is the default, because a version that cannot be loaded reaches every replica in the same second: under "all", which is Triton's strict
    readiness, one bad publication would take all of them, with every other model, out of their balancer.
    """
    ready = [key for key in wanted if (e := entries.get(key)) is not None and e.state is State.READY]
    match when:
        case "live":
            return True
        case "any":
            return settled and (bool(ready) or not wanted)
        case "all":
            return len(ready) == len(wanted)


def next_step(
    wanted: Mapping[Key, ModelVersion],
    entries: Mapping[Key, Entry],
    now_s: float,
    unload_after_s: float,
    *,
    slots: int = 1,
    held_up: Collection[Key] = (),
    shortfalls: Collection[Need] = (),
) -> Step:
    """Compare what is wanted with what is held; marks in `entries` since when a version is unwanted.

    `slots`: loads that may begin; `held_up`: versions that may not; `shortfalls`: memory that is missing for those of them that would not fit.

    A version that serves is not let go before every wanted version of its model is ready: until then it is the one to fall back on.
    One whose digest is no longer the registry's is let go at once. What was tried least is tried first, so that nothing that keeps
    failing can keep another from its turn.
    """
    unload, unload_again_s = _unwanted(wanted, entries, now_s, unload_after_s)
    unload += [key for key in _room(shortfalls, entries) if key not in unload]
    may_load = {key: version for key, version in wanted.items() if key not in held_up}
    load, load_again_s = _due(may_load, {key: entry for key, entry in entries.items() if key not in unload}, now_s)
    return Step(load=tuple(load[: max(0, slots)]), unload=tuple(unload), again_s=min(unload_again_s, load_again_s))


def _room(shortfalls: Collection[Need], entries: Mapping[Key, Entry]) -> list[Key]:
    """Return versions to unload before their time so that one more version fits: those that nothing refers to any more, the longest
    forgotten first, no more than needed. Nothing where that would not suffice, and never one that stands in for another (such a one is
    not marked as unwanted)."""
    for need in shortfalls:
        lingering = sorted(
            (entry.unwanted_since_s, key, entry.claim.on(need.device))
            for key, entry in entries.items()
            if entry.state is State.READY and entry.unwanted_since_s < NEVER and entry.claim is not None and entry.claim.on(need.device)
        )
        chosen, missing = [], need.size_bytes
        for _, key, size_bytes in lingering:
            if missing > 0:
                chosen.append(key)
                missing -= size_bytes
        if chosen and missing <= 0:
            return chosen
    return []


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
            else:
                again_s = min(again_s, leaves_s)
    return unload, again_s


def _due(wanted: Mapping[Key, ModelVersion], entries: Mapping[Key, Entry], now_s: float) -> tuple[list[Key], float]:
    due: list[Key] = []
    again_s = NEVER
    for key, version in wanted.items():
        tried = entries.get(key)
        if tried is None or (tried.state is State.FAILED and (tried.due_s <= now_s or tried.version != version)):
            due.append(key)
        elif tried.state is State.FAILED:
            again_s = min(again_s, tried.due_s)
    return sorted(due, key=lambda key: _attempts(entries.get(key))), again_s


def _attempts(entry: Entry | None) -> int:
    return 0 if entry is None else entry.attempts


def retry_after_s(attempts: int, first_s: float, most_s: float) -> float:
    """Return how long to wait after so many failed attempts: doubling up to a limit."""
    return min(most_s, first_s * 2.0 ** min(attempts - 1, 30))
