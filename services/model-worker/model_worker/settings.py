"""Settings of the model-worker. Environment names start with PLAIT_MODEL_WORKER_."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from plait.settings import Group, ServiceSettings


class ModelsSettings(Group):
    """How models are loaded and run."""

    threads: int = Field(1, ge=1, le=256, description="threads one operator of a model may use; run one process per core rather than more")
    repository_control: bool = Field(
        False, description="let callers load and unload models (RepositoryModelLoad, RepositoryModelUnload) besides the registry"
    )
    retry_first_s: float = Field(1.0, gt=0, le=3600, description="wait before a model that failed to load is tried again; doubles, seconds")
    retry_most_s: float = Field(60.0, gt=0, le=3600, description="longest such wait, seconds")
    first_load_timeout_s: float = Field(
        300.0, gt=0, le=3600, description="time the first models have to load before the worker serves regardless, seconds"
    )


class WorkerSettings(ServiceSettings):
    """All of it."""

    model_config = SettingsConfigDict(env_prefix="PLAIT_MODEL_WORKER_")

    models: ModelsSettings = Field(default_factory=ModelsSettings, description="how models are loaded and run")
