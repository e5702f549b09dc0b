"""Stock clients against a running worker, and against a router with workers behind it: tritonclient, and KServe's where an interpreter that has it is named.

Each runs in a process of its own, because its generated stubs have the names of ours, and reports what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.echo_model import EchoLoader, echo_models
from tests.fakes.registry_world import eventually
from tests.fakes.router_world import RouterWorld, router_world
from tests.fakes.worker_world import (
    ITEM,
    RANK,
    SCORE,
    USER,
    Doubler,
    WorkerWorld,
    model,
    publish_ranker,
    published,
    scripted,
    snapshot,
    worker_world,
)

from plait.dtypes import BY_NAME
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    ModelInput,
    ModelVersion,
    Route,
    Signature,
    Snapshot,
    TensorSpec,
    Variant,
)

CLIENTS = Path(__file__).parents[1] / "fakes" / "clients"
KSERVE_PYTHON = "PLAIT_TEST_KSERVE_PYTHON"
# What triton_bad_input.py does; all else it asks for is INVALID_ARGUMENT.
NOT_FOUND = {
    "no model", "model unknown", "version unknown", "version that is no number", "metadata of none", "metadata of a version unknown",
    "config of none", "ready of none", "ready of a version unknown", "statistics of a version unknown", "load of none", "unload of none",
    "trace settings of none",
}  # fmt: skip
RIGHT = {
    "version -1", "id of 100 kB", "unknown parameters", "sequence", "priority", "timeout", "more classes than there are",
    "classes of integers", "metadata", "config", "ready", "statistics", "statistics of a version alone",
}  # fmt: skip


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return publish_ranker(tmp_path_factory.mktemp("ranker") / "1")


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    """A Doubler whose two outputs have names."""
    folder = tmp_path_factory.mktemp("cats")
    scripted(Doubler()).save(str(folder / "model.pt"))
    (folder / "labels.txt").write_text("cat\ndog\n")
    tensors = [TensorSpec(name=name, dtype="float32", shape=(-1, 2)) for name in "xy"]
    manifest = ArtifactManifest(
        name="cats", format="torchscript", entry="model.pt", inputs=(tensors[0],), outputs=(tensors[1],), labels={"y": "labels.txt"}
    )
    return published(folder, manifest)


async def run_client(
    w: WorkerWorld | RouterWorld, script: str, *more: str, python: str = sys.executable, env: Mapping[str, str] = os.environ
) -> Any:
    """Return what the client saw; its stderr, should it fail."""
    process = await asyncio.create_subprocess_exec(
        python, str(CLIENTS / script), w.server.address, *more, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return json.loads(out.decode().splitlines()[-1])


async def test_tritonclient_call_by_call(ranker: ModelVersion, cats: ModelVersion) -> None:
    world = snapshot(model("ranker", ranker), model("cats", cats), *echo_models())
    async with worker_world(world, models={"repository_control": True}, loader_type=EchoLoader) as w:
        seen = await run_client(w, "triton_sync.py")
    _check_look(seen["look"])
    assert seen["infer"] == {
        "answer": ["r-7", [1.0, 5.0], [0, 1]],
        "chosen": [True, [0, 1]],
        "classes": ["4.000000:1:dog", "8.000000:0:cat"],
        "echoed": dict.fromkeys(BY_NAME, True),
    }
    assert {name: status.removeprefix("StatusCode.") for name, (status, _) in seen["errors"].items()} == {
        "unknown model": "NOT_FOUND",
        "unknown version": "NOT_FOUND",
        "wrong shape": "INVALID_ARGUMENT",
        "missing input": "INVALID_ARGUMENT",
        "unknown output": "INVALID_ARGUMENT",
        "no time": "DEADLINE_EXCEEDED",
        "config": "NOT_FOUND",
        "statistics": "NOT_FOUND",
        "shared memory": "UNIMPLEMENTED",
        "cuda memory": "UNIMPLEMENTED",
        "log control": "PERMISSION_DENIED",
        "trace control": "PERMISSION_DENIED",
        "load": "NOT_FOUND",
    }
    assert "Request for unknown model" in seen["errors"]["unknown model"][1]
    assert seen["repository"]["index"] == [{"name": "ranker", "version": "1", "state": "READY"}]
    assert seen["repository"]["unloaded"][0] == "StatusCode.NOT_FOUND"
    assert seen["repository"]["loaded"] == [1.0, 5.0]
    _check_statistics(seen)


def _check_look(look: Any) -> None:
    assert look["health"] == [True] * 4
    assert look["server"]["name"] == "plait-model-worker"
    assert set(look["server"]["extensions"]) >= {"classification", "model_configuration", "model_repository", "statistics"}
    assert look["ranker"]["versions"] == ["1"]
    assert [(t["name"], t["datatype"], t["shape"]) for t in look["ranker"]["inputs"]] == [
        ("user", "FP32", ["1", "3"]),
        ("item", "FP32", ["-1", "3"]),
    ]
    assert "max_batch_size" not in look["ranker config"]  # 0: its user is per request
    assert look["cats config"]["max_batch_size"] == 4096
    assert look["cats config"]["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2"]}]
    assert look["cats config"]["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": ["2"], "label_filename": "labels.txt"}]
    assert look["log settings"]["log_error"] == {"bool_param": True}
    assert look["trace settings"]["trace_level"] == {"value": ["OFF"]}


def _check_statistics(seen: Any) -> None:
    [stats] = seen["statistics"]
    assert (stats["name"], stats["version"]) == ("ranker", "1")
    assert (int(stats["inference_count"]), int(stats["execution_count"])) == (6, 3)  # counters outlive the unloading in between
    assert int(stats["inference_stats"]["success"]["count"]) == 3
    assert int(stats["inference_stats"]["fail"]["count"]) == 4
    assert int(stats["inference_stats"]["compute_infer"]["ns"]) > 0
    assert int(stats["last_inference"]) > 1_600_000_000_000
    [batch] = stats["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == ("2", "3")
    assert set(seen["all statistics"]) == {"ranker", "cats", *(f"echo-{dtype}" for dtype in BY_NAME)}


async def test_what_is_wrong_with_a_request_is_told_in_words_and_never_as_our_fault(cats: ModelVersion) -> None:
    async with worker_world(
        snapshot(model("cats", cats), *echo_models()), models={"repository_control": True}, loader_type=EchoLoader
    ) as w:
        seen = await run_client(w, "triton_bad_input.py")
    statuses: dict[str, set[str]] = {}
    for name, (status, message) in seen.items():
        statuses.setdefault(status, set()).add(name)
        assert message, name
    assert set(statuses) == {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"}
    assert statuses["NOT_FOUND"] == NOT_FOUND
    assert statuses["UNIMPLEMENTED"] == {"shared memory"}
    assert statuses["DEADLINE_EXCEEDED"] == {"no time"}
    assert statuses["OK"] == RIGHT
    assert "its name is empty" in seen["no model"][1]
    assert "versions it has, newest first: 1" in seen["version unknown"][1]
    assert "shared memory is not offered here" in seen["input in shared memory"][1]
    assert "(-1 is 1 or more), found [-1, 2]" in seen["variable"][1]


async def test_tritonclient_with_asyncio(ranker: ModelVersion) -> None:
    async with worker_world(snapshot(model("ranker", ranker))) as w:
        seen = await run_client(w, "triton_async.py")
    assert seen["live"] is True
    assert seen["scores"] == [[n, 2 * n] for n in range(32)]
    assert seen["unknown"] == "StatusCode.NOT_FOUND"
    for n, answer in enumerate(seen["streamed"]):
        if n % 4 == 3:
            assert "does not fit the model's signature" in answer[0]
        else:
            assert answer == [f"r{n}", [n, 2 * n]]
    assert len(seen["streamed"]) == 32
    assert int(seen["inference_count"]) == 2 * (32 + 24)


async def test_tritonclients_stream_is_answered_in_order_whatever_fails_in_between(cats: ModelVersion) -> None:
    async with worker_world(snapshot(model("cats", cats))) as w:
        seen = await run_client(w, "triton_stream.py")
        method = "/inference.GRPCInferenceService/ModelStreamInfer"
        await eventually(lambda: w.sample("plait_rpc_server_handled_total", method=method, code="OK") == 1)
    assert len(seen) == 65
    for n, answer in enumerate(seen[:64]):
        if n in (7, 20, 21):
            assert "does not fit the model's signature" in answer["error"]
        else:
            cost = answer.pop("cost")
            assert answer == {"id": f"r{n}", "version": "1", "y": [[2 * n, 2 * n]], "final": True}
            assert set(cost) == {"queue_us", "compute_us", "batch_rows"}
            assert 1 <= cost["batch_rows"] <= 64
            assert cost["compute_us"] < 60_000_000
    assert "Request for unknown model" in seen[64]["error"]


def kserve_python() -> tuple[str, Mapping[str, str]]:
    """Return the interpreter that has kserve, and its environment; skip where none is named."""
    python = os.environ.get(KSERVE_PYTHON, "")
    if not python:
        pytest.skip(f"needs an interpreter that imports kserve, named by {KSERVE_PYTHON}")
    return python, {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


async def test_kserves_client(ranker: ModelVersion) -> None:
    python, env = kserve_python()
    async with worker_world(snapshot(model("ranker", ranker)), models={"repository_control": True}) as w:
        seen = await run_client(w, "kserve_client.py", "control", python=python, env=env)
    assert seen["health"] == [True, True, True]
    assert seen["metadata"] == ["ranker", ["1"], [[1, 3], [-1, 3]]]
    assert seen["score"] == [1.0, 5.0]
    assert seen["score raw"] == [1.0, 5.0]
    assert seen["unknown"] == "NOT_FOUND"
    assert seen["unloaded"] is False
    assert seen["loaded"] == [1.0, 5.0]


def with_a_route(world: Snapshot) -> Snapshot:
    """Return the registry with a route "home" to version 2 of its ranker."""
    views = {
        name: FeatureView(name=name, entity=Entity(type=name), features=tuple(Feature(name=f"f{n}") for n in range(3)))
        for name in ("user", "item")
    }
    inputs = tuple(
        ModelInput(name=name, entity=name, features=tuple(f"{name}:{feature.name}" for feature in view.features))
        for name, view in views.items()
    )
    signature = Signature(inputs=(USER, ITEM), outputs=(SCORE, RANK), feature_set="home")
    ranker = world.models["ranker"]
    versions = tuple(replace(version, signature=signature) for version in ranker.versions)
    return replace(
        world,
        models={**world.models, "ranker": replace(ranker, versions=versions, aliases={"champion": "2", "old": "1"})},
        feature_views=views,
        feature_sets={"home": FeatureSet(name="home", inputs=inputs)},
        routes={
            "home": Route(name="home", subject="user", candidate="item", variants=(Variant(name="main", model="ranker", use="champion"),))
        },
    )


@asynccontextmanager
async def router_before_two_workers(world: Snapshot) -> AsyncIterator[RouterWorld]:
    async with (
        worker_world(world, loader_type=EchoLoader) as one,
        worker_world(world, loader_type=EchoLoader) as two,
        router_world("127.0.0.1:1", f"{one.server.address},{two.server.address}", world, require_key=False) as router,
    ):
        yield router


async def test_tritonclient_sees_a_router_as_one_server(ranker: ModelVersion, cats: ModelVersion, tmp_path: Path) -> None:
    doubled = publish_ranker(tmp_path / "2", scale=2.0)
    world = with_a_route(snapshot(model("ranker", ranker, doubled), model("cats", cats), *echo_models()))
    async with router_before_two_workers(world) as router:
        seen = await run_client(router, "triton_router.py")
    look = seen["look"]
    assert look["health"] == [True] * 5
    assert look["server"] == {
        "name": "plait-router",
        "version": "1.2.3",
        "extensions": ["classification", "model_configuration", "statistics"],
    }
    assert [(one["name"], one["versions"]) for one in look["metadata"]] == [("ranker", ["1", "2"]), ("home", ["1", "2"])]
    assert [(t["name"], t["datatype"], t["shape"]) for t in look["metadata"][1]["inputs"]] == [
        ("user", "FP32", ["1", "3"]),
        ("item", "FP32", ["-1", "3"]),
    ]
    assert look["config"]["max_batch_size"] == 4096
    assert [one for one in look["index"] if one["name"] == "ranker"] == [
        {"name": "ranker", "version": "1", "state": "READY"},
        {"name": "ranker", "version": "2", "state": "READY"},
    ]
    assert len(look["index"]) == 3 + len(BY_NAME)
    assert seen["infer"] == {
        "answers": {"ranker": ["r-7", "2", [2.0, 10.0]], "home": ["r-7", "2", [2.0, 10.0]]},
        "old": [1.0, 5.0],
        "classes": ["4.000000:1:dog", "8.000000:0:cat"],
        "echoed": dict.fromkeys(BY_NAME, True),
        "large": True,
    }
    assert {name: status.removeprefix("StatusCode.") for name, (status, _) in seen["errors"].items()} == {
        **dict.fromkeys(("unknown model", "unknown version", "metadata", "config", "statistics", "ready"), "NOT_FOUND"),
        "unknown version of a route": "NOT_FOUND",
        **dict.fromkeys(("wrong shape", "missing input"), "INVALID_ARGUMENT"),
        "no time": "DEADLINE_EXCEEDED",
        **dict.fromkeys(("shared memory", "log settings", "load", "unload"), "UNIMPLEMENTED"),
    }
    assert "call the worker itself" in seen["errors"]["load"][1]
    assert [(one["version"], int(one["inference_count"])) for one in seen["statistics"]] == [("1", 2), ("2", 4)]  # on both workers
    assert seen["statistics of a route"] == seen["statistics"][1:]
    assert set(seen["all statistics"]) == {"ranker", "cats", *(f"echo-{dtype}" for dtype in BY_NAME)}


async def test_kserves_client_sees_a_router_as_one_server(ranker: ModelVersion) -> None:
    python, env = kserve_python()
    async with router_before_two_workers(snapshot(model("ranker", ranker))) as router:
        seen = await run_client(router, "kserve_client.py", python=python, env=env)
    assert seen == {
        "health": [True, True, True],
        "metadata": ["ranker", ["1"], [[1, 3], [-1, 3]]],
        "score": [1.0, 5.0],
        "score raw": [1.0, 5.0],
        "unknown": "NOT_FOUND",
    }


async def test_tritonclients_stream_and_asyncio_through_a_router(ranker: ModelVersion, cats: ModelVersion) -> None:
    async with router_before_two_workers(snapshot(model("ranker", ranker), model("cats", cats))) as router:
        streamed = await run_client(router, "triton_stream.py")
        seen = await run_client(router, "triton_async.py")
    for n, answer in enumerate(streamed[:64]):
        if n in (7, 20, 21):
            assert "does not fit the model's signature" in answer["error"]
        else:
            assert set(answer.pop("cost")) == {"queue_us", "compute_us", "batch_rows"}
            assert answer == {"id": f"r{n}", "version": "1", "y": [[2 * n, 2 * n]], "final": True}
    assert "Request for unknown model" in streamed[64]["error"]
    assert seen["scores"] == [[n, 2 * n] for n in range(32)]
    assert [answer for n, answer in enumerate(seen["streamed"]) if n % 4 != 3] == [[f"r{n}", [n, 2 * n]] for n in range(32) if n % 4 != 3]
    assert int(seen["inference_count"]) == 2 * (32 + 24)
