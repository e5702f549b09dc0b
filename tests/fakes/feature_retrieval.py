"""A feature-retrieval that speaks the real wire and answers from a formula, with faults to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import PlaitError
from plait.rpc import multiplex
from plait.rpc.call import Call, current
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings

SERVICE = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name


def number_of(identifier: str | int) -> float:
    """The value a fake row is made of: the digits of a string id, or the id itself."""
    return float(identifier) if isinstance(identifier, int) else float("".join(c for c in identifier if c.isdigit()) or 0)


class FakeFeatureRetrieval(pb_grpc.FeatureRetrievalServiceServicer):
    """Each input is [ids, columns] of float32: the number of the id, then zeros. `inputs` maps an input to (entity type, columns).

    Faults: `error` is raised instead of an answer; `gate` is waited for before one; `statuses` counts rows as of that status. Every row is `age_us`
    old, where that is asked.
    """

    def __init__(self, inputs: dict[str, tuple[str, int]], *, token: str = "the-token", port: int = 0, instant: bool = False) -> None:
        self.inputs = inputs
        self.calls: list[Call] = []
        self.requests: list[pb.GetFeaturesRequest] = []
        self.error: PlaitError | None = None
        self.gate: asyncio.Event | None = None
        self.statuses: dict[int, int] = {}
        self.age_us = 2_000_000
        self.cancelled = 0
        self._instant = instant
        self._cache: dict[int, pb.GetFeaturesResponse] = {}
        settings = RpcSettings(grace_s=0, port=port)
        self.server = RpcServer(settings, authenticator=Authenticator(lambda _: None, service_token=token))
        self.server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, self, SERVICE, scope="features")

    async def __aenter__(self) -> FakeFeatureRetrieval:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.drain()

    @property
    def address(self) -> str:
        return self.server.address

    async def StreamFeatures(self, requests: AsyncIterator[Any], context: Any) -> None:
        await multiplex.serve(requests, context, self.fill, pb.StreamFeaturesResponse)

    async def fill(self, request: Any, response: Any) -> None:
        if self._instant:
            self._fill_at_once(request, response)
            return
        self.calls.append(current())
        self.requests.append(request)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.error is not None:
            raise self.error
        self._fill(request, response)

    def _fill(self, request: Any, response: Any) -> None:
        ids = {entity.entity_type: _ids(entity.ids) for entity in request.entities}
        wanted = list(request.inputs) or list(self.inputs)
        for name in wanted:
            entity, columns = self.inputs[name]
            rows = np.zeros((len(ids[entity]), columns), "<f4")
            rows[:, 0] = [number_of(i) for i in ids[entity]]
            response.tensors.add(name=name, dtype=types_pb2.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
        for entity, listed in ids.items():
            counts = [0] * 8
            for status, count in self.statuses.items():
                counts[status] = min(count, len(listed))
            counts[types_pb2.ROW_STATUS_PRESENT] = len(listed) - sum(counts)
            view = response.views.add(feature_view=f"{entity}-view", entity_type=entity, statuses=bytes([1]) * len(listed))
            view.status_counts.extend(counts)
            if request.include_ages:
                view.ages_us = np.array([self.age_us] * len(listed), "<i8").tobytes()
        response.store_us = 321

    def _fill_at_once(self, request: Any, response: Any) -> None:
        """For measuring what is in front of it: the answer for so many rows is made once."""
        rows = sum(len(e.ids.string_ids) + len(e.ids.int64_ids) for e in request.entities)
        if rows not in self._cache:
            made = pb.GetFeaturesResponse()
            self._fill(request, made)
            self._cache[rows] = made
        response.CopyFrom(self._cache[rows])


def _ids(ids: types_pb2.EntityIds) -> Sequence[str | int]:
    """Composite ids count by their last part, a number."""
    return [*ids.string_ids, *ids.int64_ids, *(key.parts[-1].int64_part for key in ids.composite_ids)]
