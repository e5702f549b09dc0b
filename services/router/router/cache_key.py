"""What makes two questions the same: everything that an answer depends on, and nothing that it does not.

The tenant comes first, model and version are in every key, and so is all that the registry says about how the answer is made. A part that
is new to a manifest is taken for one that matters until `_DECIDED_BEFORE` says otherwise: too narrow a key only costs hits.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from plait.api.router.v1 import router_service_pb2 as pb
from plait.registry.records import EMPTY, ModelVersion, Route, Snapshot
from plait.registry.shapes import SetShape
from router.question import Question
from router.route_table import Arm

KEY_BYTES: Final = 16
_SIZE: Final = struct.Struct("<q")
_PLAIN: Final = Route(name="plain", variants=())
# What decides which variant answers, when, and how often it is tried: the variant itself is in the key.
_DECIDED_BEFORE: Final = {
    name: getattr(_PLAIN, name)
    for name in (
        "cache", "description", "hedge", "max_candidates", "priority", "repeat_window_s", "retry", "rules", "shadow", "sticky", "tenants",
        "timeout_s", "variants",
    )
}  # fmt: skip


class Keys:
    """Makes keys of questions, under the `snapshot` that was adopted last."""

    def __init__(self) -> None:
        self.snapshot = EMPTY
        self._worlds: dict[tuple[str, str, str, str, str], Any] = {}

    def adopt(self, snapshot: Snapshot) -> None:
        """Make keys by a new snapshot from now on."""
        self.snapshot = snapshot
        self._worlds = {}

    def of_subject(self, question: Question) -> bytes:
        """Return the key of all questions about a subject that differ in their candidates only; features of their own are not looked at."""
        subject = question.request.subject.SerializeToString() if isinstance(question.request, pb.RankRequest) else b""
        return self._key(question, [b"subject", subject])

    def of(self, question: Question) -> bytes:
        """Return the key of a question."""
        return self._key(question, _asked(question.request))

    def _key(self, question: Question, asked: Iterable[bytes]) -> bytes:
        arm = question.arm
        which = (question.tenant, question.route.name, arm.name, arm.model, arm.version)
        world = self._worlds.get(which)
        if world is None:
            world = self._worlds[which] = hashlib.blake2b(_joined(self._world(question)), digest_size=KEY_BYTES)
        key = world.copy()
        key.update(_joined(asked))
        digest: bytes = key.digest()
        return digest

    def _world(self, question: Question) -> Iterator[bytes]:
        """Yield all but what the caller sent."""
        tenant, arm, snapshot = question.tenant, question.arm, self.snapshot
        route = snapshot.routes.get(question.route.name, _PLAIN)
        variant = next((variant for variant in route.variants if variant.name == arm.name), None)
        for part in (tenant, route.name, arm.name, arm.model, arm.version):
            yield part.encode()
        yield repr(replace(route, **_DECIDED_BEFORE)).encode()
        yield repr(replace(variant, weight=1.0) if variant else None).encode()
        retriever = _retriever(route, snapshot)
        yield repr(retriever).encode()
        for name in sorted(_feature_sets(route, arm, retriever)):
            feature_set = snapshot.feature_sets.get(name)
            yield repr(feature_set).encode()
            if feature_set is not None:
                shape = SetShape(feature_set, snapshot.feature_views)
                for view in {view.name: view for item in feature_set.inputs for view in shape.views_of(item)}.values():
                    yield repr(view).encode()
                    yield repr(snapshot.epochs_of(tenant, view.name, view.version).serving).encode()


def _retriever(route: Route, snapshot: Snapshot) -> ModelVersion | None:
    """Return the version that finds candidates: its alias may move while the manifest stays."""
    retrieve = route.stages.retrieve if route.stages else None
    model = snapshot.models.get(retrieve.model) if retrieve else None
    return model.resolve(retrieve.use) if model and retrieve else None


def _feature_sets(route: Route, arm: Arm, retriever: ModelVersion | None) -> set[str]:
    found = {arm.feature_set}
    if route.stages and route.stages.rules:
        found.add(route.stages.rules)
    if retriever is not None and retriever.signature is not None:
        found.add(retriever.signature.feature_set)
    return found


def _asked(request: pb.RankRequest | pb.PredictRequest) -> list[bytes]:
    """Return what the caller sent, but for what cannot change the answer: who asked when, under which id."""
    if isinstance(request, pb.RankRequest):
        asked = [b"rank", _SIZE.pack(request.top_k), request.subject.SerializeToString(), request.candidates.SerializeToString()]
    else:
        asked = [b"predict", _joined([name.encode() for name in request.outputs])]
        asked.append(_joined([entity.SerializeToString() for entity in request.entities]))
    for tensors in (request.inline_features, request.request_features):
        asked.append(_joined([tensor.SerializeToString() for tensor in tensors]) if tensors else b"")
    return asked


def _joined(parts: Iterable[bytes]) -> bytes:
    """Return parts that cannot run into each other: each after its length."""
    pieces: list[bytes] = []
    for part in parts:
        pieces += (_SIZE.pack(len(part)), part)
    return b"".join(pieces)
