"""The demo's own arithmetic; the road itself is driven end to end elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from marketplace import demo, manifests, producer, train
from marketplace.data import Dataset
from marketplace.features import Features
from plait.client import Ranking
from plait.local.endpoints import Endpoints
from plait.registry.records import EMPTY, Model


@pytest.fixture
def world(data: Dataset, features: Features, trained: Any, tmp_path: Path) -> demo.Prepared:
    """Everything the demo has prepared, but for the mesh."""
    artifact = train.export(trained.model, data, features, tmp_path / "artifact", name=manifests.MODEL, feature_set=manifests.FEATURE_SET)
    return demo.Prepared(
        endpoints=Endpoints(router="", feature_retrieval="", model_worker="", postgres_dsn="", redis_url="", api_key="", service_token=""),
        snapshot=EMPTY,
        data=data,
        features=features,
        artifact=artifact,
        report=train.judge(trained.model, data, features, 1.0),
        written=producer.Written(rows=10, applied=10, seconds=0.5),
        up_s=1.0,
    )


def test_candidates_are_unseen_and_the_same_each_time(data: Dataset) -> None:
    for user in range(5):
        chosen = demo.candidates_of(data, user, 20)
        seen = {data.item_ids[at] for at in data.event_item[data.event_user == user].tolist()}
        assert len(set(chosen)) == len(chosen) == 20
        assert not seen & set(chosen)
        assert demo.candidates_of(data, user, 20) == chosen
        assert demo.candidates_of(data, user, 20, seed=1) != chosen
        assert set(demo.candidates_of(data, user, 10_000)) == set(data.item_ids) - seen  # never more than there are


def test_percentiles_are_in_milliseconds() -> None:
    assert demo.percentile_ms([0.001, 0.002, 0.003, 0.004, 0.005], 50) == pytest.approx(3.0)
    assert demo.percentile_ms([0.0, 0.1], 99) == pytest.approx(99.0)


def test_facts_are_written_where_asked(tmp_path: Path) -> None:
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        told = Console(width=300, record=True, file=nowhere)
        demo.write_json(told, None, {"auc": 0.9})
        assert told.export_text() == ""
        demo.write_json(told, tmp_path / "deep" / "facts.json", {"auc": 0.9})
        assert "facts.json" in told.export_text()
    assert json.loads((tmp_path / "deep" / "facts.json").read_text()) == {"auc": 0.9}


def test_the_model_s_manifest_points_to_where_this_run_put_it(tmp_path: Path) -> None:
    placed = demo._model_manifests(tmp_path / "artifact")
    assert [m.kind for m in placed] == ["Model", "Route"]
    [record] = [m.record for m in placed if isinstance(m.record, Model)]
    assert [v.artifact for v in record.versions] == [str(tmp_path / "artifact")]


def test_ways_take_turns_and_the_warm_up_is_not_counted() -> None:
    asked: list[tuple[str, str]] = []
    ways = [lambda user, items, name=name: asked.append((name, user)) for name in ("mesh", "floor")]
    questions = [(f"u{n}", ["i"]) for n in range(20)]
    taken = demo._time_in_turn(ways, questions)  # type: ignore[arg-type]
    assert [len(seconds) for seconds in taken] == [20, 20]
    expected = [*questions[:2], *questions]
    assert asked == [(name, user) for user, _ in expected for name in ("mesh", "floor")]


def test_the_difference_is_the_largest_of_all_scores(world: demo.Prepared, trained: Any) -> None:
    items = np.array([5, 0, 9])
    scores = demo.offline_scores(world, 3, items)
    features, who = world.features, np.array([3])
    with torch.inference_mode():
        expected = trained.model(
            torch.from_numpy(features.user(who, features.user_behaviour.latest(who))),
            torch.from_numpy(features.item(items, features.item_stats.latest(items))),
            torch.tensor([0, 3]),
        )
    torch.testing.assert_close(torch.from_numpy(scores), expected)
    order = np.argsort(-scores)
    ranking = ranking_of([world.data.item_ids[items[at]] for at in order], [float(scores[at]) for at in order])
    assert demo._difference(world, 3, ranking) == pytest.approx(0, abs=1e-6)
    off = ranking_of([str(i) for i in ranking.item_ids], [s + (0.25 if at == 2 else 0.125) for at, s in enumerate(ranking.scores)])
    assert demo._difference(world, 3, off) == pytest.approx(0.25, abs=1e-5)


def ranking_of(ids: list[str], scores: list[float]) -> Ranking:
    return Ranking(
        item_ids=ids,
        scores=scores,
        model="ranker",
        version="1",
        variant="champion",
        request_id="",
        degraded_reasons=(),
        tier="full",
        revision=1,
        timings=None,
        feature_report=(),
    )
