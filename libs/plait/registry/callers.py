"""Who may call a service: what its settings and the newest snapshot of the registry say, so that who is taken out is refused at once."""

from __future__ import annotations

from plait.registry.records import EMPTY, ApiKey, Snapshot
from plait.registry.watcher import Watcher
from plait.rpc.credentials import Authenticator
from plait.rpc.identity.workloads import Workloads
from plait.settings import RpcSettings


def authenticator(settings: RpcSettings, watcher: Watcher) -> Authenticator:
    """Return what a server's interceptor asks about each call."""
    known = _Known()
    tokens = None
    if settings.jwt.issuers:
        from plait.rpc.identity.tokens import Tokens  # noqa: PLC0415  (its libraries are loaded only where tokens are taken)

        tokens = Tokens(settings.jwt.issuers)

    def find_key(sha256: str) -> ApiKey | None:
        return watcher.snapshot.keys.get(sha256)  # the newest snapshot, each time

    return Authenticator(
        find_key,
        service_token=settings.service_token.get_secret_value(),
        required=settings.require_auth,
        workloads=lambda: known.of(watcher.snapshot),
        tokens=tokens,
        trusted_proxies=settings.trusted_proxies,
    )


class _Known:
    """The identities of the snapshot asked of last, compiled."""

    def __init__(self) -> None:
        self._snapshot = EMPTY
        self._workloads = Workloads()

    def of(self, snapshot: Snapshot) -> Workloads:
        if snapshot is not self._snapshot:
            self._workloads = Workloads(snapshot.tenants.values())
            self._snapshot = snapshot
        return self._workloads
