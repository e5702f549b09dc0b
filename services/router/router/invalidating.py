"""InvalidateCache: what somebody knows to be no longer true is forgotten, for the caller's own tenant."""

from __future__ import annotations

from plait.api.router.v1 import router_service_pb2 as pb
from plait.rpc.call import current
from router.invalidation import Invalidations, named
from router.shared_invalidations import SharedInvalidations
from router.validation import check_invalidation


class Invalidating:
    """Answers InvalidateCache; who may call is for `auth` to say. `shared` tells the other routers; None where there is nothing to tell them by."""

    def __init__(self, invalidations: Invalidations, shared: SharedInvalidations | None = None) -> None:
        self._invalidations = invalidations
        self._shared = shared

    async def invalidate(self, request: pb.InvalidateCacheRequest) -> pb.InvalidateCacheResponse:
        """Forget what a request names. Raises InvalidArgument, Unavailable (INVALIDATION_NOT_SHARED)."""
        tenant = current().tenant
        check_invalidation(request)
        self._invalidations.tell(named(tenant, request))
        if self._shared is not None:
            await self._shared.tell(tenant, request)
        return pb.InvalidateCacheResponse()
