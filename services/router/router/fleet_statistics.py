"""What every worker says for itself, said for all of them: counters are sums, an index is a union. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from plait.api.inference.v2 import inference_pb2 as pb

_READY: Final = "READY"
_BATCH_PARTS: Final = ("compute_input", "compute_infer", "compute_output")


def summed(answers: Iterable[bytes]) -> pb.ModelStatisticsResponse:
    """Return the sums of serialized ModelStatisticsResponses by model and version, ordered by them; of `last_inference` the latest."""
    found: dict[tuple[str, str], Any] = {}
    for answer in answers:
        for one in pb.ModelStatisticsResponse.FromString(answer).model_stats:
            into = found.setdefault((one.name, one.version), pb.ModelStatistics(name=one.name, version=one.version))
            into.last_inference = max(into.last_inference, one.last_inference)
            into.inference_count += one.inference_count
            into.execution_count += one.execution_count
            _add_durations(into.inference_stats, one.inference_stats, (field.name for field in one.inference_stats.DESCRIPTOR.fields))
            _add_batches(into, one)
    return pb.ModelStatisticsResponse(model_stats=[found[key] for key in sorted(found)])


def united(answers: Iterable[bytes]) -> pb.RepositoryIndexResponse:
    """Return the union of serialized RepositoryIndexResponses, ordered by model and version: ready where anybody has it ready."""
    found: dict[tuple[str, str], Any] = {}
    for answer in answers:
        for one in pb.RepositoryIndexResponse.FromString(answer).models:
            if one.state == _READY or (one.name, one.version) not in found:
                found[one.name, one.version] = one
    held = {name for name, version in found if version}
    listed = [key for key in sorted(found) if key[1] or key[0] not in held]  # who holds no version of a model names it without one
    return pb.RepositoryIndexResponse(models=[found[key] for key in listed])


def _add_batches(into: Any, one: Any) -> None:
    by_size = {batch.batch_size: batch for batch in into.batch_stats}
    for batch in one.batch_stats:
        known = by_size.get(batch.batch_size)
        if known is None:
            known = by_size[batch.batch_size] = into.batch_stats.add(batch_size=batch.batch_size)
        _add_durations(known, batch, _BATCH_PARTS)


def _add_durations(into: Any, one: Any, names: Iterable[str]) -> None:
    for name in names:
        if one.HasField(name):
            duration, more = getattr(into, name), getattr(one, name)
            duration.count += more.count
            duration.ns += more.ns
