"""Exposures: which answers are one, how often they are written, and that nobody is named."""

from __future__ import annotations

from typing import Any

import pytest

from plait.api.events.v1 import outcomes_pb2
from plait.api.router.v1 import explanation_pb2
from plait.telemetry.metrics import Metrics
from router.exposures import Exposures


class Paper:
    """A journal with room for so many."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.written: list[outcomes_pb2.Exposure] = []

    def put(self, exposure: outcomes_pb2.Exposure) -> bool:
        if len(self.written) >= self.room:
            return False
        self.written.append(exposure)
        return True


class Named:
    """What of a question, a route and an arm an exposure is made of."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)


GIVEN = explanation_pb2.Assignment(experiment="v4", layer="ranking", variant="canary", bucket=7)


def question(**changes: Any) -> Any:
    facts: dict[str, Any] = {
        "tier": "full",
        "trail": None,
        "assignments": (GIVEN,),
        "tenant": "shop",
        "request_id": "r1",
        "unit": "ann",
        "revision": 5,
        "route": Named(name="home"),
        "arm": Named(model="ranker", version="3", name="canary"),
    }
    return Named(**(facts | changes))


@pytest.fixture
def paper() -> Paper:
    return Paper()


def exposures(paper: Any, **changes: Any) -> Exposures:
    options: dict[str, Any] = {"key": b"k" * 32, "clock": lambda: 1_800_000_000.0}
    return Exposures(Metrics(), paper, **(options | changes))


def test_all_but_a_name_is_written(paper: Paper) -> None:
    exposures(paper).note(question())
    (written,) = paper.written
    assert (written.request_id, written.tenant, written.route, written.experiment, written.layer) == ("r1", "shop", "home", "v4", "ranking")
    assert (written.variant, written.model, written.model_version, written.tier) == ("canary", "ranker", "3", "full")
    assert (written.exposed_at.seconds, written.registry_revision, len(written.unit_hash)) == (1_800_000_000, 5, 16)
    assert b"ann" not in written.SerializeToString()


@pytest.mark.parametrize("changes", [{"tier": "light"}, {"trail": object()}, {"assignments": ()}])
def test_what_is_no_exposure(paper: Paper, changes: dict[str, Any]) -> None:
    exposures(paper).note(question(**changes))
    assert paper.written == []


def test_a_unit_is_written_once_an_hour_for_each_variant(paper: Paper) -> None:
    now = [1_800_000_000.0]
    noting = exposures(paper, clock=lambda: now[0])
    other = explanation_pb2.Assignment(experiment="v4", layer="ranking", variant="champion")
    for asked in (
        question(),
        question(request_id="r2"),
        question(unit="bob"),
        question(assignments=(other,)),
        question(unit=1),
        question(unit="1"),
    ):
        noting.note(asked)
    assert len(paper.written) == 5
    now[0] += 3599
    noting.note(question())
    assert len(paper.written) == 5
    now[0] += 1
    noting.note(question())
    assert len(paper.written) == 6


def test_what_there_was_no_room_for_is_tried_again() -> None:
    full = Paper(room=0)
    noting = exposures(full)
    noting.note(question())
    full.room = 1
    noting.note(question())
    assert len(full.written) == 1


def test_units_are_equal_under_one_key_and_tenant_only(paper: Paper) -> None:
    for noting in (
        exposures(paper),
        exposures(paper),
        exposures(paper, key=b"x" * 32),
        exposures(paper, key=b""),
        exposures(paper, key=b""),
    ):
        noting.note(question())
    exposures(paper).note(question(tenant="other"))
    hashes = [written.unit_hash for written in paper.written]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 5
