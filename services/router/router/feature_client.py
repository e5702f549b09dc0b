"""How the router reads features: GetFeatures over the multiplexed stream, and what its failures mean to a caller of the router."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import Cancelled, InvalidArgument, NotFound, PlaitError, Unavailable
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from plait.telemetry.tracing import Tracing
from router.balancer import Balancer
from router.connections import CallPlan, Connections, framed, lost
from router.discovery.found import Found
from router.endpoints import Transport
from router.route_table import ServingRoute
from router.settings import FeaturesSettings
from router.trail import Trail
from router.transports.plait import PlaitTransport

_METHOD: Final = "plait.api.feature_retrieval.v1.FeatureRetrievalService/GetFeatures"
_STREAM: Final = "/plait.api.feature_retrieval.v1.FeatureRetrievalService/StreamFeatures"
_RETRY_S: Final = 0.25


class Unreachable(Unavailable):
    """No replica of feature-retrieval could be reached."""

    default_reason = "FEATURES_UNAVAILABLE"


class FeatureClient:
    """Calls feature-retrieval."""

    def __init__(self, settings: FeaturesSettings, channel: ChannelSettings, tracing: Tracing | None = None) -> None:
        balancer = Balancer(
            ejection_s=settings.ejection_s, max_ejection_s=settings.max_ejection_s, slow_start_s=settings.slow_start_s, zone=settings.zone
        )
        most = settings.connections

        def opened(address: str, _: object) -> Transport:
            return PlaitTransport(address, _METHOD, _STREAM, pb.StreamFeaturesResponse, channel, most=most, tracing=tracing)

        self._connections = Connections("feature-retrieval", opened, balancer)
        self._connections.adopt(frozenset(Found(address=address) for address in settings.addresses_listed))

    def __repr__(self) -> str:
        return f"<FeatureClient {self._connections!r}>"

    async def get(
        self,
        route: ServingRoute,
        feature_set: str,
        entities: Iterable[tuple[str, types_pb2.EntityIds]],
        inputs: Sequence[str],
        *,
        request_features: Sequence[types_pb2.Tensor] = (),
        lenient: bool = False,
        deadline: Deadline,
        tenant: str,
        request_id: str,
        trail: Trail | None = None,
    ) -> pb.GetFeaturesResponse:
        """Return the tensors of `inputs` (empty = all) of a feature set for these ids and what the caller sent along.

        With a `trail` also how old the rows are, and what was tried. `lenient`: what is missing is missing, whatever the route says of its model's features.

        Raises Unreachable when no replica can be reached, Unavailable (FEATURES_UNAVAILABLE) when none knows the feature set yet.
        FailedPrecondition (FEATURES_MISSING), Unavailable (STORE_UNAVAILABLE), ResourceExhausted and DeadlineExceeded are its own.
        """
        frame = pb.StreamFeaturesRequest()
        request = frame.request
        request.feature_set = feature_set
        request.policy = types_pb2.MISSING_POLICY_DEFAULT if lenient else route.policy
        request.max_defaulted_share = 0 if lenient else route.max_defaulted_share
        request.inputs.extend(inputs)
        request.request_features.extend(request_features)
        request.include_ages = trail is not None
        for entity_type, ids in entities:
            request.entities.add(entity_type=entity_type).ids.CopyFrom(ids)
        plan = CallPlan(what="features", deadline=deadline, tenant=tenant, request_id=request_id, trail=trail)
        try:
            response: pb.GetFeaturesResponse = await self._connections.call(framed(frame, plan), plan, _lags)
        except PlaitError as error:
            raise _to_caller(error) from error
        return response

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()


def _lags(error: PlaitError) -> bool:
    """A replica that has not seen the newest snapshot yet does not know the set; another one may."""
    return isinstance(error, NotFound)


def _to_caller(error: PlaitError) -> PlaitError:
    """Say what happened in terms of the router's caller, who knows neither our token nor our message to feature-retrieval."""
    if lost(error) or isinstance(error, Cancelled):
        return Unreachable("feature-retrieval cannot be reached: retry", retry_after_s=_RETRY_S)
    if isinstance(error, NotFound):
        message = "feature-retrieval does not know the route's feature set yet: retry"
        return Unavailable(message, reason="FEATURES_UNAVAILABLE", retry_after_s=_RETRY_S)
    if isinstance(error, InvalidArgument) and error.reason == "REQUEST_FEATURE_INVALID":
        return InvalidArgument(error.message, reason=error.reason, violations=error.violations)  # fields are called alike here
    if isinstance(error, InvalidArgument):  # ids are all else that came from the caller
        return InvalidArgument(f"feature-retrieval refused the ids: {error.message}", reason=error.reason)
    return error
