"""A model version that answers requests: its codec, its batcher and the thread it computes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model_worker import artifacts, backends, classification
from model_worker.artifacts import Artifact, Fetcher
from model_worker.backends import LoadOptions, Model
from model_worker.batcher import Batcher, Request
from model_worker.classification import Labels
from model_worker.cpus import available_cpus
from model_worker.instruments import Instruments
from model_worker.proof import Proven, prove
from model_worker.quarantine import Health
from model_worker.ragged import Layout
from model_worker.runner import Runner
from model_worker.schedule import Limits, Schedule
from model_worker.settings import BatchingSettings, ModelSettings
from model_worker.tensors import Codec
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Execution, ModelVersion

Admit = Callable[[Artifact, str, int], None]  # artifact, device, copies of its weights; raises where there is no memory for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A version that was verified, loaded, proven and warmed, in whatever thread did that; it needs only its place on the event loop."""

    manifest: ArtifactManifest
    model: Model
    layout: Layout
    proven: Proven
    limits: Limits
    labels: Labels
    artifact: Artifact

    @property
    def memory_bytes(self) -> int:
        """Bytes that all copies of its weights take."""
        return self.model.memory_bytes * _copies(self.manifest.execution)

    def close(self) -> None:
        """Give back what a version holds that is not going to serve. Blocks."""
        self.model.close()
        self.artifact.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a request meets."""

    model: str
    version: str
    platform: str
    manifest: ArtifactManifest
    limits: Limits
    codec: Codec
    batcher: Batcher
    runner: Runner
    artifact: Artifact

    async def close(self) -> None:
        """Answer what is held, then end the thread and let go of the artifact."""
        await self.batcher.close()
        await self.runner.stop()
        self.artifact.close()


class Loader:
    """Makes `Served` out of what the registry says; the only part that knows which backend loads what."""

    def __init__(self, models: ModelSettings, batching: BatchingSettings, instruments: Instruments, fetcher: Fetcher | None = None) -> None:
        """Without a `fetcher`, artifacts are used where they lie."""
        self._fetcher = fetcher
        self._models = models
        self._batching = batching
        self._instruments = instruments

    def prepare(self, version: ModelVersion, admit: Admit = lambda *_: None) -> Prepared:
        """Load one version. Blocks: run it in a thread. `admit` is asked before the artifact is loaded.

        Raises PlaitError with the reason it cannot be served.
        """
        artifact = self._fetcher.fetch(version) if self._fetcher is not None else artifacts.fetch(version, self._root)
        try:
            return self._loaded(artifact, admit)
        except BaseException:
            artifact.close()
            raise

    def _loaded(self, artifact: Artifact, admit: Admit) -> Prepared:
        manifest = artifact.manifest
        admit(artifact, "cpu", _copies(manifest.execution))
        labels = classification.load_labels(artifact)
        model = backends.load(artifact, LoadOptions(num_threads=self._models.num_threads or available_cpus()))
        layout = Layout.of(manifest.signature, manifest.batching)
        max_rows = self._batching.max_rows or manifest.batching.max_rows
        proven = prove(model, layout, artifact, max_rows)
        limits = Limits(
            max_rows=max_rows,
            max_queue_rows=max(max_rows, self._batching.max_queue_rows or manifest.batching.max_queue_rows),
            margin_s=self._batching.margin_ms / 1e3,
            joins=proven.joins,
            splits=proven.splits,
        )
        return Prepared(manifest=manifest, model=model, layout=layout, proven=proven, limits=limits, labels=labels, artifact=artifact)

    def serve(self, model: str, version: str, prepared: Prepared, health: Health | None = None) -> Served:
        """Give a prepared version its batcher and thread. On the event loop. `health` is told of every batch."""
        name = f"{model}/{version}"
        runner = Runner(f"model {name}", prepared.model.prepare_thread)
        schedule: Schedule[Request] = Schedule(prepared.limits, prepared.proven.latency)
        batcher = Batcher(name, prepared.model, prepared.layout, schedule, runner, self._instruments.of(model, version), health=health)
        return Served(
            model=model,
            version=version,
            platform=prepared.model.platform,
            manifest=prepared.manifest,
            limits=prepared.limits,
            codec=Codec(prepared.manifest.signature, prepared.labels),
            batcher=batcher,
            runner=runner,
            artifact=prepared.artifact,
        )

    @property
    def _root(self) -> Path | None:
        return self._models.artifact_root


def _copies(execution: Execution) -> int:
    """Return how often the weights are in memory: threads share them, processes do not."""
    return execution.instances if execution.kind == "process" else 1
