"""`plait demo`: the whole road once, with real data, on one screen."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from marketplace import data as data_module
from marketplace import features as features_module
from marketplace import manifests, producer, train
from marketplace.data import Dataset
from marketplace.features import Array, Features
from marketplace.floor import Floor
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as feature_pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as feature_pb_grpc
from plait.client import Ranking, SyncRankingClient
from plait.errors import PlaitError, Unavailable
from plait.local.endpoints import Endpoints
from plait.local.mesh import Mesh
from plait.registry.manifests import Manifest, load, pin_artifacts
from plait.registry.records import Snapshot
from plait.registry.store import Store

CANDIDATES: Final = 500
CALLS: Final = 200
SHOWN_USERS: Final = 4
_READY_WITHIN_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A mesh with the example's rows and model in it."""

    endpoints: Endpoints
    snapshot: Snapshot
    data: Dataset
    features: Features
    artifact: Path
    report: train.Report
    written: producer.Written
    up_s: float


def run(console: Console, json_path: Path | None = None, state_dir: Path | None = None) -> dict[str, Any]:
    """Run the demo; print it, write its facts to `json_path`, return them."""
    return asyncio.run(_run(console, json_path, state_dir))


async def _run(console: Console, json_path: Path | None, state_dir: Path | None) -> dict[str, Any]:
    async with prepared(console, state_dir) as world:
        with console.status("ranking"):
            facts = await asyncio.to_thread(_measure, world)
        with console.status("counting events"):
            facts["max_count_diff"] = await _counted(world.endpoints, world.data)
        _show(console, world, facts)
    facts.pop("rankings")
    write_json(console, json_path, facts)
    return facts


def write_json(console: Console, path: Path | None, facts: dict[str, Any]) -> None:
    """Write facts to a file, if one is asked for, and say so."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        console.print(f"the same facts are in {path}")


@asynccontextmanager
async def prepared(console: Console, state_dir: Path | None) -> AsyncIterator[Prepared]:
    """Start a mesh, replay the events through its write path, train and publish the model, apply the manifests; end it all after.

    A state folder that is given is kept, and must be fresh: published versions never change. Without one a temporary folder is used.
    """
    state = state_dir or Path(tempfile.mkdtemp(prefix="plait-demo-"))
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    try:
        with console.status("fetching MovieLens-100K"):
            data = await asyncio.to_thread(data_module.load)
            features = await asyncio.to_thread(features_module.compute, data)
        began = time.perf_counter()
        with console.status("starting PostgreSQL, Redis, feature-retrieval, model-worker and router"):
            mesh = await Mesh(state).__aenter__()
        try:
            up_s = time.perf_counter() - began
            with bar:
                await apply(
                    mesh.endpoints, load([manifests.FOLDER / f"{name}.yaml" for name in ("feature-views", "feature-set", "activity")])
                )
                written = await _replay(mesh.endpoints, data, features, bar)
                await _publish(mesh.endpoints, data, bar)
                artifact, report = await _train(data, features, state, bar)
            with console.status("publishing the model, waiting until it is warm"):
                snapshot = await apply(mesh.endpoints, _model_manifests(artifact))
                await _ready(mesh.endpoints, data)
            yield Prepared(
                endpoints=mesh.endpoints,
                snapshot=snapshot,
                data=data,
                features=features,
                artifact=artifact,
                report=report,
                written=written,
                up_s=up_s,
            )
        finally:
            await mesh.__aexit__(None, None, None)
    finally:
        if state_dir is None:
            shutil.rmtree(state, ignore_errors=True)


async def apply(endpoints: Endpoints, found: list[Manifest]) -> Snapshot:
    """Do what `plait apply -f` does; return the registry as it is then."""
    async with await Store.open(endpoints.postgres_dsn) as store:
        await store.apply(pin_artifacts(found), actor="plait demo", reason="the marketplace example")
        return await store.snapshot()


def _model_manifests(artifact: Path) -> list[Manifest]:
    """Return the Model and Route manifests, with the artifact where this run has put it."""
    found = load([manifests.FOLDER / "model.yaml", manifests.FOLDER / "route.yaml"])
    placed = []
    for manifest in found:
        record: Any = manifest.record
        if manifest.kind == "Model":
            versions = tuple(dataclasses.replace(version, artifact=str(artifact)) for version in record.versions)
            manifest = dataclasses.replace(manifest, record=dataclasses.replace(record, versions=versions))  # noqa: PLW2901
        placed.append(manifest)
    return placed


async def _replay(endpoints: Endpoints, data: Dataset, features: Features, bar: Progress) -> producer.Written:
    task = bar.add_task(f"replaying {len(data.rating):,} events through the write path (rows)", total=producer.row_count(data))
    async with grpc.aio.insecure_channel(endpoints.feature_retrieval) as channel:
        await _written_once(channel, endpoints.api_key)
        return await producer.replay(channel, endpoints.api_key, data, features, lambda rows: bar.advance(task, rows))


async def _publish(endpoints: Endpoints, data: Dataset, bar: Progress) -> None:
    task = bar.add_task("publishing the events themselves, from which item-activity is counted", total=len(data.rating))
    async with grpc.aio.insecure_channel(endpoints.feature_retrieval) as channel:
        await producer.publish(channel, endpoints.api_key, data, time.time(), lambda events: bar.advance(task, events))


async def _counted(endpoints: Endpoints, data: Dataset) -> float:
    """Wait until every event is applied; return the largest difference between a listing's number of ratings online and offline."""
    metadata = (("x-api-key", endpoints.api_key),)
    async with grpc.aio.insecure_channel(endpoints.feature_retrieval) as channel:
        stub: Any = feature_pb_grpc.FeatureRetrievalServiceStub(channel)
        give_up = time.monotonic() + _READY_WITHIN_S
        status = feature_pb.GetViewStatusRequest(feature_view=manifests.ACTIVITY)
        while (await stub.GetViewStatus(status, metadata=metadata, timeout=5)).lag_events:
            if time.monotonic() > give_up:
                raise Unavailable(f"the events are not applied after {_READY_WITHIN_S:.0f} s: see the log of feature-retrieval")
            await asyncio.sleep(0.05)
        request = feature_pb.GetFeaturesRequest(feature_set=manifests.ACTIVITY)
        request.entities.add(entity_type="item").ids.string_ids.extend(data.item_ids)
        answer = await stub.GetFeatures(request, metadata=metadata, timeout=10)
    online = np.frombuffer(answer.tensors[0].data, np.float32).reshape(tuple(answer.tensors[0].shape))[:, 0]
    return float(np.abs(online - np.bincount(data.event_item, minlength=len(data.item_ids))).max())


async def _written_once(channel: grpc.aio.Channel, api_key: str) -> None:
    """Wait until feature-retrieval has seen the views that were just applied."""
    stub: Any = feature_pb_grpc.FeatureRetrievalServiceStub(channel)
    request = feature_pb.DescribeFeatureSetRequest(feature_set=manifests.FEATURE_SET)
    give_up = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            await stub.DescribeFeatureSet(request, metadata=(("x-api-key", api_key),), timeout=5)
        except grpc.aio.AioRpcError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.05)
        else:
            return


async def _train(data: Dataset, features: Features, state: Path, bar: Progress) -> tuple[Path, train.Report]:
    task = bar.add_task("training the ranker on the earlier 80 % of time (%)", total=100)

    def work() -> tuple[Path, train.Report]:
        threads = torch.get_num_threads()
        began = time.perf_counter()
        model = train.train(data, features, lambda done: bar.update(task, completed=int(done * 100)))
        report = train.judge(model, data, features, time.perf_counter() - began)
        torch.set_num_threads(threads)
        folder = state.absolute() / "artifact"
        train.export(model, data, features, folder, name=manifests.MODEL, feature_set=manifests.FEATURE_SET)
        return folder, report

    return await asyncio.to_thread(work)


async def _ready(endpoints: Endpoints, data: Dataset) -> None:
    """Wait until the model answers a Rank: router and worker have seen it, and it is warm. Until then popularity does, or nobody."""

    def attempt() -> None:
        give_up = time.monotonic() + _READY_WITHIN_S
        with SyncRankingClient(endpoints.router, api_key=endpoints.api_key) as client:
            while True:
                try:
                    ranking = client.rank(manifests.ROUTE, data.user_ids[0], list(data.item_ids[:2]), timeout_s=5)
                except PlaitError as error:
                    found = str(error)
                else:
                    if ranking.tier == "full":
                        return
                    found = f"tier {ranking.tier} answers"
                if time.monotonic() > give_up:
                    raise Unavailable(f"the model did not become ready within {_READY_WITHIN_S:.0f} s: {found}")
                time.sleep(0.05)

    await asyncio.to_thread(attempt)


def candidates_of(data: Dataset, user: int, count: int, seed: int = 0) -> list[str]:
    """Return `count` items the user has not rated, at random but always the same."""
    unseen = np.setdiff1d(np.arange(len(data.item_ids)), data.event_item[data.event_user == user])
    chosen = np.random.default_rng(seed + user).permutation(unseen)[:count]
    return [data.item_ids[at] for at in chosen.tolist()]


def _measure(world: Prepared) -> dict[str, Any]:
    data, endpoints = world.data, world.endpoints
    users = np.random.default_rng(1).choice(len(data.user_ids), SHOWN_USERS, replace=False).tolist()
    with SyncRankingClient(endpoints.router, api_key=endpoints.api_key) as client:
        rankings = [(user, _ask(client, data, user, explain=True)) for user in users]
        difference = max(_difference(world, user, ranking) for user, ranking in rankings)
        asked = [(data.user_ids[user], candidates_of(data, user, CANDIDATES)) for user in range(CALLS)]
        floor = Floor(endpoints.redis_url, world.snapshot, world.artifact / "model.pt")
        mesh_s, floor_s = _time_in_turn([lambda user, items: client.rank(manifests.ROUTE, user, items), floor.rank], asked)
        floor.close()
    report = world.report
    return {
        "auc": report.auc,
        "baseline_auc": report.baseline_auc,
        "ndcg10": report.ndcg10,
        "baseline_ndcg10": report.baseline_ndcg10,
        "rank_p50_ms": percentile_ms(mesh_s, 50),
        "rank_p99_ms": percentile_ms(mesh_s, 99),
        "floor_p50_ms": percentile_ms(floor_s, 50),
        "max_score_diff": difference,
        "users": len(data.user_ids),
        "items": len(data.item_ids),
        "events": len(data.rating),
        "candidates": CANDIDATES,
        "calls": CALLS,
        "model_version": rankings[0][1].version,
        "train_s": report.train_s,
        "rows_written": world.written.rows,
        "rows_per_s": world.written.rows / world.written.seconds,
        "up_s": world.up_s,
        "rankings": rankings,
    }


def _ask(client: SyncRankingClient, data: Dataset, user: int, *, explain: bool = False) -> Ranking:
    return client.rank(manifests.ROUTE, data.user_ids[user], candidates_of(data, user, CANDIDATES), explain=explain, timeout_s=5)


def _difference(world: Prepared, user: int, ranking: Ranking) -> float:
    """Return the largest difference between the mesh's scores and the same model on features computed here, in one process."""
    at = {name: number for number, name in enumerate(world.data.item_ids)}
    items = np.array([at[str(item)] for item, _ in ranking.items])
    scores = offline_scores(world, user, items)
    return float(np.abs(scores - np.array([score for _, score in ranking.items], np.float32)).max())


def offline_scores(world: Prepared, user: int, items: np.ndarray[Any, Any]) -> Array:
    """Return the model's scores on the offline features as they are after all events."""
    features = world.features
    users = np.array([user])
    user_tensor = torch.from_numpy(features.user(users, features.user_behaviour.latest(users)))
    item_tensor = torch.from_numpy(features.item(items, features.item_stats.latest(items)))
    model = torch.jit.load(str(world.artifact / "model.pt")).eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        scores: Array = model(user_tensor, item_tensor, torch.tensor([0, len(items)])).numpy()
    return scores


def _time_in_turn(ways: list[Callable[[str, list[str]], Any]], asked: list[tuple[str, list[str]]]) -> list[list[float]]:
    """Time each way on each question, taking turns so that noise meets all of them; the first tenth again as warm-up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for user, items in [*asked[: len(asked) // 10], *asked]:
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way(user, items)
            taken.append(time.perf_counter() - began)
    return [taken[len(asked) // 10 :] for taken in seconds]


def percentile_ms(seconds: list[float], percent: float) -> float:
    """Return a percentile in milliseconds."""
    return float(np.percentile(np.array(seconds), percent) * 1000)


def _show(console: Console, world: Prepared, facts: dict[str, Any]) -> None:
    data = world.data
    titles = dict(zip(data.item_ids, data.titles, strict=True))
    (first, best), *others = facts["rankings"]
    console.print(f"[bold]plait demo[/] on {data_module.LICENCE}")
    console.print(
        f"mesh up in {facts['up_s']:.1f} s · {facts['rows_written']:,} rows from {facts['events']:,} events at {facts['rows_per_s']:,.0f} rows/s"
    )
    console.print(
        f"trained in {facts['train_s']:.1f} s on the earlier 80 % · on the later 20 %: "
        f"AUC [bold]{facts['auc']:.3f}[/] (popularity {facts['baseline_auc']:.3f}) · "
        f"NDCG@10 [bold]{facts['ndcg10']:.3f}[/] (popularity {facts['baseline_ndcg10']:.3f})"
    )
    person = f"user {data.user_ids[first]}: {data.age[first]:.0f}, {data.occupations[data.occupation[first]]}"
    table = Table(title=f"{person}: the first 10 of {CANDIDATES} listings, by {best.model} version {best.version}", title_justify="left")
    for column, justify in (("", "right"), ("listing", "left"), ("score", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for place, (item, score) in enumerate(best.items[:10], 1):
        table.add_row(str(place), titles[str(item)], f"{score:.3f}")
    console.print(table)
    for user, ranking in others:
        console.print(
            f"user {data.user_ids[user]}: " + " · ".join(titles[str(item)] for item, _ in ranking.items[:3]),
            overflow="ellipsis",
            no_wrap=True,
        )
    stages = best.timings
    if stages is not None:
        console.print(
            f"stages of one call: features {stages.features_us / 1000:.2f} ms (Redis {stages.store_us / 1000:.2f}) · "
            f"predict {stages.predict_us / 1000:.2f} ms (queue {stages.queue_us / 1000:.2f}, forward {stages.compute_us / 1000:.2f}) · "
            f"order {stages.order_us / 1000:.2f} ms · total {stages.total_us / 1000:.2f} ms"
        )
    ratio = facts["rank_p50_ms"] / facts["floor_p50_ms"]
    console.print(
        f"{CALLS} calls through the mesh: p50 [bold]{facts['rank_p50_ms']:.2f} ms[/], p99 {facts['rank_p99_ms']:.2f} ms · "
        f"floor (one process, no RPC) p50 {facts['floor_p50_ms']:.2f} ms · [bold]{ratio:.2f} ×[/]"
    )
    console.print(f"online equals offline: largest difference of {SHOWN_USERS * CANDIDATES:,} scores {facts['max_score_diff']:.2e}")
    console.print(
        f"counted from {facts['events']:,} events: largest difference to offline, of {facts['items']:,} listings, {facts['max_count_diff']:.0f}"
    )
