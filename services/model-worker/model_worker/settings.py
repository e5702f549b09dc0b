"""The model-worker's settings. Names: PLAIT_MODEL_WORKER_<GROUP>__<FIELD>."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from plait.errors import PlaitError
from plait.registry.signing import public_key
from plait.settings import Group, ServiceSettings


class QuarantineSettings(Group):
    """When a version that keeps failing is taken out, and for how long."""

    faults: int = Field(10, ge=0, le=1000, description="failed batches among the last `window` that take a version out; 0 = never")
    severe: int = Field(3, ge=1, le=1000, description="hangs and lost instances among the last `window` that take a version out")
    window: int = Field(20, ge=1, le=1000, description="batches looked back on")
    window_s: float = Field(300.0, gt=0, le=86_400, description="age at which a failed batch is forgotten, seconds")
    backoff_s: float = Field(5.0, gt=0, le=3600, description="time out before the self-test is tried, doubling with every relapse, seconds")
    max_backoff_s: float = Field(
        300.0, gt=0, le=86_400, description="longest time out, and the good behaviour after which it starts at backoff_s again, seconds"
    )
    test_timeout_s: float = Field(10.0, gt=0, le=3600, description="time the self-test has, seconds")

    @model_validator(mode="after")
    def _possible(self) -> QuarantineSettings:
        if self.faults > self.window:
            raise ValueError("faults is larger than window, so that nothing would ever be taken out: set faults=0 for that")
        if self.backoff_s > self.max_backoff_s:
            raise ValueError("backoff_s is longer than max_backoff_s")
        return self


class ModelSettings(Group):
    """Which models are served, and how."""

    pool: str = Field(
        "default", min_length=1, max_length=63, description="name of the pool this worker is in; it serves the models of that pool"
    )
    only: tuple[str, ...] = Field(
        (), description='names of the models to serve, as a JSON list; empty = every model of the pool, e.g. ["ranker"]'
    )
    artifact_root: Path | None = Field(None, description="folder outside of which no artifact is opened; unset = anywhere")
    num_threads: int = Field(
        1,
        ge=0,
        le=256,
        description="threads one operator of a model may use; 0 = as many as the container has CPUs; more helps only large batches",
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda(:\d{1,2})?)$",
        description="where models compute: cpu, cuda (the GPUs their model.yaml lists, else GPU 0) or cuda:<number> (that GPU only)",
    )
    allow_native: bool = Field(
        False, description="load AOTInductor packages, which are native code that runs as this process: switch on for artifacts you sign"
    )
    compute_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="time one forward pass may take before its instance counts as hung, seconds; 0 = for ever"
    )
    retry_s: float = Field(5.0, gt=0, le=3600, description="time before a version that failed to load is tried again, doubling, seconds")
    max_retry_s: float = Field(300.0, gt=0, le=86_400, description="longest time between such tries, seconds")
    unload_after_s: float = Field(
        30.0, ge=0, le=3600, description="time a version is kept once nothing refers to it: routers may still send to it, seconds"
    )
    repository_control: bool = Field(False, description="let callers load and unload models (RepositoryModelLoad, RepositoryModelUnload)")
    load_concurrency: int = Field(2, ge=1, le=64, description="versions loaded at once")
    load_timeout_s: float = Field(300.0, gt=0, le=86_400, description="time a load has before it counts as failed, seconds")
    max_overdue_loads: int = Field(
        16, ge=0, le=1000, description="loads past their time whose threads may still be stuck; at that number nothing new is loaded"
    )
    unload_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="time a version has to answer what it holds before it is given up, seconds"
    )
    max_memory_bytes: int = Field(
        0, ge=0, description="memory all models together may take, bytes; 0 = memory_share of the container's, or else the machine's"
    )
    memory_share: float = Field(
        0.8, gt=0, le=1, description="share of the memory limit used where max_memory_bytes is 0, less what the process takes itself"
    )
    device_memory_share: float = Field(0.9, gt=0, le=1, description="share of each accelerator's memory that models may take")
    ready_when: Literal["all", "any", "live"] = Field(
        "any",
        description="ServerReady once every wanted version is ready (all), every one was tried and at least one is ready (any), or at once (live)",
    )
    quarantine: QuarantineSettings = Field(default_factory=QuarantineSettings, description="when a failing version is taken out")


class ArtifactSettings(Group):
    """Where artifacts may come from, and the copies that are kept of them."""

    schemes: tuple[Literal["file", "s3", "gs"], ...] = Field(
        ("file", "s3", "gs"), description='how artifacts may be addressed, as a JSON list; file covers plain folders, e.g. ["s3"]'
    )
    buckets: tuple[str, ...] = Field(
        (), description='names of the buckets artifacts may come from, as a JSON list; empty = any, e.g. ["models"]'
    )
    allow_http: bool = Field(False, description="speak to an object store without TLS where its endpoint says http://")
    cache: Path | None = Field(
        None,
        description="folder that keeps copies of artifacts, may be shared by workers; unset = plait/artifacts below $XDG_CACHE_HOME or ~/.cache",
    )
    max_bytes: int = Field(
        20 * 1024**3, ge=1024 * 1024, description="most bytes the cache takes; what was used longest ago goes first, bytes"
    )
    timeout_s: float = Field(600.0, gt=0, le=86_400, description="time one artifact may take to arrive, seconds")
    stall_s: float = Field(30.0, gt=0, le=3600, description="time an object store may be silent before a request is tried again, seconds")
    retries: int = Field(4, ge=0, le=20, description="how often a request to an object store is tried again, with growing pauses")
    concurrency: int = Field(4, ge=1, le=64, description="files of one artifact that are fetched at the same time")
    require_signature: bool = Field(False, description="refuse artifacts whose model.yaml.sig is not by a trusted key")
    trusted_keys: tuple[str, ...] = Field(
        (), description='public keys whose signatures count, as a JSON list of "ed25519:<base64>" (plait artifact keygen prints them)'
    )

    @field_validator("trusted_keys")
    @classmethod
    def _keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            try:
                public_key(key)
            except PlaitError as error:
                raise ValueError(error.message) from None
        return keys

    @model_validator(mode="after")
    def _usable(self) -> ArtifactSettings:
        if self.require_signature and not self.trusted_keys:
            raise ValueError("require_signature without trusted_keys would refuse every artifact: list the public keys to trust")
        return self


class BatchingSettings(Group):
    """Limits of every model's queue; unset = as the artifact's model.yaml says."""

    max_rows: int | None = Field(None, ge=1, description="most rows in one forward pass")
    max_queue_rows: int | None = Field(None, ge=1, description="most rows waiting for one model; more are answered RESOURCE_EXHAUSTED")
    max_queue_delay_ms: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="longest time a free instance waits for company that has just been answered and tends to come back, milliseconds; 0 = never",
    )
    headroom: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of a waiting request's time left that must remain when its answer is predicted: what is ready at the deadline is late",
    )
    static_rows: int = Field(
        0, ge=0, description="wait for that many rows before anything runs, however long it takes; 0 = never wait. Made for measuring"
    )
    margin_ms: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="added to the predicted time of an answer when deciding whether its deadline can be met, milliseconds",
    )


class ProtocolSettings(Group):
    """What callers may change in a running worker (besides models.repository_control)."""

    log_control: bool = Field(False, description="let callers change the log level (LogSettings)")
    trailers: bool = Field(
        True, description="answer ModelInfer with trailers: queue and compute time, batch rows, version, and an ORCA load report"
    )
    trace_control: bool = Field(False, description="let callers change the share of recorded traces (TraceSetting)")


class ModelWorkerSettings(ServiceSettings):
    """All settings of the model-worker."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_MODEL_WORKER_")

    models: ModelSettings = Field(default_factory=ModelSettings, description="which models are served, and how")
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings, description="where artifacts may come from, and copies of them")
    batching: BatchingSettings = Field(default_factory=BatchingSettings, description="limits of every model's queue")
    protocol: ProtocolSettings = Field(default_factory=ProtocolSettings, description="what callers may change in a running worker")
