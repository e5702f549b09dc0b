"""Feast itself, from its environment of the benchmark's peers; and a repository as `feast_dump.py` tells of one."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from plait.local.redis import EmbeddedRedis
from plait_bench import peer_feast
from plait_bench.environments import cache_folder, foreign_environ

_FOLDER = peer_feast.ENVIRONMENT.folder(cache_folder())
PYTHON = _FOLDER / "bin" / "python"
CLIENTS = Path(__file__).parent / "clients"
needs_feast = pytest.mark.skipif(
    not (_FOLDER / "complete").exists(), reason="feast is not installed for the benchmark: plait bench features --quick --peers feast"
)


def field(name: str, type_: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type_, "description": "", "tags": {}, "vector_length": 0, **more}


def view(name: str, features: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    keys = [{"entity": "driver", "name": "driver_id", "type": "Int64"}]
    return {"name": name, "kind": "FeatureView", "keys": keys, "features": features, "ttl_s": 0.0, "description": "", "online": True} | more


def service(name: str, *views: tuple[str, list[str]]) -> dict[str, Any]:
    return {
        "name": name,
        "description": "",
        "views": [{"name": of, "features": features, "join_key_map": {}} for of, features in views],
    }


def repository(views: list[dict[str, Any]], services: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """Return what `feast_dump.py` would write."""
    base = {"project": "shop", "entity_key_serialization_version": 3, "online_store": "redis", "versioned": False, "on_demand": []}
    return copy.deepcopy(base | {"views": views, "services": services or []} | more)


def password_of(redis: EmbeddedRedis) -> str:
    return redis.url.partition("://:")[2].rpartition("@")[0]


def feast_world(folder: Path, redis: EmbeddedRedis) -> dict[str, Any]:
    """Have Feast make, fill and read a repository in `folder`; return what it saw."""
    argv = [str(PYTHON), str(CLIENTS / "feast_world.py"), str(folder), redis.address, password_of(redis)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=foreign_environ(PYTHON), timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen
