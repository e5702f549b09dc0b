"""What ties the services of a local mesh together."""

from __future__ import annotations

from plait.local.services import FEATURE_RETRIEVAL, MODEL_WORKER, ROUTER, SERVICES, Ties, settings

TIES = Ties(
    postgres_dsn="postgresql://p",
    redis_url="redis://r",
    service_token="token",
    privacy_key="private",
    feature_retrieval="127.0.0.1:1",
    model_worker="127.0.0.1:2",
    artifact_cache="/state/artifact-cache",
)


def test_the_worker_keeps_its_copies_of_artifacts_with_the_mesh() -> None:
    found = settings(SERVICES[MODEL_WORKER], TIES)
    assert found["PLAIT_MODEL_WORKER_ARTIFACTS__CACHE"] == "/state/artifact-cache"
    assert found["PLAIT_MODEL_WORKER_REGISTRY__DSN"] == "postgresql://p"


def test_the_router_knows_the_others_by_address_and_token() -> None:
    found = settings(SERVICES[ROUTER], TIES)
    assert (found["PLAIT_ROUTER_WORKERS__ADDRESSES"], found["PLAIT_ROUTER_WORKERS__CHANNEL__SERVICE_TOKEN"]) == ("127.0.0.1:2", "token")


def test_only_who_erases_has_the_privacy_key() -> None:
    assert settings(SERVICES[FEATURE_RETRIEVAL], TIES)["PLAIT_FEATURE_RETRIEVAL_PRIVACY__KEY"] == "private"
    assert "private" not in {*settings(SERVICES[ROUTER], TIES).values(), *settings(SERVICES[MODEL_WORKER], TIES).values()}
