"""`plait features publish`, `dead-letters` and `status` against a real service on a real Redis."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from tests.fakes.event_service import EventService, consuming, event_service
from tests.fakes.event_world import LISTINGS, NOW_S, event
from typer.testing import Result

Plait = Callable[..., Result]
_TIME = "2025-10-09T08:53:10Z"  # ten seconds before NOW_S


class Running:
    """The service on a thread of its own, as the commands run loops of theirs."""

    def __init__(self, redis_url: str) -> None:
        self.address = ""
        self._url = redis_url
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="event service")

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        async with event_service(self._url) as service, consuming(service.consumer()):
            self.service: EventService = service
            self.address = service.address
            self._ready.set()
            await self._stop.wait()

    def settled(self) -> None:
        asyncio.run_coroutine_threadsafe(self._settled(), self._loop).result(30)

    async def _settled(self) -> None:
        while (await self.service.source("front").backlog_of("shop")).events:
            await asyncio.sleep(0.005)


@pytest.fixture
def running(redis_url: str) -> Iterator[Running]:
    with Running(redis_url) as service:
        yield service


@pytest.fixture
def features(plait: Plait, running: Running) -> Plait:
    def run(*words: object, **options: Any) -> Result:
        where = {"PLAIT_FEATURES_ADDRESS": running.address, "PLAIT_API_KEY": "shop-key"}
        return plait("features", *words, env=where, **options)

    return run


def line(event_id: str, **more: Any) -> str:
    made = {"event_id": event_id, "type": "view", "event_time": _TIME, "subject": {"user": "u1"}, "object": {"listing": "l1"}}
    return json.dumps(made | more)


def test_events_of_a_file_are_counted_once_and_bad_ones_are_told(features: Plait, running: Running, tmp_path: Path) -> None:
    full = json_format.MessageToJson(event("e3"), indent=None)
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join([line("e1"), "", line("e2"), full, line("")]))
    first = features("publish", "--from", file)
    assert first.exit_code == 1
    assert "3 events are in the stream" in first.stdout
    assert "EVENT_ID_INVALID" in first.stdout
    again = features("publish", "--from", "-", "--json", input=line("e1"))
    assert (again.exit_code, json.loads(again.stdout)) == (0, {"accepted": 1, "refused": []})
    running.settled()
    told = json.loads(features("status", LISTINGS.name, "--json").stdout)
    assert told["lag_events"] == 0
    assert told["newest_event_time_us"] == int(NOW_S * 1e6)
    assert (told["serving_epoch"], told["building_epoch"], told["dead_letters"]) == (0, None, 0)
    assert "2025-10-09T08:53:20" in features("status", LISTINGS.name).stdout


@pytest.mark.parametrize("bad", ["{", "[]", '{"type": "walk"}', '{"event_idd": "7"}', '"text"'])
def test_a_line_that_is_no_event_is_named(features: Plait, tmp_path: Path, bad: str) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(f"{line('e1')}\n{bad}\n")
    failed = features("publish", "--from", file)
    assert failed.exit_code == 1
    assert f"{file}:2:" in failed.stderr


def test_a_file_that_cannot_be_read_is_named(features: Plait, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(line("e1").encode() + b"\n\xff\n")
    failed = features("publish", "--from", tmp_path / "bytes")
    assert (failed.exit_code, f"{tmp_path / 'bytes'}:2:" in failed.stderr) == (1, True)
    for place in (tmp_path, tmp_path / "none"):
        assert features("publish", "--from", place).exit_code == 2


def test_dead_letters_are_for_administrators(features: Plait, running: Running, plait: Plait) -> None:
    for words in (("list",), ("redrive", "--all")):
        where = {"PLAIT_FEATURES_ADDRESS": running.address, "PLAIT_API_KEY": "lean-key"}
        refused = plait("features", "dead-letters", *words, env=where)
        assert refused.exit_code == 1
        assert "[SCOPE_MISSING]" in refused.stderr


def test_dead_letters_are_listed_and_redriven(features: Plait, running: Running) -> None:
    features("publish", "--from", "-", input="\n".join(line(f"e{n}", type="make_offer") for n in range(3)))  # they lack a price
    running.settled()
    told = json.loads(features("dead-letters", "list", "--json", "--limit", 2).stdout)
    assert told["total"] == 3
    assert [each["event"]["event_id"] for each in told["dead_letters"]] == ["e2", "e1"]
    assert {each["reason"] for each in told["dead_letters"]} == {"VALUE_INVALID"}
    shown = features("dead-letters", "list", "--reason", "VALUE_INVALID").stdout
    assert "3 of 3" in shown
    assert "e1" not in shown.replace("redrives", "")  # what somebody did is only in --json
    assert features("dead-letters", "redrive").exit_code == 2
    assert "1 events" in features("dead-letters", "redrive", told["dead_letters"][0]["id"]).stdout
    running.settled()
    assert json.loads(features("dead-letters", "redrive", "--all", "--json").stdout) == {"redriven": 3}
    running.settled()
    redrives = [each["redrives"] for each in json.loads(features("dead-letters", "list", "--json").stdout)["dead_letters"]]
    assert sorted(redrives) == [1, 1, 2]
    gone = features("dead-letters", "redrive", "1-1")
    assert gone.exit_code == 1
    assert "plait features dead-letters list" in gone.stderr
