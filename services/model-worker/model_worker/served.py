"""A model version that answers requests: its codec, its batcher and the thread it computes in."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_worker import artifacts, backends, background, classification, placement
from model_worker.artifacts import Artifact, Fetcher
from model_worker.backends import LoadOptions, Model
from model_worker.batcher import Batcher, Request
from model_worker.classification import Labels
from model_worker.cpus import available_cpus
from model_worker.instances import Instances
from model_worker.instruments import Instruments
from model_worker.process_instance import ProcessModel
from model_worker.proof import Proven, prove
from model_worker.quarantine import Health
from model_worker.ragged import Layout
from model_worker.schedule import Limits, Schedule
from model_worker.settings import BatchingSettings, ModelSettings
from model_worker.tensors import Codec
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Execution, ModelVersion
from plait.telemetry.tracing import Tracing

Admit = Callable[[Artifact, str, int], None]  # artifact, device, copies of its weights; raises where there is no memory for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A version that was verified, loaded, proven and warmed, in whatever thread did that; it needs only its place on the event loop."""

    manifest: ArtifactManifest
    models: tuple[Model, ...]
    layout: Layout
    proven: Proven
    limits: Limits
    labels: Labels
    artifact: Artifact

    @property
    def memory_bytes(self) -> int:
        """Bytes that all copies of its weights take."""
        return sum(model.memory_bytes for model in set(self.models))

    def close(self) -> None:
        """Give back what a version holds that is not going to serve. Blocks."""
        for model in set(self.models):
            model.close()
        self.artifact.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a request meets: a prepared version in its place on the event loop."""

    model: str
    version: str
    codec: Codec
    batcher: Batcher
    instances: Instances
    prepared: Prepared

    @property
    def manifest(self) -> ArtifactManifest:
        """What was published."""
        return self.prepared.manifest

    @property
    def limits(self) -> Limits:
        """Of its queue and its batches."""
        return self.prepared.limits

    @property
    def platform(self) -> str:
        """What runs it, in the protocol's words."""
        return self.prepared.models[0].platform

    @property
    def hangs(self) -> bool:
        """Whether a thread was given up that still computes, so that the model cannot leave the memory."""
        return self.instances.stuck > 0

    async def close(self) -> None:
        """Answer what is held, then end the threads and processes and let go of the artifact."""
        await self.batcher.close()
        await self.instances.stop()
        await asyncio.to_thread(self.prepared.close)

    async def abandon(self) -> None:
        """Where `close` takes too long: end the processes and let go of the artifact; threads that hang are given up."""
        self.instances.abandon()
        await asyncio.to_thread(self.prepared.close)


class Loader:
    """Makes `Served` out of what the registry says; the only part that knows which backend loads what."""

    def __init__(
        self,
        models: ModelSettings,
        batching: BatchingSettings,
        instruments: Instruments,
        fetcher: Fetcher | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Without a `fetcher`, artifacts are used where they lie."""
        self._tracing = tracing
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
            return self._loaded(artifact, version, admit)
        except BaseException:
            artifact.close()
            raise

    def _loaded(self, artifact: Artifact, version: ModelVersion, admit: Admit) -> Prepared:
        manifest = artifact.manifest
        devices = placement.devices(manifest.execution, self._models.device)
        for device in _claimed(devices):
            admit(artifact, device, _copies(manifest.execution))
        labels = classification.load_labels(artifact)
        models = self._instances_of(artifact, version, devices)
        try:
            return self._proven(artifact, models, labels)
        except BaseException:
            for model in set(models):
                model.close()
            raise

    def _instances_of(self, artifact: Artifact, version: ModelVersion, devices: Sequence[str]) -> tuple[Model, ...]:
        """Load, on each device, one model for all threads, or one per process."""
        execution = artifact.manifest.execution
        threads = execution.kind == "thread"
        options = LoadOptions(
            num_threads=self._models.num_threads or available_cpus(),
            instances=execution.instances if threads else 1,
            autocast=execution.autocast,
            buckets=artifact.manifest.batching.buckets,
            allow_native=self._models.allow_native,
        )
        loaded: list[Model] = []
        try:
            # Device by device, so that batches that run side by side are on different ones first.
            for there in [dataclasses.replace(options, device=device) for device in devices] * (1 if threads else execution.instances):
                loaded.append(backends.load(artifact, there) if threads else self._process(artifact, version, there, len(loaded)))
        except BaseException:
            for model in loaded:
                model.close()
            raise
        return tuple(loaded) * (execution.instances if threads else 1)

    def _process(self, artifact: Artifact, version: ModelVersion, options: LoadOptions, number: int) -> Model:
        return background.at_normal_priority(
            functools.partial(
                ProcessModel,
                artifact.folder,
                version.digest,
                options,
                name=f"{artifact.manifest.name}/{version.version} process {number}",
                call_timeout_s=self._budget_s(artifact.manifest.execution) or None,
            )
        )

    def _budget_s(self, execution: Execution) -> float:
        return execution.timeout_ms / 1e3 or self._models.compute_timeout_s

    def _proven(self, artifact: Artifact, models: tuple[Model, ...], labels: Labels) -> Prepared:
        manifest = artifact.manifest
        layout = Layout.of(manifest.signature, manifest.batching)
        max_rows = self._batching.max_rows or manifest.batching.max_rows
        proven = prove(models[0], layout, artifact, max_rows, others=[m for m in dict.fromkeys(models) if m is not models[0]])
        limits = Limits(
            max_rows=max_rows,
            max_queue_rows=max(max_rows, self._batching.max_queue_rows or manifest.batching.max_queue_rows),
            margin_s=self._batching.margin_ms / 1e3,
            joins=proven.joins,
            splits=proven.splits,
            max_bytes=manifest.batching.max_bytes,
            instances=len(models),
            static_rows=self._batching.static_rows,
            headroom=self._batching.headroom,
            max_delay_s=self._max_delay_ms(manifest) / 1e3,
            preferred_rows=manifest.batching.preferred_rows,
        )
        return Prepared(manifest=manifest, models=models, layout=layout, proven=proven, limits=limits, labels=labels, artifact=artifact)

    def _max_delay_ms(self, manifest: ArtifactManifest) -> float:
        given = self._batching.max_queue_delay_ms
        return manifest.batching.max_queue_delay_ms if given is None else given

    def serve(self, model: str, version: str, prepared: Prepared, health: Health | None = None) -> Served:
        """Give a prepared version its batcher and thread. On the event loop. `health` is told of every batch."""
        name = f"{model}/{version}"
        execution = prepared.manifest.execution
        instances = Instances(name, prepared.models)
        schedule: Schedule[Request] = Schedule(prepared.limits, prepared.proven.latency)
        batcher = Batcher(
            name,
            instances,
            prepared.layout,
            schedule,
            self._instruments.of(model, version),
            budget_s=self._budget_s(execution) if execution.kind == "thread" else 0.0,  # a process is watched by its own model
            finite=execution.finite,
            sizes=prepared.manifest.batching.buckets,
            health=health,
            tracing=self._tracing,
        )
        return Served(
            model=model,
            version=version,
            codec=Codec(prepared.manifest.signature, prepared.labels),
            batcher=batcher,
            instances=instances,
            prepared=prepared,
        )

    @property
    def _root(self) -> Path | None:
        return self._models.artifact_root


def _claimed(devices: Sequence[str]) -> Sequence[str]:
    """Return whose memory a version takes: that of its devices, and before that the process's own, through which the weights go there."""
    return devices if placement.CPU in devices else (placement.CPU, *devices)


def _copies(execution: Execution) -> int:
    """Return how often the weights are in memory: threads share them, processes do not."""
    return execution.instances if execution.kind == "process" else 1
