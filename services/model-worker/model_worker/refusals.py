"""Why a model cannot answer now, in the words a caller can act on. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from model_worker import memory
from model_worker.lifecycle import Entry, Key, State
from plait.errors import FailedPrecondition, NotFound, PlaitError, Unavailable
from plait.registry.records import Snapshot

_LOADING_RETRY_S: Final = 0.25
_LISTED: Final = 10
_SHOWN_CHARS: Final = 80  # of what a caller calls a model: messages travel in headers, which are small


def why_not(
    model: str, version: str, snapshot: Snapshot, wanted: Collection[Key], entries: Mapping[Key, Entry], now_s: float
) -> PlaitError:
    """Return the error for a request that no ready version can answer; `version` may be empty.

    NotFound (MODEL_NOT_FOUND, MODEL_NOT_SERVED); Unavailable with a time to retry (MODEL_LOADING, MODEL_QUARANTINED); FailedPrecondition
    (MODEL_FAILED, MEMORY_EXCEEDED). Of several versions the most hopeful speaks: one that loads, then one that is in quarantine.
    """
    shown = model[:_SHOWN_CHARS]
    name = f"{shown} version {version[:_SHOWN_CHARS]}" if version else shown
    awaited = [entries.get(key) for key in wanted if key[0] == model and version in ("", key[1])]
    out = [e for key, e in entries.items() if key[0] == model and version in ("", key[1]) and e.state is State.QUARANTINED]
    if any(entry is None or entry.error is None for entry in awaited):
        return Unavailable(f"{name} is being loaded: retry", reason="MODEL_LOADING", retry_after_s=_LOADING_RETRY_S)
    for entry in (*out, *awaited):
        if entry is not None and isinstance(entry.error, Unavailable) and entry.breaker is not None:
            retry_s = entry.breaker.retry_after_s(now_s)
            return Unavailable(entry.error.message, reason=entry.error.reason, retry_after_s=retry_s)
    errors = [entry.error for entry in awaited if entry is not None and entry.error is not None]
    if errors:
        return _failed(name, errors[-1])
    return _unknown(name, model, version, snapshot)


def quarantined(model: str, version: str, reason: str) -> Unavailable:
    """Return what a version that was taken out says of itself."""
    return Unavailable(
        f"{model} version {version} is in quarantine: {reason}; it is tested again before it serves: retry later or ask for another version",
        reason="MODEL_QUARANTINED",
    )


def explained(error: PlaitError) -> PlaitError:
    """Return the error with what was found in its message: RepositoryIndex and the log have room for one sentence only."""
    found = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in error.violations[:3])
    return type(error)(f"{error.message}: {found}", reason=error.reason) if found else error


def _failed(name: str, error: PlaitError) -> PlaitError:
    reason = memory.REASON if error.reason == memory.REASON else "MODEL_FAILED"
    return FailedPrecondition(f"{name} could not be loaded: {error.message} ({error.reason})", reason=reason)


def _unknown(name: str, model: str, version: str, snapshot: Snapshot) -> PlaitError:
    known = snapshot.models.get(model)
    if known is None:
        names = ", ".join(sorted(snapshot.models)[:_LISTED]) or "none"
        found = f"{name} is not in the registry" if model else "its name is empty"
        return NotFound(f"Request for unknown model: {found}; models the registry has: {names}", reason="MODEL_NOT_FOUND")
    if not any(version in ("", v.version) for v in known.versions):
        newest = ", ".join(v.version for v in known.versions[: -_LISTED - 1 : -1]) or "none"
        return NotFound(
            f"Request for unknown model: {name} is not in the registry; versions it has, newest first: {newest}", reason="MODEL_NOT_FOUND"
        )
    return NotFound(
        f"Request for unknown model: {name} is not served here: no route, alias or version policy refers to it, or it was unloaded",
        reason="MODEL_NOT_SERVED",
    )
