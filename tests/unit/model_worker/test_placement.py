"""Which devices a version gets: the worker's setting against model.yaml."""

from __future__ import annotations

import pytest

from model_worker import placement
from plait.errors import FailedPrecondition
from plait.registry.records import Execution


@pytest.mark.parametrize(
    ("asked", "setting", "found"),
    [
        ((), "cpu", ("cpu",)),
        ((), "cuda", ("cuda:0",)),
        ((), "cuda:3", ("cuda:3",)),
        ((2, 0), "cuda", ("cuda:2", "cuda:0")),
        ((1, 2), "cuda:2", ("cuda:2",)),
    ],
)
def test_what_is_asked_for_within_what_is_given(asked: tuple[int, ...], setting: str, found: tuple[str, ...]) -> None:
    assert placement.devices(Execution(devices=asked), setting) == found


@pytest.mark.parametrize(("asked", "setting"), [((0,), "cpu"), ((0, 1), "cuda:2")])
def test_a_gpu_that_is_not_given_is_refused_not_replaced(asked: tuple[int, ...], setting: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"computes on {setting}") as refused:
        placement.devices(Execution(devices=asked), setting)
    assert refused.value.reason == "DEVICE_UNAVAILABLE"


def test_a_device_has_a_number() -> None:
    assert [placement.index(device) for device in ("cuda", "cuda:0", "cuda:12")] == [0, 0, 12]
