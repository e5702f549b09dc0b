"""InvalidateCache: what somebody knows to be no longer true is forgotten, for the caller's own tenant."""

from __future__ import annotations

from typing import Final

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import PermissionDenied
from plait.rpc.call import Call, current
from router.invalidation import Invalidations, Named
from router.validation import Ids, check_invalidation

SCOPES: Final = frozenset({"operate", "admin"})


class Invalidating:
    """Answers InvalidateCache."""

    def __init__(self, invalidations: Invalidations) -> None:
        self._invalidations = invalidations

    async def invalidate(self, request: pb.InvalidateCacheRequest) -> pb.InvalidateCacheResponse:
        """Forget what a request names. Raises PermissionDenied (SCOPE_MISSING), InvalidArgument."""
        call = current()
        _check_may(call)
        ids = check_invalidation(request)
        self._invalidations.tell(_named(call.tenant, request, ids))
        return pb.InvalidateCacheResponse()


def _check_may(call: Call) -> None:
    if not (call.is_service or call.scopes & SCOPES):
        raise PermissionDenied(
            "forgetting cached answers needs a key with the scope 'operate' (or 'admin'): ask for one that has it", reason="SCOPE_MISSING"
        )


def _named(tenant: str, request: pb.InvalidateCacheRequest, ids: Ids) -> list[Named]:
    named: list[Named] = []
    if request.route:
        named.append(((tenant, "route", ""), [request.route]))
    if request.model:
        named.append(((tenant, "model", ""), [request.model]))
    if ids:
        named.append(((tenant, "entity", request.items.entity_type), ids))
    return named
