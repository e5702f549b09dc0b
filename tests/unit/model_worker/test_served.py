"""From the registry's word to something that answers: real artifacts, settings over model.yaml."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.gpu import needs_gpu
from tests.fakes.worker_world import Doubler, publish_doubler, publish_ranker, published, scripted

from model_worker import placement
from model_worker.artifacts import Artifact, Fetcher
from model_worker.backends.cuda import CudaModel
from model_worker.instruments import Instruments
from model_worker.served import Loader
from model_worker.settings import ArtifactSettings, BatchingSettings, ModelSettings
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Execution, ModelVersion, TensorSpec
from plait.telemetry.metrics import Metrics


def loader(models: Any = None, batching: Any = None, fetcher: Fetcher | None = None) -> Loader:
    return Loader(ModelSettings(**(models or {})), BatchingSettings(**(batching or {})), Instruments(Metrics()), fetcher)


async def test_a_published_ranker_answers(tmp_path: Path) -> None:
    made = loader()
    prepared = made.prepare(publish_ranker(tmp_path / "m", scale=2.0))
    served = made.serve("ranker", "7", prepared)
    user, item = np.array([[1, 2, 3]], np.float32), np.array([[1, 0, 0], [0, 1, 1]], np.float32)
    answer = await served.batcher.submit((user, item), 2, time.monotonic() + 60)
    assert [a.tolist() for a in answer.outputs] == [[2, 10], [0, 1]]
    assert (served.model, served.version, served.platform) == ("ranker", "7", "pytorch_torchscript")
    await served.close()
    assert "closing" in repr(served.batcher)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (64, 512, 0.0005)),
        ({"max_rows": 32}, (32, 512, 0.0005)),
        ({"max_queue_rows": 128, "margin_ms": 2.0}, (64, 128, 0.002)),
        ({"max_queue_rows": 16}, (64, 64, 0.0005)),
        ({"max_rows": 1024}, (1024, 1024, 0.0005)),
    ],
)
def test_settings_go_before_model_yaml_and_a_batch_always_fits_the_queue(tmp_path: Path, settings: Any, expected: Any) -> None:
    limits = loader(batching=settings).prepare(publish_ranker(tmp_path / "m", max_rows=64, max_queue_rows=512)).limits
    assert (limits.max_rows, limits.max_queue_rows, limits.margin_s) == expected
    assert limits.joins


def test_what_a_model_can_is_found_out_not_declared(tmp_path: Path) -> None:
    ranker, doubler = (loader().prepare(publish(tmp_path / publish.__name__)) for publish in (publish_ranker, publish_doubler))
    assert (ranker.limits.joins, ranker.limits.splits) == (True, False)  # its ranks begin anew in each piece
    assert (doubler.limits.joins, doubler.limits.splits) == (True, True)


async def test_an_artifact_is_held_while_its_model_serves_and_let_go_afterwards(tmp_path: Path) -> None:
    made = loader(fetcher=Fetcher(ArtifactSettings(cache=tmp_path / "cache"), None))
    served = made.serve("ranker", "7", made.prepare(publish_ranker(tmp_path / "m")))
    assert served.prepared.artifact.folder.parent == tmp_path / "cache"
    assert "held" in repr(served.prepared.artifact.lease)
    await served.close()
    assert "closed" in repr(served.prepared.artifact.lease)


def test_the_artifact_of_a_model_that_cannot_be_served_is_let_go(tmp_path: Path) -> None:
    fetched: list[Artifact] = []

    class Remembering(Fetcher):
        def fetch(self, version: ModelVersion) -> Artifact:
            fetched.append(super().fetch(version))
            return fetched[-1]

    spec = TensorSpec(name="x", dtype="float32", shape=(-1, 2))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.pt").write_bytes(b"no model")
    manifest = ArtifactManifest(name="m", format="torchscript", entry="model.pt", inputs=(spec,), outputs=(spec,))
    with pytest.raises(FailedPrecondition):
        loader(fetcher=Remembering(ArtifactSettings(cache=tmp_path / "cache"), None)).prepare(published(tmp_path / "m", manifest))
    assert ["closed" in repr(each.lease) for each in fetched] == [True]


def test_nothing_outside_of_the_artifact_root_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(FailedPrecondition) as refused:
        loader({"artifact_root": tmp_path / "root"}).prepare(publish_ranker(tmp_path / "m"))
    assert refused.value.reason == "ARTIFACT_OUTSIDE_ROOT"


def test_a_model_that_does_not_fit_its_model_yaml_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    scripted(Doubler()).save(str(tmp_path / "m" / "model.pt"))
    rows = TensorSpec(name="x", dtype="float32", shape=(-1, 2))
    manifest = ArtifactManifest(
        name="m", format="torchscript", entry="model.pt", inputs=(rows, TensorSpec(name="z", dtype="float32", shape=(-1,))), outputs=(rows,)
    )
    with pytest.raises(FailedPrecondition) as refused:
        loader().prepare(published(tmp_path / "m", manifest))
    assert refused.value.reason == "MODEL_EXECUTION_FAILED"


def test_labels_come_with_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "names.txt").write_text("cat\ndog\n")
    scripted(Doubler()).save(str(tmp_path / "m" / "model.pt"))
    tensors = [TensorSpec(name=name, dtype="float32", shape=(-1, 2)) for name in "xy"]
    manifest = ArtifactManifest(
        name="m", format="torchscript", entry="model.pt", inputs=(tensors[0],), outputs=(tensors[1],), labels={"y": "names.txt"}
    )
    assert loader().prepare(published(tmp_path / "m", manifest)).labels == {"y": ("cat", "dog")}


@pytest.mark.parametrize(
    ("execution", "device", "claims"),
    [
        (Execution(instances=2), "cpu", [("cpu", 1)]),
        (Execution(instances=2), "cuda:1", [("cpu", 1), ("cuda:1", 1)]),
        (Execution(instances=2, kind="process", devices=(0, 3)), "cuda", [("cpu", 2), ("cuda:0", 2), ("cuda:3", 2)]),
    ],
)
def test_the_memory_of_every_device_is_claimed_before_anything_is_loaded(
    tmp_path: Path, execution: Execution, device: str, claims: list[tuple[str, int]]
) -> None:
    class FullError(Exception):
        pass

    found: list[tuple[str, int]] = []

    def admit(_: Artifact, where: str, copies: int) -> None:
        found.append((where, copies))
        if len(found) == len(claims):
            raise FullError

    with pytest.raises(FullError):
        loader({"device": device}).prepare(publish_ranker(tmp_path / "m", execution=execution), admit)
    assert found == claims


def test_a_gpu_in_model_yaml_that_the_worker_does_not_give_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"execution\.devices") as refused:
        loader().prepare(publish_ranker(tmp_path / "m", execution=Execution(devices=(0,))))
    assert refused.value.reason == "DEVICE_UNAVAILABLE"


@needs_gpu
async def test_instances_on_a_gpu_share_its_weights_and_answer(tmp_path: Path) -> None:
    made = loader({"device": "cuda"})
    prepared = made.prepare(publish_doubler(tmp_path / "m", buckets=(8, 16)))
    [model] = prepared.models
    assert isinstance(model, CudaModel)
    assert model.recordings == 2
    served = made.serve("doubler", "1", prepared)
    before = model.replays
    answer = await served.batcher.submit((np.ones((5, 2), np.float32),), 5, time.monotonic() + 60)
    assert answer.outputs[0].tolist() == [[2, 2]] * 5
    assert model.replays == before + 1
    await served.close()


def test_instances_are_dealt_out_device_by_device_with_one_copy_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the CPU stands for two GPUs here."""
    monkeypatch.setattr(placement, "devices", lambda *_: ("cpu", "cpu"))
    prepared = loader().prepare(publish_ranker(tmp_path / "m", execution=Execution(instances=2)))
    first, second, *others = prepared.models
    assert first is not second
    assert others == [first, second]
    assert prepared.limits.instances == 4
    assert prepared.memory_bytes == first.memory_bytes + second.memory_bytes
    prepared.close()
