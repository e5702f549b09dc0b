"""Who may call the router: keys of the registry's newest snapshot, so that a revoked key is refused as soon as the snapshot is here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from plait.registry.records import ApiKey
from plait.registry.watcher import Watcher
from plait.rpc.credentials import Authenticator
from plait.settings import RpcSettings

SCOPE: Final = "rank"
OTHER_SCOPES: Final = MappingProxyType({"InvalidateCache": "operate"})


def authenticator(settings: RpcSettings, watcher: Watcher) -> Authenticator:
    """Return what the server's interceptor asks about each call."""

    def find_key(sha256: str) -> ApiKey | None:
        return watcher.snapshot.keys.get(sha256)  # the newest snapshot, each time

    return Authenticator(
        find_key,
        service_token=settings.service_token.get_secret_value(),
        required=settings.require_auth,
    )
