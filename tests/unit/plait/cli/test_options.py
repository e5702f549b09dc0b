"""Where the registry is."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.cli.options import registry_dsn
from plait.errors import FailedPrecondition
from plait.local.endpoints import Endpoints

DSN = "postgresql://plait:hush@127.0.0.1:4/plait"
MESH = Endpoints(
    router="127.0.0.1:1", feature_retrieval="127.0.0.1:2", model_worker="127.0.0.1:3", postgres_dsn=DSN, redis_url="", api_key="", service_token=""
)  # fmt: skip


def test_the_dsn_given_comes_before_the_local_mesh(tmp_path: Path) -> None:
    MESH.write(tmp_path)
    assert registry_dsn("postgresql://other/db", tmp_path) == "postgresql://other/db"
    assert registry_dsn(None, tmp_path) == DSN
    assert registry_dsn("", tmp_path) == DSN


def test_without_either_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"plait up --state .*--dsn or PLAIT_POSTGRES_DSN") as caught:
        registry_dsn(None, tmp_path)
    assert caught.value.reason == "REGISTRY_UNKNOWN"
