"""`plait up`: what it prints. The mesh itself is driven by the end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from plait.cli import up
from plait.local.endpoints import Endpoints

MESH = Endpoints(
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


def test_json_is_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    up.write_json_line(MESH)
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert (document["router"], document["endpoints_file"]) == ("127.0.0.1:1", "/s/endpoints.json")
    assert "hush" not in line


def test_the_table_says_where_everything_is_and_hides_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    up._show(MESH, 2.34)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["router", "127.0.0.1:1", "http://127.0.0.1:6/metrics", "7"] in rows
    assert ["PostgreSQL", "127.0.0.1:4", "yours"] in rows
    assert ["Redis", "127.0.0.1:5", "yours"] in rows
    assert "up in 2.3 s" in out
    assert "/s/endpoints.json" in out
    assert "hush" not in out


def test_a_state_that_is_no_folder_is_refused(plait: Callable[..., Result]) -> None:
    Path("file").touch()
    result = plait("up", "--state", "file")
    assert result.exit_code == 2
    assert "--state" in result.stderr
