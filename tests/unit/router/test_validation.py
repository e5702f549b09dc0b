"""Every bad request is told by the path of its field, all at once, and a good one passes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import DI, DU, route, snapshot
from tests.unit.plait.registry.test_set_checks import WORLD as EVERY_TYPE

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument
from plait.registry.records import Entity, KeyPart
from plait.registry.resources import snapshot_of
from router.route_table import Arm, ServingRoute, compile_table
from router.validation import Findings, check_predict, check_predict_fits, check_rank, check_rank_fits, count

FLOAT32 = types_pb2.DATA_TYPE_FLOAT32


def ids(*values: str | int) -> types_pb2.EntityIds:
    strings = [v for v in values if isinstance(v, str)]
    return types_pb2.EntityIds(string_ids=strings, int64_ids=[v for v in values if isinstance(v, int)])


def composites(*keys: tuple[str | int, ...]) -> types_pb2.EntityIds:
    made = types_pb2.EntityIds()
    for key in keys:
        parts = made.composite_ids.add().parts
        for part in key:
            parts.add(**{"string_part" if isinstance(part, str) else "int64_part": part})  # type: ignore[arg-type]
    return made


def composite() -> types_pb2.EntityIds:
    return composites(("a",))


def tensor(name: str, *shape: int, dtype: int = FLOAT32, data: bytes | None = None) -> types_pb2.Tensor:
    return types_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=bytes(4 * math.prod(shape)) if data is None else data)  # type: ignore[arg-type]


def rank(**fields: Any) -> pb.RankRequest:
    return pb.RankRequest(**{"route": "home", "subject": ids("u1"), "candidates": ids("i1", "i2", "i3"), **fields})


def rows(**entities: types_pb2.EntityIds) -> list[types_pb2.EntityRows]:
    return [types_pb2.EntityRows(entity_type=name, ids=listed) for name, listed in entities.items()]


def predict(entities: Iterable[types_pb2.EntityRows] | None = None, **fields: Any) -> pb.PredictRequest:
    good = rows(user=ids("u1"), item=ids("i1", "i2"))
    return pb.PredictRequest(**{"route": "home", "entities": good if entities is None else entities, **fields})


def serving(**how: Any) -> tuple[ServingRoute, Arm]:
    limited = {"max_candidates": how.pop("max_candidates")} if "max_candidates" in how else {}
    table = compile_table(snapshot(route(**limited), **how))
    found = table.find("home", "shop")
    return found, found.weighted[0]


def problems(request: Any, **how: Any) -> list[tuple[str, str]]:
    """Return the violations of a request (field, description), none when it is good."""
    where, arm = serving(**how)
    found = Findings()
    try:
        if isinstance(request, pb.RankRequest):
            _, candidates = check_rank(request, found)
            check_rank_fits(request, where, arm, candidates, found)
        else:
            check_predict_fits(request, where, arm, check_predict(request, found), found)
        found.raise_if_any()
    except InvalidArgument as error:
        return [(v.field, v.description) for v in error.violations]
    return []


def test_a_good_rank_passes_and_its_ids_come_back_as_values() -> None:
    request = rank(candidates=ids("i2", "ü", "x" * 256), inline_features=[tensor("item", 3, DI)], request_id="r" * 128, top_k=5)
    assert problems(request) == []
    subject, candidates = check_rank(request, Findings())
    assert (subject, list(candidates)) == ("u1", ["i2", "ü", "x" * 256])
    numbers = rank(subject=ids(-1), candidates=ids(7, 0, -(2**63)))
    assert problems(numbers, user_key="int64", item_key="int64") == []
    assert check_rank(numbers, Findings()) == (-1, [7, 0, -(2**63)])
    assert problems(rank(candidates=ids(*range(10_000))), item_key="int64") == []


RANK = [
    (rank(route=""), "route", "1 to 63 bytes, got 0"),
    (rank(route="r" * 64), "route", "got 64"),
    (rank(route="é" * 32), "route", "got 64"),
    (rank(subject=None), "subject", "at least one id"),
    (rank(subject=ids("a", "b")), "subject", "exactly one id, got 2"),
    (rank(subject=ids("")), "subject.string_ids[0]", "1 to 256 bytes, got 0"),
    (rank(subject=ids(1)), "subject", "'user' are string, so send string_ids; got int64_ids"),
    (rank(subject=composite()), "subject", "'user' are string, so send string_ids; got composite_ids"),
    (rank(candidates=None), "candidates", "at least one id"),
    (rank(candidates=ids(*map(str, range(10_001)))), "candidates", "at most 10000 ids, got 10001"),
    (rank(candidates=ids("a", "b", "a")), "candidates[2]", "the same id as candidates[0]"),
    (rank(candidates=ids("a", "", "b")), "candidates.string_ids[1]", "got 0"),
    (rank(candidates=ids("a", "x" * 257)), "candidates.string_ids[1]", "got 257"),
    (rank(candidates=ids("é" * 129)), "candidates.string_ids[0]", "got 258"),
    (rank(candidates=ids(1, 2)), "candidates", "so send string_ids"),
    (rank(candidates=ids("a", 1)), "candidates", "one kind"),
    (rank(candidates=composite()), "candidates", "'item' are string, so send string_ids; got composite_ids"),
    (rank(top_k=-1), "top_k", "0 (all) or more"),
    (rank(request_id="r" * 129), "request_id", "at most 128 bytes, got 129"),
    (rank(labels={f"l{n}": "" for n in range(17)}), "labels", "at most 16, got 17"),
    (rank(labels={"": "x"}), "labels", "1 to 63 bytes, got one of 0"),
    (rank(labels={"x" * 64: "x"}), "labels", "1 to 63 bytes, got one of 64"),
    (rank(labels={"note": "é" * 129}), "labels['note']", "at most 256 bytes, got 258"),
    (rank(inline_features=[tensor("nope", 3, DI)]), "inline_features[0].name", "no input 'nope'; it has user, item"),
    (rank(inline_features=[tensor("", 3, DI)]), "inline_features[0].name", "no input ''"),
    (rank(inline_features=[tensor("user", 1, DU)] * 2), "inline_features[1].name", "given twice"),
    (rank(inline_features=[tensor("item", 3, DI, dtype=12)]), "inline_features[0].dtype", "is float32, got float64"),
    (rank(inline_features=[tensor("item", 3, DI, dtype=0)]), "inline_features[0].dtype", "got number 0"),
    (rank(inline_features=[tensor("item", 3, DI, dtype=77)]), "inline_features[0].dtype", "got number 77"),
    (rank(inline_features=[tensor("item", 2, DI)]), "inline_features[0].shape", "must be [3, 3] here, got [2, 3]"),
    (rank(inline_features=[tensor("item", DI, 3, 1)]), "inline_features[0].shape", "got [3, 3, 1]"),
    (rank(inline_features=[tensor("item")]), "inline_features[0].shape", "got []"),
    (rank(inline_features=[tensor("item", *[1] * 100)]), "inline_features[0].shape", "got [1, 1, 1, 1, 1, 1, 1, 1, …]"),
    (rank(inline_features=[tensor("item", -3, -DI, data=bytes(36))]), "inline_features[0].shape", "got [-3, -3]"),
    (rank(inline_features=[tensor("user", 3, DU)]), "inline_features[0].shape", "must be [1, 2]"),
    (rank(inline_features=[tensor("item", 3, DI, data=b"")]), "inline_features[0].data", "takes 36 bytes, got 0"),
    (rank(inline_features=[tensor("item", 3, DI, data=bytes(37))]), "inline_features[0].data", "takes 36 bytes, got 37"),
]


@pytest.mark.parametrize(("request_", "field", "said"), RANK, ids=[f"{n}-{field}" for n, (_, field, _) in enumerate(RANK)])
def test_a_bad_rank_is_told_by_field(request_: pb.RankRequest, field: str, said: str) -> None:
    found = problems(request_)
    assert said in found[0][1]
    assert {where for where, _ in found} == {field}, "nothing else is wrong with it"


def test_the_routes_own_limit_and_kinds_of_ids() -> None:
    assert problems(rank(), max_candidates=2) == [("candidates", "expected at most 2 on this route, got 3")]
    assert problems(rank(candidates=ids("a", "b")), max_candidates=2) == []
    subject, candidates = problems(rank(), user_key="int64", item_key="int64")
    assert (subject[0], candidates[0]) == ("subject", "candidates")
    assert "so send int64_ids; got string_ids" in candidates[1]


PREDICT = [
    (predict(route=""), "route", "1 to 63 bytes"),
    (predict([]), "entities", "expected ids of 'user', or input 'user' inline"),
    (predict(rows(user=ids("u"))), "entities", "expected ids of 'item'"),
    (predict(rows(user=ids("u", "v"), item=ids("i"))), "entities", "exactly one id of 'user', got 2"),
    (predict([*rows(user=ids("u"), item=ids("i")), *rows(user=ids("v"))]), "entities[2].entity_type", "given twice"),
    (predict(rows(user=ids("u"), item=ids("i"), seller=ids("s"))), "entities[2].entity_type", "it uses item, user"),
    (predict(rows(user=ids("u"), item=ids("i")) + rows(**{"": ids("s")})), "entities[2].entity_type", "1 to 63 bytes"),
    (predict(rows(user=ids("u"), item=ids(5))), "entities[1].ids", "so send string_ids"),
    (predict(rows(user=ids("u"), item=ids("a", ""))), "entities[1].ids.string_ids[1]", "got 0"),
    (predict(rows(user=ids("u"), item=ids(*map(str, range(10_000))))), "entities", "at most 10000 ids together, got 10001"),
    (predict(outputs=["scores"]), "outputs[0]", "no output 'scores'; it has score"),
    (predict(outputs=["score", "score"]), "outputs", "listed twice"),
    (predict(request_id="é" * 65), "request_id", "got 130"),
    (predict(inline_features=[tensor("item", 3, DI)]), "inline_features[0].shape", "must be [2, 3] here, got [3, 3]"),
    (predict([], inline_features=[tensor("user", 1, DU), tensor("item", 0, DI)]), "inline_features[1].shape", "got [0, 3]"),
    (predict([], inline_features=[tensor("user", 1, DU), tensor("item", -1, DI, data=b"")]), "inline_features[1].shape", "got [-1, 3]"),
]


@pytest.mark.parametrize(("request_", "field", "said"), PREDICT, ids=[f"{n}-{field}" for n, (_, field, _) in enumerate(PREDICT)])
def test_a_bad_predict_is_told_by_field(request_: pb.PredictRequest, field: str, said: str) -> None:
    found = problems(request_)
    assert any(said in description for _, description in found)
    assert {where for where, _ in found} == {field}, "nothing else is wrong with it"


def test_good_predicts_pass() -> None:
    assert problems(predict()) == []
    assert problems(predict(rows(user=ids("u"), item=ids("i", "i")), outputs=["score"])) == [], "repeated ids are allowed"
    assert problems(predict([], inline_features=[tensor("user", 1, DU), tensor("item", 7, DI)])) == []
    assert problems(predict(rows(user=ids("u")), inline_features=[tensor("item", 7, DI)])) == []
    assert list(check_predict(predict(), Findings())) == ["user", "item"]


def test_all_is_told_at_once_but_not_without_end() -> None:
    fields = [field for field, _ in problems(rank(candidates=ids(1, 1), top_k=-1, request_id="x" * 999))]
    assert fields == ["candidates[1]", "top_k", "request_id", "candidates"]
    found = Findings()
    for number in range(25):
        found.add(f"field{number}", "is wrong")
    with pytest.raises(InvalidArgument, match=r"field0: is wrong \(and 24 more, see the details\)") as caught:
        found.raise_if_any()
    assert [v.field for v in caught.value.violations] == [*(f"field{n}" for n in range(20)), ""]
    assert caught.value.violations[-1].description == "and 5 more"
    Findings().raise_if_any()


def test_ids_are_never_quoted_because_they_may_be_a_persons() -> None:
    bad = rank(subject=ids("jane@example.org", "jane@example.org"), candidates=ids("jane@example.org", "jane@example.org", "x" * 300))
    assert "jane" not in str(problems(bad))
    assert "xxx" not in str(problems(bad))


ANY_IDS = st.builds(
    types_pb2.EntityIds,
    string_ids=st.lists(st.text(max_size=300), max_size=4),
    int64_ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
ANY_TENSOR = st.builds(
    types_pb2.Tensor,
    name=st.sampled_from(["user", "item", "other", ""]),
    dtype=st.sampled_from([0, 11, 12, 13, 99]),
    shape=st.lists(st.sampled_from([-1, 0, 1, 2, 3, 2**62]), max_size=4),
    data=st.binary(max_size=40),
)
ANY_RANK = st.builds(
    pb.RankRequest,
    route=st.text(max_size=70),
    subject=ANY_IDS,
    candidates=ANY_IDS,
    top_k=st.integers(-(2**31), 2**31 - 1),
    request_id=st.text(max_size=140),
    inline_features=st.lists(ANY_TENSOR, max_size=3),
)
ANY_PREDICT = st.builds(
    pb.PredictRequest,
    route=st.just("home") | st.text(max_size=70),
    entities=st.lists(st.builds(types_pb2.EntityRows, entity_type=st.sampled_from(["user", "item", "x", ""]), ids=ANY_IDS), max_size=3),
    inline_features=st.lists(ANY_TENSOR, max_size=3),
    outputs=st.lists(st.sampled_from(["score", "x"]), max_size=3),
)


@given(request_=ANY_RANK | ANY_PREDICT)
def test_whatever_is_sent_is_good_or_told_and_nothing_else_escapes(request_: Any) -> None:
    for field, description in problems(request_):
        assert description
        assert field == "" or hasattr(request_, field.partition("[")[0].partition(".")[0])


@given(listed=ANY_IDS)
def test_count_counts_every_kind(listed: types_pb2.EntityIds) -> None:
    assert count(listed) == len(listed.string_ids) + len(listed.int64_ids)
    assert count(composite()) == 1


SKU = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="number", type="int64")))


def keyed() -> tuple[ServingRoute, Arm]:
    """The route, whose items have keys of two parts."""
    registry = snapshot()
    view = replace(registry.feature_views["item-view"], entity=SKU)
    table = compile_table(replace(registry, feature_views={**registry.feature_views, "item-view": view}))
    found = table.find("home", "shop")
    return found, found.weighted[0]


@pytest.mark.parametrize(
    ("ids_", "said"),
    [
        (composites(("", 0), ("a|b", 1), ("a", -1)), ""),
        (composites(("a", 1), ("a", "1")), "composite_ids[1] does not have the parts of 'item': shop (string), number (int64)"),
        (composites(("a",)), "composite_ids[0] does not have the parts"),
        (ids("a"), "ids of 'item' are composite, so send composite_ids; got string_ids"),
    ],
)
def test_composite_ids_have_the_declared_parts(ids_: types_pb2.EntityIds, said: str) -> None:
    where, arm = keyed()
    for request in (rank(candidates=ids_), predict(rows(user=ids("u1"), item=ids_))):
        found = Findings()
        if isinstance(request, pb.RankRequest):
            _, candidates = check_rank(request, found)
            check_rank_fits(request, where, arm, candidates, found)
        else:
            check_predict_fits(request, where, arm, check_predict(request, found), found)
        if not said:
            found.raise_if_any()
            continue
        with pytest.raises(InvalidArgument) as caught:
            found.raise_if_any()
        assert said in caught.value.violations[0].description


@pytest.mark.parametrize(
    ("ids_", "field", "said"),
    [
        (composites((), ("a",)), "candidates.composite_ids[0]", "1 to 8 parts, each a string_part or an int64_part"),
        (composites(("a",) * 9), "candidates.composite_ids[0]", "1 to 8 parts"),
        (composites(("a", 1), ("a", "é" * 129)), "candidates.composite_ids[1]", "at most 256 bytes in a part"),
        (composites(("a", 1), ("a", 2), ("a", 1)), "candidates[2]", "the same id as candidates[0]"),
    ],
)
def test_composite_ids_that_no_route_takes(ids_: types_pb2.EntityIds, field: str, said: str) -> None:
    found = Findings()
    check_rank(rank(candidates=ids_), found)
    with pytest.raises(InvalidArgument) as caught:
        found.raise_if_any()
    [violation] = caught.value.violations
    assert violation.field == field
    assert said in violation.description


def test_what_a_transform_reads_must_be_given_once() -> None:
    table = compile_table(snapshot_of(7, EVERY_TYPE, []))
    where = table.find("home", "shop")
    arm = where.weighted[0]

    def told(request: pb.PredictRequest) -> list[str]:
        found = Findings()
        check_predict_fits(request, where, arm, check_predict(request, found), found)
        try:
            found.raise_if_any()
        except InvalidArgument as error:
            return [v.description for v in error.violations]
        return []

    assert told(predict(rows(item=ids("i1", "i2"), user=ids("u1")))) == []
    assert "expected ids of 'user', or input 'item' inline" in told(predict(rows(item=ids("i1"))))
    assert "expected exactly one id of 'user', got 2" in told(predict(rows(item=ids("i1"), user=ids("u1", "u2"))))
