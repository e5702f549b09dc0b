"""Arguments are checked, bounded and never ignored, and everything wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from model_worker.backends.architectures.config import MAX_ROWS, Config
from plait.errors import FailedPrecondition


def problems(config: Config) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        config.finish("mine")
    assert refused.value.reason == "ARTIFACT_INVALID"
    return refused.value.message


def test_what_is_right_is_handed_out() -> None:
    config = Config({"a": 3, "b": (1, 2), "c": 0.5, "d": True, "e": "two", "f": "gelu", "g": MAX_ROWS})
    assert (config.size("a"), config.sizes("b"), config.number("c", 1, low=0, high=1), config.flag("d")) == (3, (1, 2), 0.5, True)
    assert (config.choice("e", ("one", "two")), config.activation("f"), config.size("g", largest=MAX_ROWS)) == ("two", nn.GELU, MAX_ROWS)
    config.finish("mine")


def test_what_is_left_out_has_a_default() -> None:
    config = Config({})
    assert (config.sizes("b"), config.number("c", 1, low=0, high=1), config.flag("d"), config.choice("e", ("one",))) == (
        (),
        1,
        False,
        "one",
    )
    assert config.activation() is nn.ReLU
    config.finish("mine")


@pytest.mark.parametrize(
    ("ask", "value", "says"),
    [
        (lambda c: c.size("a"), 0, "a: expected a whole number from 1 to 16777216, found 0"),
        (lambda c: c.size("a"), True, "found True"),
        (lambda c: c.size("a"), 3.0, "found 3.0"),
        (lambda c: c.size("a"), 1 << 25, "found 33554432"),
        (lambda c: c.size("a"), None, "found nothing"),
        (lambda c: c.sizes("a"), (1,) * 257, "a: expected at most 256 whole numbers"),
        (lambda c: c.sizes("a"), 3, "found 3"),
        (lambda c: c.sizes("a", least=1), (), "a: expected 1 to 256 whole numbers"),
        (lambda c: c.number("a", 1, low=0, high=2), 3, "a: expected a number from 0 to 2, found 3"),
        (lambda c: c.number("a", 1, low=0, high=2), True, "found True"),
        (lambda c: c.flag("a"), 1, "a: expected true or false, found 1"),
        (lambda c: c.choice("a", ("one", "two")), "three", "a: expected one of one, two, found 'three'"),
        (lambda c: c.activation("a"), "eval", "a: expected one of relu, gelu"),
        (lambda c: None, 1, "a: is no argument of it"),
    ],
)
def test_what_is_wrong_is_told_and_the_builder_goes_on(ask: Callable[[Config], Any], value: Any, says: str) -> None:
    config = Config({"a": value, "more": 1})
    ask(config)
    message = problems(config)
    assert says in message
    assert "more: is no argument of it" in message


def test_a_long_list_of_problems_is_cut() -> None:
    assert problems(Config({f"a{n}": 1 for n in range(50)})).endswith("and 30 more")
