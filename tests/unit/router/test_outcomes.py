"""Which outcomes are right, and what counts as the same one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.api.events.v1 import events_pb2, outcomes_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition
from plait.telemetry.metrics import Metrics
from router.journal import fingerprint
from router.outcomes import MAX_AGE_S, MAX_AHEAD_S, Outcomes, check

NOW_S = 1_800_000_000.0
LIKE = events_pb2.EVENT_TYPE_LIKE


def outcome(**changes: Any) -> outcomes_pb2.Outcome:
    made = outcomes_pb2.Outcome(request_id="r1", type=LIKE, item=item("i1"))
    made.event_time.FromSeconds(int(NOW_S))
    for name, value in changes.items():
        if name == "item":
            made.item.CopyFrom(value)
        elif name == "at_s":
            made.event_time.FromSeconds(int(value))
        else:
            setattr(made, name, value)
    return made


def item(*ids: str, entity_type: str = "item") -> types_pb2.EntityRows:
    return types_pb2.EntityRows(entity_type=entity_type, ids=types_pb2.EntityIds(string_ids=ids))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"request_id": "x" * 128, "outcome_id": "x" * 128, "route": "x" * 63, "value": -1.5}, None),
        ({"at_s": NOW_S + MAX_AHEAD_S}, None),
        ({"at_s": NOW_S - MAX_AGE_S}, None),
        ({"request_id": ""}, "REQUEST_ID_INVALID"),
        ({"request_id": "x" * 129}, "REQUEST_ID_INVALID"),
        ({"request_id": "ä" * 65}, "REQUEST_ID_INVALID"),
        ({"item": item()}, "ITEM_INVALID"),
        ({"item": item("a", "b")}, "ITEM_INVALID"),
        ({"item": item("")}, "ITEM_INVALID"),
        ({"item": item("x" * 257)}, "ITEM_INVALID"),
        ({"item": item("a", entity_type="x" * 64)}, "ITEM_INVALID"),
        ({"item": item("a", entity_type="")}, "ITEM_INVALID"),
        ({"type": 0}, "OUTCOME_TYPE_UNKNOWN"),
        ({"type": 99}, "OUTCOME_TYPE_UNKNOWN"),
        ({"outcome_id": "x" * 129}, "OUTCOME_ID_INVALID"),
        ({"route": "x" * 64}, "ROUTE_INVALID"),
        ({"at_s": NOW_S + MAX_AHEAD_S + 1}, "OUTCOME_TIME_INVALID"),
        ({"at_s": NOW_S - MAX_AGE_S - 1}, "OUTCOME_TIME_INVALID"),
        ({"value": math.nan}, "VALUE_INVALID"),
        ({"value": math.inf}, "VALUE_INVALID"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], reason: str | None) -> None:
    found = check(outcome(**changes), NOW_S)
    assert (found and found[0]) == reason


def test_an_outcome_of_the_whole_answer_needs_no_item_but_a_time() -> None:
    whole = outcome()
    whole.ClearField("item")
    assert check(whole, NOW_S) is None
    whole.ClearField("event_time")
    assert (check(whole, NOW_S) or ("",))[0] == "OUTCOME_TIME_INVALID"


TEXTS = st.text("a1:", max_size=3)


@given(st.tuples(TEXTS, TEXTS, st.integers(1, 3), TEXTS), st.tuples(TEXTS, TEXTS, st.integers(1, 3), TEXTS), st.floats(), st.floats())
def test_the_same_is_what_has_the_same_answer_item_type_and_id(one: Any, other: Any, value: float, another: float) -> None:
    def made(parts: Any, value: float) -> bytes:
        request_id, name, kind, outcome_id = parts
        return fingerprint(outcome(request_id=request_id, item=item(name), type=kind, outcome_id=outcome_id, value=value))

    assert (made(one, value) == made(other, another)) == (one == other)


async def test_without_a_journal_nothing_is_said_to_be_kept() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await Outcomes(None, Metrics()).record(pb.RecordOutcomeRequest(outcomes=[outcome()]))
    assert caught.value.reason == "OUTCOMES_NOT_KEPT"
