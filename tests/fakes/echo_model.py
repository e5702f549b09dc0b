"""A model of every element type that answers what it is asked: what the wire does to values is seen, whatever library runs models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tests.fakes.worker_world import GatedLoader

from model_worker.artifacts import Artifact, Sample
from model_worker.latency import LatencyModel
from model_worker.proof import Proven
from model_worker.ragged import Layout
from model_worker.schedule import Limits
from model_worker.served import Admit, Prepared
from plait.dtypes import BY_NAME
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Model, ModelVersion, Signature, TensorSpec

_SCHEME = "echo:"


class Echo:
    """y = x."""

    platform = "echo"
    memory_bytes = 0

    def prepare_thread(self) -> None:
        """Nothing to do."""

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return [np.array(array) for array in inputs]

    def close(self) -> None:
        """Nothing to give back."""


class EchoLoader(GatedLoader):
    """The loader of the world, which also loads echoes."""

    def prepare(self, version: ModelVersion, admit: Admit = lambda *_: None) -> Prepared:
        if not version.artifact.startswith(_SCHEME):
            return super().prepare(version, admit)
        dtype: Any = version.artifact.removeprefix(_SCHEME)
        tensors = [TensorSpec(name=name, dtype=dtype, shape=(-1, 2)) for name in "xy"]
        manifest = ArtifactManifest(name="echo", format="onnx", entry="none", inputs=(tensors[0],), outputs=(tensors[1],))
        proven = Proven(joins=True, splits=True, latency=LatencyModel())
        limits = Limits(max_rows=64, max_queue_rows=256, margin_s=0.0, joins=True, splits=True)
        layout = Layout.of(Signature(inputs=manifest.inputs, outputs=manifest.outputs), manifest.batching)
        return Prepared(
            manifest=manifest,
            models=(Echo(),),
            layout=layout,
            proven=proven,
            limits=limits,
            labels=MappingProxyType({}),
            artifact=Artifact(
                manifest=manifest,
                folder=Path(),
                sample=Sample(inputs=(np.zeros((1, 2), BY_NAME[dtype].numpy),), outputs=None, tolerance=0.0),
            ),
        )


def echo_models() -> list[Model]:
    """Return "echo-<dtype>" for every element type: [rows, 2] in and out."""
    return [Model(name=f"echo-{dtype}", versions=(ModelVersion(version="1", artifact=_SCHEME + dtype),)) for dtype in BY_NAME]
