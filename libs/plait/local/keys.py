"""The secrets of a local mesh: made on its first start, kept in its state folder, checked against the registry on each."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from typing import Final

from plait.local.state import StateFolder, write_private
from plait.registry.manifests import Manifest
from plait.registry.records import Tenant
from plait.registry.store import Store
from plait.rpc.credentials import digest
from plait.rpc.identity.roles import SCOPES, granted

TENANT: Final = "default"
ACTOR: Final = "plait up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """`api_key`: for callers, with every scope; `service_token`: for the services among themselves; `privacy_key`: signs erasures."""

    api_key: str = ""
    service_token: str = ""
    privacy_key: str = ""


async def prepare(store: Store, state: StateFolder) -> Keys:
    """Migrate the registry and see that the default tenant, a valid API key and the service token exist; return the secrets."""
    await store.migrate()
    await store.apply([Manifest(record=Tenant(name=TENANT))], actor=ACTOR, reason="the tenant of a local mesh")
    known = _read(state)
    keys = Keys(
        api_key=await _api_key(store, known.api_key),
        service_token=known.service_token or secrets.token_urlsafe(32),
        privacy_key=known.privacy_key or secrets.token_urlsafe(32),
    )
    if keys != known:
        write_private(state.credentials, asdict(keys))
    return keys


def privacy_key_on(state: StateFolder) -> str:
    """Return the key that signs the erasures of the mesh on a state folder, empty where there never was one."""
    return _read(state).privacy_key


async def _api_key(store: Store, known: str) -> str:
    """Return the key of the last time if the registry still takes it, else a new one."""
    valid = {key.sha256 for key in await store.list_keys(TENANT) if granted(key.scopes).issuperset(SCOPES) and not key.expires_at}
    if known and digest(known) in valid:
        return known
    _, secret = await store.create_key(TENANT, SCOPES, actor=ACTOR, reason="the key of a local mesh")
    return secret


def _read(state: StateFolder) -> Keys:
    """Return the keys of the last time; what cannot be read is made anew."""
    try:
        document = json.loads(state.credentials.read_text(encoding="utf-8"))
        made_later = str(document.get("privacy_key", ""))
        return Keys(api_key=str(document["api_key"]), service_token=str(document["service_token"]), privacy_key=made_later)
    except (OSError, ValueError, KeyError, TypeError):
        return Keys()
