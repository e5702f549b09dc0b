"""InvalidateCache: what somebody knows to be no longer true is forgotten, for the caller's own tenant."""

from __future__ import annotations

from typing import Final

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import PermissionDenied
from plait.rpc.call import Call, current
from router.invalidation import Invalidations, named
from router.shared_invalidations import SharedInvalidations
from router.validation import check_invalidation

SCOPES: Final = frozenset({"operate", "admin"})


class Invalidating:
    """Answers InvalidateCache. `shared` tells the other routers; None where there is nothing to tell them by."""

    def __init__(self, invalidations: Invalidations, shared: SharedInvalidations | None = None) -> None:
        self._invalidations = invalidations
        self._shared = shared

    async def invalidate(self, request: pb.InvalidateCacheRequest) -> pb.InvalidateCacheResponse:
        """Forget what a request names. Raises PermissionDenied (SCOPE_MISSING), InvalidArgument, Unavailable (INVALIDATION_NOT_SHARED)."""
        call = current()
        _check_may(call)
        check_invalidation(request)
        self._invalidations.tell(named(call.tenant, request))
        if self._shared is not None:
            await self._shared.tell(call.tenant, request)
        return pb.InvalidateCacheResponse()


def _check_may(call: Call) -> None:
    if not (call.is_service or call.scopes & SCOPES):
        raise PermissionDenied(
            "forgetting cached answers needs a key with the scope 'operate' (or 'admin'): ask for one that has it", reason="SCOPE_MISSING"
        )
