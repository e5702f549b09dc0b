"""`plait features rebuild` against a service that loses its Redis and, for a while, its way to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from typer.testing import Result

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc

Plait = Callable[..., Result]
ENV = {"PLAIT_API_KEY": "plait_key-of-an-admin"}
TOTAL = 40


class Copy(pb_grpc.FeatureRetrievalServiceServicer):
    """A durable copy of forty rows that are written ten at a time; `breaks` says after how many pages each call is cut off."""

    def __init__(self) -> None:
        self.breaks: list[int] = []
        self.asked: list[Any] = []
        self.rows: set[int] = set()
        self.lock = threading.Lock()

    def RebuildFeatures(self, request: Any, context: Any) -> Iterator[Any]:
        with self.lock:
            self.asked.append(request)
            left = self.breaks.pop(0) if self.breaks else 99
        start = int(request.cursor or b"0")
        if request.feature_view == "none":
            context.abort(grpc.StatusCode.NOT_FOUND, "no feature view")
        for at in range(start, TOTAL, 10):
            if left == 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "redis is away")
            left -= 1
            self.rows |= set(range(at, at + 10))
            yield pb.RebuildFeaturesResponse(
                read=at + 10 - start, total=TOTAL, applied=at + 10 - start, erasures=3, cursor=b"%d" % (at + 10)
            )


@pytest.fixture
def copy() -> Iterator[tuple[Copy, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    held = Copy()  # type: ignore[abstract]  # only what the command calls
    pb_grpc.add_FeatureRetrievalServiceServicer_to_server(held, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield held, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.cli.features.rebuild._PAUSE_S", 0.0)


def test_everything_comes_back(plait: Plait, copy: tuple[Copy, str]) -> None:
    held, address = copy
    done = plait("features", "rebuild", "item-stats", "--rate", "5000", "--address", address, env=ENV)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "40 rows read, 40 of them written; 3 erasures are in force\n"
    assert [(one.feature_view, one.max_rows_per_s) for one in held.asked] == [("item-stats", 5000)]


def test_it_goes_on_over_outages_from_where_it_was(plait: Plait, copy: tuple[Copy, str]) -> None:
    held, address = copy
    held.breaks = [1, 0, 2, 0]
    done = plait("features", "rebuild", "--address", address, "--json", env=ENV)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"read": 40, "applied": 40, "erasures": 3}
    assert [one.cursor for one in held.asked] == [b"", b"10", b"10", b"30", b"30"]
    assert held.rows == set(range(TOTAL))


def test_it_gives_up_where_it_gets_no_further(plait: Plait, copy: tuple[Copy, str]) -> None:
    held, address = copy
    held.breaks = [1, *[0] * 20]
    done = plait("features", "rebuild", "--address", address, env=ENV)
    assert done.exit_code != 0
    assert "redis is away" in done.stderr
    assert len(held.asked) == 6


def test_what_is_wrong_is_not_tried_again(plait: Plait, copy: tuple[Copy, str]) -> None:
    held, address = copy
    done = plait("features", "rebuild", "none", "--address", address, env=ENV)
    assert done.exit_code != 0
    assert len(held.asked) == 1
