"""Counters of a fleet are sums, its index a union, whatever the order."""

from hypothesis import given
from hypothesis import strategies as st

from plait.api.inference.v2 import inference_pb2 as pb
from router.fleet_statistics import summed, united

COUNTS = st.integers(0, 2**40)


@st.composite
def statistics(draw: st.DrawFn) -> pb.ModelStatisticsResponse:
    answer = pb.ModelStatisticsResponse()
    for name, version in draw(st.sets(st.tuples(st.sampled_from("ab"), st.sampled_from("12")))):
        one = answer.model_stats.add(name=name, version=version, last_inference=draw(COUNTS), inference_count=draw(COUNTS))
        one.inference_stats.success.count = draw(COUNTS)
        one.inference_stats.queue.ns = draw(COUNTS)
        for size in draw(st.sets(st.integers(1, 3))):
            one.batch_stats.add(batch_size=size).compute_infer.count = draw(COUNTS)
    return answer


@given(st.lists(statistics(), max_size=5))
def test_statistics_are_sums(answers: list[pb.ModelStatisticsResponse]) -> None:
    found = summed(answer.SerializeToString() for answer in answers)
    every = [one for answer in answers for one in answer.model_stats]
    assert [(one.name, one.version) for one in found.model_stats] == sorted({(one.name, one.version) for one in every})
    for one in found.model_stats:
        same = [other for other in every if (other.name, other.version) == (one.name, one.version)]
        assert one.last_inference == max(other.last_inference for other in same)
        assert one.inference_count == sum(other.inference_count for other in same)
        assert one.inference_stats.success.count == sum(other.inference_stats.success.count for other in same)
        assert one.inference_stats.queue.ns == sum(other.inference_stats.queue.ns for other in same)
        assert not one.inference_stats.HasField("cache_hit")
        batches = {batch.batch_size: batch.compute_infer.count for batch in one.batch_stats}
        assert len(batches) == len(one.batch_stats)
        for size, count in batches.items():
            assert count == sum(batch.compute_infer.count for other in same for batch in other.batch_stats if batch.batch_size == size)


def index(*models: tuple[str, str, str]) -> bytes:
    made = pb.RepositoryIndexResponse()
    for name, version, state in models:
        made.models.add(name=name, version=version, state=state)
    return made.SerializeToString()


def test_an_index_is_a_union_in_which_ready_wins() -> None:
    some = index(("a", "1", "LOADING"), ("a", "2", "READY"), ("b", "", "UNAVAILABLE"), ("c", "", "UNAVAILABLE"))
    others = index(("a", "1", "READY"), ("a", "2", "UNAVAILABLE"), ("b", "1", "LOADING"))
    for order in ((some, others), (others, some)):
        assert [(one.name, one.version, one.state) for one in united(order).models] == [
            ("a", "1", "READY"),
            ("a", "2", "READY"),
            ("b", "1", "LOADING"),
            ("c", "", "UNAVAILABLE"),
        ]
    assert not united([]).models
