"""The ledger: never over its budget, whatever the order of claims."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker import memory
from model_worker.memory import Claim, Ledger, Need, automatic_budget
from model_worker.memory_limit import Reading
from model_worker.settings import ModelSettings
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest, FileDigest
from plait.registry.records import Execution


@given(st.lists(st.tuples(st.sampled_from(["claim", "settle", "release"]), st.integers(0, 60)), max_size=40))
def test_the_budget_holds(steps: list[tuple[str, int]]) -> None:
    ledger, held = Ledger(lambda _: 100), list[Claim]()
    for step, size in steps:
        before = ledger.used_bytes("cpu")
        try:
            if step == "claim":
                held.append(ledger.claim(("a", str(size)), Need(device="cpu", size_bytes=size)))
            elif held and step == "settle":
                ledger.settle(held[-1], size)
            elif held:
                ledger.release(held.pop())
        except FailedPrecondition:
            assert ledger.used_bytes("cpu") == before
        assert 0 <= ledger.used_bytes("cpu") <= 100


def test_what_is_really_free_counts_too_and_devices_apart() -> None:
    ledger = Ledger(lambda device: 100 if device == "cpu" else None, lambda device: 30 if device == "cpu" else None)
    ledger.claim(("a", "1"), Need(device="cpu", size_bytes=20))
    assert ledger.shortfall_bytes(Need(device="cpu", size_bytes=15)) == 5
    ledger.claim(("b", "1"), Need(device="cuda:0", size_bytes=10**12))
    with pytest.raises(FailedPrecondition, match="a/1 20 B"):
        ledger.claim(("c", "1"), Need(device="cpu", size_bytes=15))


def test_the_automatic_budget() -> None:
    assert automatic_budget(Reading(limit_bytes=1000, free_bytes=0), 300, 0.8) == 500
    assert automatic_budget(None, 300, 0.8) is None


def devices_of(*size_bytes: int) -> tuple[Ledger, Claim]:
    """Claim of the process's own memory, then of one GPU after the other, with 100 bytes each."""
    ledger = Ledger(lambda _: 100)
    claim = ledger.claim(("a", "1"), Need(device="cpu", size_bytes=90))
    for number, size in enumerate(size_bytes):
        claim = ledger.claim(("a", "1"), Need(device=f"cuda:{number}", size_bytes=size), beside=claim)
    return ledger, claim


def used(ledger: Ledger) -> list[int]:
    return [ledger.used_bytes(device) for device in ("cpu", "cuda:0", "cuda:1")]


def test_a_version_on_several_gpus_holds_an_equal_part_of_each_and_nothing_of_the_process() -> None:
    ledger, claim = devices_of(40, 40)
    assert used(ledger) == [90, 40, 40]
    ledger.settle(claim, 61)
    assert used(ledger) == [0, 31, 31]
    assert [claim.on(device) for device in ("cpu", "cuda:1", "cuda:2")] == [0, 31, 0]
    assert not any(held.pending for held in claim.all())
    ledger.release(claim)
    ledger.release(claim)
    assert used(ledger) == [0, 0, 0]


def test_what_turns_out_too_large_for_one_gpu_changes_nothing() -> None:
    ledger, claim = devices_of(40, 40)
    ledger.claim(("b", "1"), Need(device="cuda:0", size_bytes=50))
    with pytest.raises(FailedPrecondition, match="of cuda:0 memory"):
        ledger.settle(claim, 120)
    assert used(ledger) == [90, 90, 40]


def test_a_gpu_without_room_is_named_with_what_to_do() -> None:
    ledger, _ = devices_of(80)
    with pytest.raises(FailedPrecondition, match=r"of cuda:0 memory.*a/1 80 B.*models\.device_memory_share"):
        ledger.claim(("b", "1"), Need(device="cuda:0", size_bytes=30))


def test_a_gpus_budget_is_its_share_and_what_others_left() -> None:
    gpus = {"cuda:0": (700, 1000), "cuda:1": (10, 1000)}
    ledger = memory.ledger(ModelSettings(device_memory_share=0.5), gpus.get)
    assert [ledger.shortfall_bytes(Need(device=device, size_bytes=600)) for device in ("cuda:0", "cuda:1", "cuda:2")] == [100, 590, -0]
    ledger.claim(("a", "1"), Need(device="cuda:0", size_bytes=500))
    with pytest.raises(FailedPrecondition):
        ledger.claim(("b", "1"), Need(device="cuda:0", size_bytes=1))


@pytest.mark.parametrize(("kind", "expected"), [("thread", 3000), ("process", 6000 + 2 * 512 * 1024**2)])
def test_the_estimate_on_a_gpu_counts_a_context_for_each_process(kind: Literal["thread", "process"], expected: int) -> None:
    manifest = ArtifactManifest(
        name="m",
        format="torchscript",
        entry="m",
        inputs=(),
        outputs=(),
        files={"m": FileDigest(sha256="0", size_bytes=2000)},
        execution=Execution(kind=kind, instances=2),
    )
    assert memory.estimate(manifest, "cuda:0", 2 if kind == "process" else 1).size_bytes == expected
