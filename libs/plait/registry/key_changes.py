"""What becomes of an API key when it is made, rotated or revoked; decided here, written by `store`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Final

from plait.errors import InvalidArgument
from plait.registry.records import ApiKey
from plait.registry.resources import Change
from plait.rpc.credentials import new_key

MAX_NOTE_BYTES: Final = 256


def check_note(note: str) -> None:
    """Raise InvalidArgument (NOTE_TOO_LONG)."""
    if len(note.encode()) > MAX_NOTE_BYTES or "\0" in note:
        raise InvalidArgument(f"a key's note has at most {MAX_NOTE_BYTES} bytes, and no NUL among them", reason="NOTE_TOO_LONG")


def new(
    tenant: str, scopes: Sequence[str], *, now_s: float, expires_at: float = 0.0, note: str = "", replaces: str = ""
) -> tuple[ApiKey, str]:
    """Return a key and its secret. Times are seconds since the epoch."""
    secret, sha256 = new_key()
    key = ApiKey(
        id=f"key-{secrets.token_hex(6)}",
        tenant=tenant,
        sha256=sha256,
        scopes=tuple(dict.fromkeys(scopes)),
        expires_at=expires_at,
        created_at=round(now_s, 6),  # as precise as Postgres keeps it
        replaces=replaces,
        note=note,
    )
    return key, secret


def successor(old: ApiKey, *, now_s: float) -> tuple[ApiKey, str]:
    """Return the key that replaces another, and its secret: it may do the same, for as long as the old one was made for."""
    expires_at = now_s + (old.expires_at - old.created_at) if old.expires_at else 0.0
    return new(old.tenant, old.scopes, now_s=now_s, expires_at=expires_at, note=old.note, replaces=old.id)


def shortened(key: ApiKey, at_s: float) -> ApiKey:
    """Return the key with an end no later than that."""
    return dataclasses.replace(key, expires_at=min(at_s, key.expires_at or at_s))


def logged(before: ApiKey | None, after: ApiKey | None, generation: int, revision: int, actor: str, reason: str) -> Change:
    """Describe a key's coming, change or going for the audit log."""
    return Change(
        action="created" if before is None else "deleted" if after is None else "updated",
        kind="ApiKey",
        name=next(key.id for key in (before, after) if key is not None),
        generation=generation,
        revision=revision,
        before=_described(before),
        after=_described(after),
        actor=actor,
        reason=reason,
    )


def _described(key: ApiKey | None) -> dict[str, Any] | None:
    """Its hash is nobody's business."""
    if key is None:
        return None
    told = {"tenant": key.tenant, "scopes": [*key.scopes], "expires_at": key.expires_at, "note": key.note, "replaces": key.replaces}
    return {name: value for name, value in told.items() if value or name not in {"note", "replaces"}}
