"""endpoints.json: written, read, and kept from leaking."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from plait.errors import FailedPrecondition
from plait.local.endpoints import Endpoints

HERE = Endpoints(
    router="127.0.0.1:1",
    feature_retrieval="127.0.0.1:2",
    model_worker="127.0.0.1:3",
    postgres_dsn="postgresql://plait:hush@127.0.0.1:4/plait",
    redis_url="redis://:hush@127.0.0.1:5/0",
    api_key="hush",
    service_token="hush",
    metrics={"router": "127.0.0.1:6"},
    pids={"router": 7},
    state="/s",
)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    HERE.write(tmp_path)
    assert Endpoints.read(tmp_path) == HERE
    assert stat.S_IMODE((tmp_path / "endpoints.json").stat().st_mode) == 0o600


def test_a_newer_file_is_read_too(tmp_path: Path) -> None:
    HERE.write(tmp_path)
    document = json.loads((tmp_path / "endpoints.json").read_text())
    (tmp_path / "endpoints.json").write_text(json.dumps(document | {"controller": "127.0.0.1:8"}))
    assert Endpoints.read(tmp_path) == HERE


def test_without_a_mesh_it_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="start one with: plait up --state") as failed:
        Endpoints.read(tmp_path)
    assert failed.value.reason == "MESH_NOT_RUNNING"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\ud800".encode("utf-16", "surrogatepass").decode("latin-1")])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "endpoints.json").write_text(text, encoding="latin-1")
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        Endpoints.read(tmp_path)


def test_secrets_stay_in_the_file() -> None:
    assert "hush" not in repr(HERE)
    assert "hush" not in json.dumps(HERE.public())
    assert HERE.public()["router"] == "127.0.0.1:1"
