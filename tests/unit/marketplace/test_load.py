"""Load generators in processes of their own: through a router's wire, and on the floor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.calls import call_of
from tests.fakes.router import FakeRouter

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.store.redis import RedisStore
from marketplace import load as load_module
from marketplace import manifests, producer, train
from marketplace.data import Dataset
from marketplace.features import Features
from marketplace.load import Generator, Spec
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.registry.manifests import load
from plait.registry.resources import snapshot_of


def test_a_spec_survives_the_pipe() -> None:
    spec = Spec(way="mesh", seconds=0.5, questions=[("u", ["a", "b"])], callers=2, router="127.0.0.1:1", api_key="k")
    assert Spec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == dataclasses.replace(spec, questions=[["u", ["a", "b"]]])  # type: ignore[list-item]


async def test_through_the_mesh() -> None:
    async with FakeRouter() as router:
        questions = [(f"u{n}", [f"i{m}" for m in range(n + 1)]) for n in range(5)]
        spec = Spec(way="mesh", seconds=0.3, questions=questions, callers=3, router=router.address, api_key="k")
        generator = await Generator.start(spec)
        assert len(router.received) == 1  # the warm-up; nothing is measured before it may begin
        taken = await generator.measure()
        assert generator._process.returncode == 0
    assert len(router.received) == len(taken) + 1 > 10
    assert all(0 < seconds < 20 for seconds in taken)
    assert {r.request.route for r in router.received} == {manifests.ROUTE}
    asked = {(r.request.subject.string_ids[0], len(r.request.candidates.string_ids)) for r in router.received}
    assert asked == {(f"u{n}", n + 1) for n in range(5)}  # every question is asked
    assert {r.metadata["authorization"] for r in router.received} == {"Bearer k"}


async def test_on_the_floor(redis_url: str, tmp_path: Path, data: Dataset, features: Features, trained: Any) -> None:
    snapshot = snapshot_of(1, [m.record for m in load([manifests.FOLDER / "feature-views.yaml"])], [])
    store = RedisStore(redis_url)
    for batch in producer.batches(data, features):
        await Ingestion(store, lambda: snapshot).write(batch, pb.WriteFeaturesResponse(), call_of())
    await store.close()
    folder = train.export(trained.model, data, features, tmp_path / "artifact", name="r", feature_set="f")
    questions = [(user, list(data.item_ids[:10])) for user in data.user_ids[:3]]
    spec = Spec(way="floor", seconds=0.2, questions=questions, redis_url=redis_url, model=str(folder / "model.pt"))
    generator = await Generator.start(spec)
    taken = await generator.measure()
    assert generator._process.returncode == 0
    assert len(taken) > 3
    assert np.sum(taken) < 20


async def test_one_that_cannot_start_is_reaped_and_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    begin = load_module.asyncio.create_subprocess_exec

    async def remember(*arguments: Any, **options: Any) -> Any:
        started.append(await begin(*arguments, **options))
        return started[0]

    monkeypatch.setattr(load_module.asyncio, "create_subprocess_exec", remember)
    with pytest.raises(RuntimeError, match="did not start; its error is above"):
        await Generator.start(Spec(way="floor", seconds=0.1, questions=[("u", ["i"])], model="/nonexistent/model.pt"))
    assert started[0].returncode == 1
    assert "Traceback" in capfd.readouterr().err
