"""What stands in for features, and the words for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import DEFAULT, DI, DU, snapshot

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from router import degradation
from router.route_table import compile_table

STATUSES = list(types_pb2.RowStatus.values())
INPUTS = compile_table(snapshot()).find("home", "shop").weighted[0].inputs


def view(name: str = "item-view", **counts: int) -> features_pb.ViewReport:
    listed = [counts.get(types_pb2.RowStatus.Name(status).removeprefix("ROW_STATUS_").lower(), 0) for status in STATUSES]
    return features_pb.ViewReport(feature_view=name, statuses=bytes(sum(listed)), status_counts=listed)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, []),
        ({"present": 9, "null": 1}, []),
        ({"defaulted": 1}, ["features_defaulted"]),
        ({"not_found": 1}, ["features_defaulted"]),
        ({"defaulted": 1, "not_found": 3}, ["features_defaulted"]),
        ({"stale": 1}, ["features_stale"]),
        ({"timed_out": 1}, ["features_timed_out"]),
        ({"unavailable": 1}, ["features_unavailable"]),
    ],
)
def test_the_word_for_each_status(counts: dict[str, int], expected: list[str]) -> None:
    assert degradation.reasons([view(present=5), view(**counts)]) == expected


@given(views=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4))
def test_each_word_once_in_the_order_of_the_contract_whatever_the_reports_hold(views: list[list[int]]) -> None:
    words = degradation.reasons([features_pb.ViewReport(status_counts=counts) for counts in views])
    order = ["features_defaulted", "features_stale", "features_timed_out", "features_unavailable"]
    assert words == [word for word in order if word in words]


def test_the_report_counts_rows_by_status_one_line_per_view() -> None:
    response = pb.RankResponse()
    old = features_pb.ViewReport(feature_view="short", statuses=b"\1\1", status_counts=[0, 2])  # counts that say nothing of later statuses
    whole = view("whole", present=1, null=2, defaulted=3, not_found=4, stale=5, timed_out=6, unavailable=7)
    degradation.report([old, whole], response.feature_report)
    short, long = response.feature_report
    assert (short.feature_view, short.rows, short.present, short.unavailable) == ("short", 2, 2, 0)
    assert (long.feature_view, long.rows) == ("whole", 28)
    assert [long.present, long.null, long.defaulted, long.not_found, long.stale, long.timed_out, long.unavailable] == [1, 2, 3, 4, 5, 6, 7]


def test_defaults_are_what_feature_retrieval_would_answer_if_it_could_read_nothing() -> None:
    response = degradation.defaults(INPUTS, {"user": 1, "item": 3}, types_pb2.ROW_STATUS_UNAVAILABLE)
    tensors = {t.name: np.frombuffer(t.data, "<f4").reshape(tuple(t.shape)) for t in response.tensors}
    assert [t.dtype for t in response.tensors] == [types_pb2.DATA_TYPE_FLOAT32] * 2
    assert np.array_equal(tensors["user"], [[DEFAULT, *[math.nan] * (DU - 1)]], equal_nan=True)
    assert np.array_equal(tensors["item"], [[DEFAULT, *[math.nan] * (DI - 1)]] * 3, equal_nan=True)
    assert [(v.feature_view, v.entity_type, v.statuses) for v in response.views] == [
        ("user-view", "user", b"\7"),
        ("item-view", "item", b"\7\7\7"),
    ]
    assert degradation.reasons(response.views) == ["features_unavailable"]


@pytest.mark.parametrize("status", [types_pb2.ROW_STATUS_TIMED_OUT, types_pb2.ROW_STATUS_UNAVAILABLE])
def test_defaults_of_some_inputs_only_speak_of_their_views(status: types_pb2.RowStatus.ValueType) -> None:
    response = degradation.defaults(INPUTS[1:], {"item": 10_000}, status)
    [tensor], [report] = response.tensors, response.views
    assert (tensor.name, list(tensor.shape), len(tensor.data)) == ("item", [10_000, DI], 10_000 * DI * 4)
    assert list(report.status_counts) == [10_000 if s == status else 0 for s in STATUSES]


def test_one_bad_view_among_good_ones_is_told_wherever_it_stands() -> None:
    for views in ([view(stale=1), view(present=1)], [view(present=1), view(stale=1)]):
        assert degradation.reasons(views) == ["features_stale"]
    assert degradation.reasons([view(unavailable=1), view(defaulted=1)]) == ["features_defaulted", "features_unavailable"]
