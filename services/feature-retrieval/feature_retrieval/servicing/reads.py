"""The wire work of reading features: GetFeatures, its stream, and what a set yields."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from feature_retrieval import request_features
from feature_retrieval.explanation import Explanation
from feature_retrieval.permissions import check_readable
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.views import Plan, Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import PermissionDenied
from plait.registry.records import Transform
from plait.registry.references import Reference, parse, width_of
from plait.registry.shapes import find, width, wire_type
from plait.rpc import multiplex
from plait.rpc.call import current
from plait.telemetry.tracing import Tracing


class Reads(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands reads to the page."""

    def __init__(
        self, retrieval: Retrieval, explanation: Explanation, plans: Callable[[], Plans], *, max_in_flight: int, tracing: Tracing
    ) -> None:
        self._retrieval = retrieval
        self._explanation = explanation
        self._plans = plans
        self._max_in_flight = max_in_flight
        self._tracing = tracing

    async def GetFeatures(self, request: Any, context: Any) -> Any:
        """One call, one answer."""
        response = pb.GetFeaturesResponse()
        await self._fill(request, response)
        return response

    async def StreamFeatures(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Many calls of a plait service over one stream."""
        if not current().is_service:
            raise PermissionDenied("StreamFeatures is for plait services: call GetFeatures", reason="SERVICE_TOKEN_MISSING")
        await multiplex.serve(
            request_iterator,
            context,
            self._fill,
            pb.StreamFeaturesResponse,
            max_in_flight=self._max_in_flight,
            tracing=self._tracing,
            span_name="plait.api.feature_retrieval.v1.FeatureRetrievalService/GetFeatures",
        )

    async def ExplainFeatures(self, request: Any, context: Any) -> Any:
        """One entity of each type, and all that went into its answer."""
        response = pb.ExplainFeaturesResponse()
        await self._explanation.explain(request, response, current())
        return response

    async def DescribeFeatureSet(self, request: Any, context: Any) -> Any:
        """What a set yields."""
        plans = self._plans()
        plan = plans.get(request.feature_set, ())
        for view in plan.restricted:
            check_readable(view, current())
        response = pb.DescribeFeatureSetResponse(feature_set=request.feature_set, registry_revision=plans.snapshot.revision)
        _describe(plan, plans, response)
        return response

    async def _fill(self, request: Any, response: Any) -> None:
        await self._retrieval.get_features(request, response, current())


def _describe(plan: Plan, plans: Plans, response: Any) -> None:
    request_features.describe(plan.feature_set.request, response.request_features)
    for model_input, tensor in zip(plan.inputs, plan.tensors, strict=False):
        described = response.inputs.add(name=model_input.name, entity_type=model_input.entity, dtype=tensor.number)
        for text in model_input.features:
            reference = parse(text)
            if reference is not None and reference.kind == "stored":
                _describe_stored(reference, plans, described)
            elif reference is not None:
                found = find(reference, plan.feature_set, plans.snapshot.feature_views)
                described.features.add(
                    feature=text,
                    width=width(text, plan.feature_set, plans.snapshot.feature_views) or 0,
                    expression=found.expression if isinstance(found, Transform) else "",
                    description=found.description if found is not None else "",
                )


def _describe_stored(reference: Reference, plans: Plans, described: Any) -> None:
    view = plans.snapshot.feature_views[reference.view].at(reference.version)
    assert view is not None  # noqa: S101  (the plan was compiled from it)
    feature = next(f for f in view.features if f.name == reference.feature)
    described.features.add(
        feature_view=view.name,
        feature=feature.name,
        stored_dtype=wire_type(feature).number,
        default_value=None if feature.default is None or isinstance(feature.default, str) else float(feature.default),
        max_age_s=view.max_age_s,
        description=feature.description,
        width=width_of(feature),
        view_version=view.version,
    )
