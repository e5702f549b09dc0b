"""Which batches may be answered by a recorded graph of a device's work: decided from model.yaml alone, once; pure.

A CUDA graph replays kernels with the very addresses and sizes they were recorded with, which saves their launches one by one
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). So it fits one shape, and nothing in it may depend on values:

- without `batching.buckets` hardly two batches have one shape;
- with row splits how many rows belong to a request is in the values, and how many requests there are changes from batch to batch;
- a variable dimension besides the rows makes shapes without number;
- an AOTInductor package hands its work to threads of its own accounting, which a recording does not allow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from model_worker.packed import Array
from plait.registry.artifact import ArtifactManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`buckets`: row counts for which a graph is recorded; none where `why_not` says why."""

    buckets: frozenset[int]
    why_not: str = ""

    @classmethod
    def of(cls, manifest: ArtifactManifest, buckets: Collection[int]) -> Rule:
        """Read it from what was published; `buckets`: those that batches will be padded to."""
        why_not = _why_not(manifest, buckets)
        return cls(buckets=frozenset() if why_not else frozenset(buckets), why_not=why_not)

    def bucket(self, inputs: Sequence[Array]) -> int:
        """Return the bucket that these inputs fill exactly, whose graph may answer them; 0 where there is none."""
        sizes = {len(array) for array in inputs} if self.buckets else set()
        return sizes.pop() if len(sizes) == 1 and sizes <= self.buckets else 0


def _why_not(manifest: ArtifactManifest, buckets: Collection[int]) -> str:
    if not buckets:
        return "model.yaml names no buckets"
    if manifest.format == "aotinductor":
        return "an AOTInductor package cannot be recorded"
    if manifest.batching.row_splits:
        return "with row splits what is computed depends on their values"
    if any(-1 in spec.shape[1:] or spec.shape[:1] != (-1,) for spec in manifest.inputs):
        return "an input varies in more than its rows, or not in them"
    return ""
