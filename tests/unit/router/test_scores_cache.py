"""Scores of single candidates against a dictionary that remembers everything: never too old, never told to be forgotten, never another's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.questions import ask, rank
from tests.fakes.router_world import route, snapshot

from plait.api.types.v1 import types_pb2
from plait.registry.policies import CachePolicy
from plait.telemetry.metrics import Metrics
from router.invalidation import Invalidations
from router.question import Question
from router.scores_cache import Scores, _hashes

REGISTRY = snapshot(route(cache=CachePolicy(scores_ttl_s=60)))
KEEP_S = 100.0


class World:
    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.now_s = 1000.0
        self.log = Invalidations()
        self.metrics = Metrics()
        self.scores = Scores(max_bytes, self.log, self.metrics, lambda: self.now_s)
        self.scores.adopt(REGISTRY)

    def question(self, *items: str, subject: str = "u1", tenant: str = "shop") -> Question:
        return ask(REGISTRY, rank(subject, items), tenant=tenant)

    def keep(self, question: Question, first: float, *, position: int | None = None) -> None:
        values = np.arange(first, first + len(question.candidates), dtype=np.float32)
        at = self.log.position if position is None else position
        self.scores.keep(question, question.candidates, values, begun_s=self.now_s, position=at, keep_s=KEEP_S)

    def known(self, question: Question, max_age_s: float = 60.0) -> dict[Any, float]:
        found = self.scores.known(question, max_age_s)
        return {item: float(s) for item, s, ok in zip(question.candidates, found.scores, found.mask, strict=True) if ok}


def test_scores_are_found_in_any_order_and_company() -> None:
    world = World()
    world.keep(world.question("i3", "i1", "i2"), 10)
    assert world.known(world.question("i2", "new", "i3")) == {"i2": 12, "i3": 10}
    assert world.known(world.question("i2", subject="u2")) == {}
    assert world.known(world.question("i2", tenant="other")) == {}


def test_a_score_that_was_being_made_while_its_item_changed_is_not_kept() -> None:
    world = World()
    position = world.log.position
    world.log.tell([(("shop", "entity", "item"), ["i1"])])
    world.keep(world.question("i1", "i2"), 1, position=position)
    assert world.known(world.question("i1", "i2")) == {"i2": 2}


@pytest.mark.parametrize(
    ("space", "name"),
    [(("shop", "route", ""), "home"), (("shop", "model", ""), "ranker"), (("shop", "entity", "user"), "u1")],
)
def test_routes_models_and_subjects_are_forgotten_whole(space: Any, name: str) -> None:
    world = World()
    world.keep(world.question("i1"), 1)
    position = world.log.position
    world.log.tell([(space, [name])])
    assert world.known(world.question("i1")) == {}
    world.keep(world.question("i1"), 1, position=position)
    assert world.known(world.question("i1")) == {}
    world.keep(world.question("i1"), 2)
    assert world.known(world.question("i1")) == {"i1": 2}


def test_questions_with_features_of_their_own_are_told() -> None:
    hour = types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_INT64, data=bytes(8))
    user = types_pb2.Tensor(name="user", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1, 2], data=bytes(8))
    assert Scores.usable(ask(REGISTRY, rank()))
    assert not Scores.usable(ask(REGISTRY, rank(request_features=[hour])))
    assert not Scores.usable(ask(REGISTRY, rank(inline_features=[user])))


def test_memory_is_bounded() -> None:
    world = World(1 << 16)
    for number in range(200):
        world.keep(world.question(*(f"i{n}" for n in range(100)), subject=f"u{number}"), 1)
        size = world.metrics.registry.get_sample_value("plait_router_scores_bytes")
        assert size is not None
        assert 0 < size <= 1 << 16
    world.keep(world.question(*(f"i{n}" for n in range(100)), subject="u"), 1)
    world.keep(world.question(*(f"i{n}" for n in range(100, 250)), subject="u"), 1)  # both do not fit: the new ones do
    assert len(world.known(world.question("i99", "i100", subject="u"))) == 1


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, -2, 2**61 - 1, 2**61, 1])), unique=True))
def test_numbers_stand_for_themselves(ids: list[int]) -> None:
    """Python's hash takes -1 for -2, and 0 for 2^61 - 1."""
    assert len(set(_hashes(ids).tolist())) == len(ids)


def test_keys_of_parts_are_told_apart() -> None:
    ids = [("a", -1), ("a", -2), ("a", "-1"), ("a-", 1), ("a", 2**61 - 1), ("a", 0)]
    assert len(set(_hashes(ids).tolist())) == len(ids)


items = st.lists(st.sampled_from(["i1", "i2", "i3", "i4"]), min_size=1, max_size=4, unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), items, st.sampled_from(["u1", "u2"])),
        st.tuples(st.just("look"), items, st.sampled_from(["u1", "u2"]), st.sampled_from([10.0, 60.0])),
        st.tuples(st.just("tell"), st.sampled_from(["i1", "i2", "i3"])),
        st.tuples(st.just("wait"), st.sampled_from([5.0, 30.0, 80.0])),
    ),
    max_size=40,
)


@given(steps)
def test_what_is_known_is_what_was_kept_last(script: list[Any]) -> None:
    world = World()
    model: dict[tuple[str, str], tuple[float, float]] = {}
    for number, (action, *given_) in enumerate(script):
        if action == "keep":
            question = world.question(*given_[0], subject=given_[1])
            world.keep(question, number * 10)
            model |= {(given_[1], item): (number * 10.0 + place, world.now_s) for place, item in enumerate(given_[0])}
        elif action == "look":
            question = world.question(*given_[0], subject=given_[1])
            expected = {}
            for item in given_[0]:
                score, made_s = model.get((given_[1], item), (0.0, -1e9))
                if world.now_s - made_s <= given_[2]:
                    expected[item] = score
            assert world.known(question, given_[2]) == expected
        elif action == "tell":
            world.log.tell([(("shop", "entity", "item"), [given_[0]])])
            model = {at: kept for at, kept in model.items() if at[1] != given_[0]}
        else:
            world.now_s += given_[0]
