"""The model-worker's settings. Names: PLAIT_MODEL_WORKER_<GROUP>__<FIELD>."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from plait.settings import Group, ServiceSettings


class ModelSettings(Group):
    """Which models are served, and how."""

    only: tuple[str, ...] = Field((), description='names of the models to serve, as a JSON list; empty = every model, e.g. ["ranker"]')
    artifact_root: Path | None = Field(None, description="folder outside of which no artifact is opened; unset = anywhere")
    num_threads: int = Field(
        1,
        ge=0,
        le=256,
        description="threads one operator of a model may use; 0 = as many as the container has CPUs; more helps only large batches",
    )
    retry_s: float = Field(5.0, gt=0, le=3600, description="time before a version that failed to load is tried again, doubling, seconds")
    max_retry_s: float = Field(300.0, gt=0, le=86_400, description="longest time between such tries, seconds")
    unload_after_s: float = Field(
        30.0, ge=0, le=3600, description="time a version is kept once nothing refers to it: routers may still send to it, seconds"
    )
    repository_control: bool = Field(False, description="let callers load and unload models (RepositoryModelLoad, RepositoryModelUnload)")


class BatchingSettings(Group):
    """Limits of every model's queue; unset = as the artifact's model.yaml says."""

    max_rows: int | None = Field(None, ge=1, description="most rows in one forward pass")
    max_queue_rows: int | None = Field(None, ge=1, description="most rows waiting for one model; more are answered RESOURCE_EXHAUSTED")
    margin_ms: float = Field(
        0.5,
        ge=0,
        le=1000,
        description="added to the predicted time of an answer when deciding whether its deadline can be met, milliseconds",
    )


class ModelWorkerSettings(ServiceSettings):
    """All settings of the model-worker."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_MODEL_WORKER_")

    models: ModelSettings = Field(default_factory=ModelSettings, description="which models are served, and how")
    batching: BatchingSettings = Field(default_factory=BatchingSettings, description="limits of every model's queue")
