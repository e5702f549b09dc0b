"""What a caller is told of a model that cannot answer: one row per state of the world."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from model_worker import memory
from model_worker.lifecycle import Entry, Key, State
from model_worker.quarantine import Breaker, Fault, Rule
from model_worker.refusals import explained, quarantined, why_not
from plait.errors import FailedPrecondition, NotFound, PlaitError, Unavailable, Violation
from plait.registry.records import Model, ModelVersion, Snapshot

V1, V2, V3 = (ModelVersion(version=v, artifact=f"/m/{v}", digest=f"sha256:{v}") for v in "123")
WORLD = Snapshot(models={"b": Model(name="b", versions=(V1,)), "a": Model(name="a", versions=(V1, V2, V3))})
BROKEN = FailedPrecondition("the file is torn", reason="ARTIFACT_CORRUPT")
NOW_S = 1000.0


def out(version: ModelVersion, *, backoff_s: float = 5.0, error: PlaitError | None = None) -> Entry:
    """Return a version that was taken out at NOW_S."""
    breaker = Breaker(Rule(severe=1, backoff_s=backoff_s))
    assert breaker.fault(Fault.HANG, NOW_S)
    return Entry(
        version=version, state=State.QUARANTINED, breaker=breaker, error=error or quarantined("a", version.version, "it failed 10 times")
    )


def failed(version: ModelVersion, error: PlaitError = BROKEN) -> Entry:
    return Entry(version=version, state=State.FAILED, error=error)


def refusal(entries: Mapping[Key, Entry], wanted: str, version: str = "", *, model: str = "a", now_s: float = NOW_S) -> PlaitError:
    """Ask for `model` where the versions of "a" in `wanted` should be held."""
    return why_not(model, version, WORLD, {("a", number) for number in wanted}, entries, now_s)


A1, A2, A3 = ("a", "1"), ("a", "2"), ("a", "3")


@pytest.mark.parametrize(
    ("entries", "wanted", "version", "reason"),
    [
        ({}, "1", "", "MODEL_LOADING"),  # it was not begun yet
        ({A1: Entry(version=V1)}, "1", "", "MODEL_LOADING"),
        ({A1: failed(V1), A2: Entry(version=V2)}, "12", "", "MODEL_LOADING"),
        ({A1: out(V1), A2: Entry(version=V2)}, "12", "", "MODEL_LOADING"),
        ({A1: failed(V1), A2: out(V2)}, "12", "", "MODEL_QUARANTINED"),
        ({A1: failed(V1), A2: out(V2)}, "1", "", "MODEL_QUARANTINED"),  # out, and not referred to any more
        ({A1: failed(V1), A2: out(V2)}, "12", "1", "MODEL_FAILED"),  # of the version that was named only
        ({A1: failed(V1), A2: Entry(version=V2)}, "12", "1", "MODEL_FAILED"),
        ({A1: failed(V1), A2: failed(V2, FailedPrecondition("too big", reason=memory.REASON))}, "2", "", "MEMORY_EXCEEDED"),
        ({A1: failed(V1, Unavailable("the store is away", reason="ARTIFACT_STORE_UNAVAILABLE"))}, "1", "", "MODEL_FAILED"),
        ({A1: failed(V1)}, "", "", "MODEL_NOT_SERVED"),
        ({}, "1", "3", "MODEL_NOT_SERVED"),
        ({}, "1", "9", "MODEL_NOT_FOUND"),
    ],
)
def test_the_most_hopeful_version_speaks(entries: dict[Key, Entry], wanted: str, version: str, reason: str) -> None:
    assert refusal(entries, wanted, version).reason == reason


def test_another_model_says_nothing_of_this_one() -> None:
    assert why_not("a", "", WORLD, {("b", "1")}, {("b", "1"): out(V1)}, NOW_S).reason == "MODEL_NOT_SERVED"


def test_what_is_being_loaded_is_worth_a_retry_soon() -> None:
    error = refusal({}, "1")
    assert isinstance(error, Unavailable)
    assert (error.message, error.retry_after_s) == ("a is being loaded: retry", 0.25)
    assert refusal({}, "1", "1").message == "a version 1 is being loaded: retry"


@pytest.mark.parametrize(("later_s", "retry_s"), [(0.0, 8.0), (6.0, 2.0)])
def test_quarantine_says_when_it_may_end(later_s: float, retry_s: float) -> None:
    error = refusal({A1: out(V1, backoff_s=8.0)}, "1", now_s=NOW_S + later_s)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s == retry_s
    assert error.message.startswith("a version 1 is in quarantine: it failed 10 times; ")


def test_a_failure_to_load_is_told_with_its_reason() -> None:
    error = refusal({A1: failed(V1)}, "1", "1")
    assert isinstance(error, FailedPrecondition)
    assert error.message == "a version 1 could not be loaded: the file is torn (ARTIFACT_CORRUPT)"


def test_what_is_unknown_is_told_with_what_is_known() -> None:
    error = refusal({}, "", model="c")
    assert isinstance(error, NotFound)
    assert error.message == "Request for unknown model: c is not in the registry; models the registry has: a, b"
    assert why_not("c", "", Snapshot(), (), {}, NOW_S).message.endswith("models the registry has: none")
    assert refusal({}, "", model="").message == "Request for unknown model: its name is empty; models the registry has: a, b"
    error = refusal({}, "", "9")
    assert error.message == "Request for unknown model: a version 9 is not in the registry; versions it has, newest first: 3, 2, 1"


def test_long_names_of_callers_are_cut() -> None:
    message = refusal({}, "", "v" * 10_000, model="m" * 10_000).message
    assert "m" * 80 + " version " + "v" * 80 + " is not" in message


def test_findings_become_part_of_the_sentence() -> None:
    found = [Violation("inputs", "is required"), Violation("", "is torn"), Violation("a", "b"), Violation("c", "d")]
    error = explained(FailedPrecondition("model.yaml is wrong", reason="ARTIFACT_INVALID", violations=found))
    assert isinstance(error, FailedPrecondition)
    assert (error.message, error.reason) == ("model.yaml is wrong: inputs: is required; is torn; a: b", "ARTIFACT_INVALID")
    assert explained(BROKEN) is BROKEN
