"""`plait features explain` against a service on a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.fakes.feature_world import TOKEN, feature_world, make_batch
from typer.testing import Result

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.registry.records import ApiKey, Entity, Feature, FeatureSet, FeatureView, KeyPart, ModelInput, RequestFeature, Snapshot
from plait.rpc.credentials import digest

KEY = "plait_key-of-a-person"
Plait = Callable[..., Result]
OFFER = Entity(type="offer", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64")))
SNAPSHOT = Snapshot(
    keys={digest(KEY): ApiKey(id="k", tenant="default", sha256=digest(KEY))},
    feature_views={
        "offers": FeatureView(name="offers", entity=OFFER, features=(Feature(name="price"), Feature(name="rating", default=3))),
        "users": FeatureView(name="users", entity=Entity(type="user", key="int64"), features=(Feature(name="age", default=30),)),
    },
    feature_sets={
        "home": FeatureSet(
            name="home",
            request=(
                RequestFeature(name="km", entity="offer"), RequestFeature(name="n", dtype="int64", default=4),
                RequestFeature(name="new", dtype="bool", default=False),
            ),
            inputs=(
                ModelInput(name="offer", entity="offer", features=("offers:price", "$request:km", "offers:rating", "$request:n", "$request:new")),
                ModelInput(name="user", entity="user", features=("users:age",)),
            ),
        )
    },
)  # fmt: skip


@pytest.fixture
def address(redis_url: str) -> Iterator[str]:
    """A service on another thread's loop, with one offer in it; the command has a loop of its own."""
    ready: list[Any] = []
    started = threading.Event()

    async def serve() -> None:
        async with feature_world(SNAPSHOT, redis_url) as w:
            batch = make_batch("offers", [], {"price": [2.5]})
            key = batch.ids.composite_ids.add()
            key.parts.add(string_part="int:a")
            key.parts.add(int64_part=-7)
            await w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN)
            done = asyncio.Event()
            ready.extend([w.server.address, asyncio.get_running_loop(), done])
            started.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    address, loop, done = ready
    yield address
    loop.call_soon_threadsafe(done.set)
    thread.join()


ENV = {"PLAIT_API_KEY": KEY}
IDS = ("--id", "offer=text:int:a", "--id", "offer=int:-7", "--id", "user=int:1")


def test_what_is_stored_and_what_became_of_it(plait: Plait, address: str) -> None:
    call = ("features", "explain", "home", *IDS, "--request", "km=1.5", "--request", "new=true", "--address", address)
    shown = plait(*call, env=ENV)
    assert shown.exit_code == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["offer", "0", "offers:price", "2.5", "2.5"] in lines
    assert ["offer", "1", "$request:km", "1.5"] in lines
    assert ["offer", "2", "offers:rating", "3", "default"] in lines
    assert ["offer", "3", "$request:n", "4", "default"] in lines
    assert ["offer", "4", "$request:new", "1"] in lines
    assert ["user", "0", "users:age", "30", "default"] in lines
    assert ["offers", "1", "0", "null", "redis"] in [line[:5] for line in lines]
    told = plait(*call, "--json", env=ENV)
    document = json.loads(told.stdout)
    assert [view["source"] for view in document["views"]] == ["ROW_SOURCE_REDIS", "ROW_SOURCE_NONE"]
    assert [column["value"] for column in document["columns"]] == [2.5, 1.5, 3, 4, 1, 30]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*IDS, "--request", "km=far"), "km takes one float32"),
        ((*IDS, "--request", "new=1"), "new takes one bool"),
        ((*IDS, "--request", "n=1.5"), "n takes one int64"),
        ((*IDS, "--request", "km"), "expected NAME=VALUE"),
        (("--id", "offer"), "expected NAME=VALUE"),
        (("--id", "user=int:x"), "whole number"),
        (("--id", f"user=int:{1 << 63}"), "whole number"),
        ((*IDS, "--request", "kms=1", "--request", "km=1"), "did you mean 'km'?"),
        (IDS, "'km' is missing and has no default"),
        ((*IDS[:4], "--id", "user=1", "--request", "km=1"), "set int64_ids"),
    ],
)
def test_what_cannot_be_asked_says_what_to_do(plait: Plait, address: str, words: tuple[str, ...], says: str) -> None:
    result = plait("features", "explain", "home", *words, "--address", address, env=ENV)
    assert result.exit_code != 0
    assert says in result.stderr
