"""Which batches a recorded graph may answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model_worker.backends.graphs import Rule
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=(-1, 4))


def manifest(*inputs: TensorSpec, format_: Any = "torch_export", **batching: Any) -> ArtifactManifest:
    return ArtifactManifest(name="m", format=format_, entry="m", inputs=inputs or (X,), outputs=(X,), batching=Batching(**batching))


def rows(*counts: int) -> list[Any]:
    return [np.zeros((count, 4), np.float32) for count in counts]


def test_a_full_bucket_has_a_graph_and_nothing_else_has() -> None:
    rule = Rule.of(manifest(X, TensorSpec(name="z", dtype="int64", shape=(-1, 2, 2))), (8, 64))
    assert [rule.bucket(rows(n, n)) for n in (8, 64, 7, 9, 0)] == [8, 64, 0, 0, 0]
    assert rule.bucket(rows(8, 64)) == 0
    assert rule.bucket([]) == 0


@pytest.mark.parametrize(
    ("said", "buckets", "why_not"),
    [
        (manifest(), (), "no buckets"),
        (manifest(format_="aotinductor"), (8,), "AOTInductor"),
        (manifest(TensorSpec(name="u", dtype="float32", shape=(1, 4), per="request"), X, row_splits="s"), (8,), "row splits"),
        (manifest(TensorSpec(name="x", dtype="float32", shape=(-1, -1))), (8,), "varies"),
        (manifest(TensorSpec(name="x", dtype="float32", shape=(8, 4))), (8,), "varies"),
    ],
)
def test_a_model_that_no_graph_fits_says_why(said: ArtifactManifest, buckets: tuple[int, ...], why_not: str) -> None:
    rule = Rule.of(said, buckets)
    assert why_not in rule.why_not
    assert rule.bucket(rows(8)) == 0
