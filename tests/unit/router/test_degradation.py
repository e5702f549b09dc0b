"""What stands in for features that cannot be had, and the words that say so."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import snapshot

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.records import Feature
from router import degradation
from router.route_table import Input, compile_table

WORDS = {
    types_pb2.ROW_STATUS_DEFAULTED: "features_defaulted",
    types_pb2.ROW_STATUS_NOT_FOUND: "features_defaulted",
    types_pb2.ROW_STATUS_STALE: "features_stale",
    types_pb2.ROW_STATUS_TIMED_OUT: "features_timed_out",
    types_pb2.ROW_STATUS_UNAVAILABLE: "features_unavailable",
}
ORDER = ["features_defaulted", "features_stale", "features_timed_out", "features_unavailable"]
STATUSES = sorted(types_pb2.RowStatus.values())


def view(name: str = "item-view", **counts: int) -> features_pb.ViewReport:
    """A report with so many rows of each status, named as in the proto without its prefix."""
    listed = [0] * len(STATUSES)
    for status, count in counts.items():
        listed[types_pb2.RowStatus.Value(f"ROW_STATUS_{status.upper()}")] = count
    return features_pb.ViewReport(feature_view=name, statuses=bytes(sum(listed)), status_counts=listed)


def inputs() -> tuple[Input, ...]:
    """The inputs of the test's ranker: users default to 0.5 and nothing, items to 1.5, nothing and -2."""
    world = snapshot()
    user, item = world.feature_views["user-view"], world.feature_views["item-view"]
    user = replace(user, features=(Feature(name="f0", default=0.5), Feature(name="f1")))
    item = replace(item, features=(Feature(name="f0", default=1.5), Feature(name="f1"), Feature(name="f2", default=-2)))
    world = replace(world, feature_views={"user-view": user, "item-view": item})
    return compile_table(world).find("home", "shop").arms[0].inputs


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_has_its_word_or_is_as_good_as_it_gets(status: int) -> None:
    counts = [0] * len(STATUSES)
    counts[status] = 1
    word = {int(known): text for known, text in WORDS.items()}.get(status)
    assert degradation.reasons([features_pb.ViewReport(status_counts=counts)]) == ([word] if word else [])


@given(st.lists(st.lists(st.integers(0, 3), max_size=len(STATUSES) + 3), max_size=5))
def test_each_word_once_and_always_in_the_same_order(views: list[list[int]]) -> None:
    expected = {WORDS[s] for s in WORDS for counts in views if len(counts) > s and counts[s]}
    words = degradation.reasons([features_pb.ViewReport(status_counts=counts) for counts in views])
    assert words == [word for word in ORDER if word in expected]


def test_no_views_no_reasons() -> None:
    assert degradation.reasons([]) == []


def test_the_report_counts_rows_by_how_they_were_found() -> None:
    answer = pb.RankResponse()
    counts = {"present": 1, "null": 2, "defaulted": 3, "not_found": 4, "stale": 5, "timed_out": 6, "unavailable": 7}
    degradation.report([view("a", **counts), view("b", present=9)], answer.feature_report)
    first, second = answer.feature_report
    assert {field.name: value for field, value in first.ListFields()} == {"feature_view": "a", "rows": 28, **counts}
    assert {field.name: value for field, value in second.ListFields()} == {"feature_view": "b", "rows": 9, "present": 9}


def test_a_report_of_another_release_with_fewer_or_more_statuses_is_read_all_the_same() -> None:
    answer = pb.RankResponse()
    short = features_pb.ViewReport(feature_view="a", statuses=b"\1", status_counts=[0, 1])
    long = features_pb.ViewReport(feature_view="b", statuses=b"\1", status_counts=[0, 1, *[0] * 6, 5])
    degradation.report([short, long, features_pb.ViewReport(feature_view="c")], answer.feature_report)
    assert [(r.feature_view, r.present, r.unavailable) for r in answer.feature_report] == [("a", 1, 0), ("b", 1, 0), ("c", 0, 0)]


@pytest.mark.parametrize("status", [types_pb2.ROW_STATUS_TIMED_OUT, types_pb2.ROW_STATUS_UNAVAILABLE])
def test_defaults_are_what_feature_retrieval_would_answer_and_say_why(status: types_pb2.RowStatus.ValueType) -> None:
    answer = degradation.defaults(inputs(), {"user": 1, "item": 2}, status)
    tensors = {t.name: np.frombuffer(t.data, "<f4").reshape(tuple(t.shape)) for t in answer.tensors}
    assert {t.dtype for t in answer.tensors} == {types_pb2.DATA_TYPE_FLOAT32}
    np.testing.assert_array_equal(tensors["user"], [[0.5, math.nan]])
    np.testing.assert_array_equal(tensors["item"], [[1.5, math.nan, -2.0]] * 2)
    assert [(v.feature_view, v.entity_type, v.statuses) for v in answer.views] == [
        ("user-view", "user", bytes([status])),
        ("item-view", "item", bytes([status] * 2)),
    ]
    assert degradation.reasons(answer.views) == [WORDS[status]]
    told = pb.RankResponse()
    degradation.report(answer.views, told.feature_report)
    assert [(r.rows, r.present, r.timed_out + r.unavailable) for r in told.feature_report] == [(1, 0, 1), (2, 0, 2)]


def test_defaults_are_made_for_the_inputs_asked_only() -> None:
    wanted = [item for item in inputs() if item.name == "item"]
    answer = degradation.defaults(wanted, {"item": 3}, types_pb2.ROW_STATUS_UNAVAILABLE)
    assert [(t.name, list(t.shape)) for t in answer.tensors] == [("item", [3, 3])]
    assert [v.feature_view for v in answer.views] == ["item-view"]


def test_a_view_that_two_inputs_share_is_reported_once() -> None:
    [item] = [i for i in inputs() if i.name == "item"]
    answer = degradation.defaults([item, replace(item, name="again")], {"item": 1}, types_pb2.ROW_STATUS_UNAVAILABLE)
    assert [t.name for t in answer.tensors] == ["item", "again"]
    assert [v.feature_view for v in answer.views] == ["item-view"]
