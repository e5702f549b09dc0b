"""What callers send along is taken as declared, or refused with all that is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.request_features import describe, place, take
from feature_retrieval.views import Plan, compile_plan
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, RequestFeature, Snapshot

VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=0),))
HOUR = RequestFeature(name="hour", minimum=0, maximum=23, default=12)
DISTANCE = RequestFeature(name="distance", entity="item", minimum=0)
COUNT = RequestFeature(name="count", dtype="int64", entity="item", default=3)
FLAG = RequestFeature(name="flag", dtype="bool", default=False)
ITEM = ModelInput(name="item", entity="item", features=("$request:distance", "stats:a", "$request:hour", "$request:count"))
USER = ModelInput(name="user", entity="user", features=("$request:flag", "$request:hour"))


def plan_of(*inputs: str) -> Plan:
    home = FeatureSet(name="home", inputs=(ITEM, USER), request=(HOUR, DISTANCE, COUNT, FLAG))
    return compile_plan(Snapshot(feature_views={"stats": VIEW}, feature_sets={"home": home}), "home", inputs)


def tensor(name: str, values: Any, dtype: str = "float32", **more: Any) -> types_pb2.Tensor:
    data = np.asarray(values, BY_NAME[dtype].numpy)
    return types_pb2.Tensor(**{"name": name, "dtype": BY_NAME[dtype].number, "shape": data.shape, "data": data.tobytes(), **more})


def problems(*tensors: types_pb2.Tensor, plan: Plan | None = None) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        take(plan or plan_of(), tensors, {"item": 2, "user": 1})
    assert caught.value.reason == "REQUEST_FEATURE_INVALID"
    return [(v.field, v.description) for v in caught.value.violations]


GOOD = tensor("distance", [1, 2])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (tensor("hours", 1), "declares no such one: it has ['count', 'distance', 'flag', 'hour']; did you mean 'hour'?"),
        (tensor("hour", 1, "float64"), "is float64, but declared as float32"),
        (tensor("hour", 1, dtype="float32", data=b"12345"), "has 5 bytes of data, expected 1 x 4"),
        (tensor("hour", [1, 2]), "has shape [2], but takes one value per request: [] or [1]"),
        (tensor("hour", [[1]]), "has shape [1, 1], but takes one value per request"),
        (tensor("hour", -0.001), "holds a value below the minimum 0"),
        (tensor("hour", 23.001), "holds a value above the maximum 23"),
        (tensor("hour", np.nan), "holds a value that is not a finite number"),
        (tensor("hour", np.inf), "holds a value that is not a finite number"),
        (tensor("count", [1, 2, 3], "int64"), "has shape [3], but needs one value per 'item' of this request: [2]"),
        (tensor("count", 1, "int64"), "has shape [], but needs one value per 'item'"),
        (tensor("flag", True, "bool", data=b"\2"), "has bytes other than 0 and 1"),
        (types_pb2.Tensor(name="flag", shape=[1], data=b"\1"), "is of no known dtype, but declared as bool"),
    ],
)
def test_what_does_not_fit_its_declaration(bad: types_pb2.Tensor, words: str) -> None:
    [(field, said)] = problems(GOOD, bad)
    assert field.startswith("request_features[1]")
    assert words in said


def test_all_violations_are_told_at_once() -> None:
    told = problems(tensor("hour", 99), tensor("hour", 1), tensor("nosuch", 1))
    assert [field for field, _ in told] == [
        "request_features[0]",
        "request_features[1].name",
        "request_features[2].name",
        "request_features",
    ]
    assert told[-1][1] == "'distance' is missing and has no default"
    assert "99" not in str(told)  # no value of a caller is in a message


def test_a_set_without_any_says_so() -> None:
    plan = compile_plan(
        Snapshot(
            feature_views={"stats": VIEW},
            feature_sets={"s": FeatureSet(name="s", inputs=(ModelInput(name="i", entity="item", features=("stats:a",)),))},
        ),
        "s",
    )
    assert "it has none" in problems(GOOD, plan=plan)[0][1]
    assert take(plan, (), {"item": 1}).values == {}


def test_what_the_asked_inputs_do_not_use_need_not_be_sent_but_is_checked() -> None:
    assert set(take(plan_of("user"), (), {"user": 1}).values) == {"flag", "hour"}
    take(plan_of("user"), [tensor("distance", [1, 2, 3])], {"user": 1})  # how many items there are is not known here
    assert problems(tensor("distance", [-1, 1]), plan=plan_of("user")) == [
        ("request_features[0]", "'distance' holds a value below the minimum 0")
    ]


def test_bounds_themselves_are_allowed() -> None:
    for hour in (0, 23):
        assert take(plan_of(), [GOOD, tensor("hour", hour)], {"item": 2, "user": 1}).values["hour"] == hour


@given(st.data())
def test_values_land_in_their_columns(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    hour = data.draw(st.none() | st.integers(0, 23))
    counts = data.draw(st.none() | st.lists(st.integers(-(2**20), 2**20), min_size=rows, max_size=rows))
    distances = data.draw(st.lists(st.floats(0, 1e6, width=32), min_size=rows, max_size=rows))
    sent = [tensor("distance", distances)]
    if hour is not None:
        sent.append(tensor("hour", data.draw(st.sampled_from([hour, [hour]]))))
    if counts is not None:
        sent.append(tensor("count", counts, "int64"))
    plan = plan_of()
    tensors: list[Any] = [np.full((rows, 4), 7, np.float32), np.full((1, 2), 7, np.float32)]
    taken = take(plan, data.draw(st.permutations(sent)), {"item": rows, "user": 1})
    defaulted = place(plan, taken, tensors)
    hours = 12 if hour is None else hour
    assert tensors[0].tolist() == [[np.float32(distances[n]), 7, hours, 3 if counts is None else counts[n]] for n in range(rows)]
    assert tensors[1].tolist() == [[0, hours]]
    assert defaulted == (rows + 1 if hour is None else 0) + (rows if counts is None else 0) + 1


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("$request:nosuch", r"declares no such request feature"),
        ("$request:distance", r"for 'user', but declares it for 'item'"),
        ("$transform:nosuch", r"names \$transform:nosuch for 'user', which it does not declare"),
        ("nonsense", r"names 'nonsense', which is no feature"),
    ],
)
def test_a_set_that_names_what_it_does_not_declare_is_broken(reference: str, words: str) -> None:
    home = FeatureSet(name="home", inputs=(ModelInput(name="user", entity="user", features=(reference,)),), request=(DISTANCE,))
    with pytest.raises(FailedPrecondition, match=words) as caught:
        compile_plan(Snapshot(feature_sets={"home": home}), "home")
    assert caught.value.reason == "FEATURE_SET_BROKEN"


def test_description_says_what_must_be_sent() -> None:
    answer = pb.DescribeFeatureSetResponse()
    describe((HOUR, DISTANCE), answer.request_features)
    hour, distance = answer.request_features
    assert (hour.name, hour.dtype, hour.entity_type, hour.default_value, hour.minimum, hour.maximum) == ("hour", 11, "", 12, 0, 23)
    assert distance.entity_type == "item"
    assert not distance.HasField("default_value")
    assert not distance.HasField("maximum")
