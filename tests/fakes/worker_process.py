"""Real model-worker processes, which can be killed and started again at the same address."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.registry_world import eventually
from tests.fakes.worker_world import SERVICE_TOKEN

from plait.local.child import Child
from plait.registry import last_known_good
from plait.registry.records import Snapshot


@dataclass
class WorkerProcess:
    """A worker process, and where it listens."""

    child: Child
    address: str


@asynccontextmanager
async def worker_process(folder: Path, registry: Snapshot, dsn: str, *, port: int = 0, **settings: str) -> AsyncIterator[WorkerProcess]:
    """Start `python -m model_worker` from a last-known-good file, as the registry at `dsn` may be away; it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    last_known_good.write(folder / "registry.json", registry)
    port_file = folder / "port.json"
    port_file.unlink(missing_ok=True)
    settings = {
        "RPC__PORT_FILE": str(port_file),
        "RPC__PORT": str(port),
        "RPC__SERVICE_TOKEN": SERVICE_TOKEN,
        "REGISTRY__DSN": dsn,
        "REGISTRY__LAST_KNOWN_GOOD": str(folder / "registry.json"),
        "ARTIFACTS__CACHE": str(folder / "cache"),
        **settings,
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLAIT_")}
    env |= {f"PLAIT_MODEL_WORKER_{name}": value for name, value in settings.items()}
    child = Child.start([sys.executable, "-m", "model_worker"], name="model-worker", log=folder / "log", env=env)
    try:
        await eventually(lambda: port_file.exists() or not child.running, 60)
        assert child.running, child.log_tail()
        yield WorkerProcess(child, json.loads(port_file.read_text())["rpc"])
    finally:
        await child.stop(signal.SIGKILL, grace_s=10)
