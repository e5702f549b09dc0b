"""Our router as a process, and the small servers around it; started from a last-known-good file, so that no Postgres runs beside."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from plait.registry import last_known_good
from plait.registry.records import Snapshot
from plait_bench.processes import ServerProcess
from plait_bench.proxy import TOKEN

_PREFIX: Final = "PLAIT_ROUTER_"
_NO_POSTGRES: Final = "postgresql://nobody@127.0.0.1:1/nothing"  # refused at once: the router then starts from its file


class PortedProcess(ServerProcess):
    """A process that writes where it listens to a file."""

    def __init__(self, name: str, argv: Sequence[str | Path], *, core: int, folder: Path, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port_file = folder / f"{name.replace(' ', '-')}.json"
        self._port_file.unlink(missing_ok=True)
        super().__init__(name, argv, core=core, log=folder / f"{name.replace(' ', '-')}.log", env=env)

    @property
    def address(self) -> str:
        """host:port, once it listens."""
        address: str = json.loads(self._port_file.read_text(encoding="utf-8"))["rpc"]
        return address

    @property
    def port(self) -> int:
        """Of `address`."""
        return int(self.address.rpartition(":")[2])

    def wait(self, timeout_s: float = 60.0) -> None:
        """Return once it listens. Raises Unavailable (BENCH_SERVER_FAILED)."""
        give_up_s = time.monotonic() + timeout_s
        while not self._port_file.exists():
            self.check()
            if time.monotonic() > give_up_s:
                raise self.failed("was not ready in time")
            time.sleep(0.05)


class Helper(PortedProcess):
    """One of the servers of `plait_bench.proxy`."""

    def __init__(self, what: str, argument: str, *, core: int, folder: Path, name: str) -> None:
        argv: list[str | Path] = [sys.executable, "-m", "plait_bench.proxy", what, folder / f"{name.replace(' ', '-')}.json", argument]
        super().__init__(name, argv, core=core, folder=folder, env=os.environ)


class OwnRouter(PortedProcess):
    """A router by `snapshot` in front of `workers`; `settings` are added by name without prefix."""

    def __init__(
        self, snapshot: Snapshot, workers: str, folder: Path, *, core: int, settings: Mapping[str, str] | None = None, name: str = "plait"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        last_known_good.write(folder / f"{name}-registry.json", snapshot)
        values = {
            "RPC__PORT_FILE": str(folder / f"{name.replace(' ', '-')}.json"),
            "RPC__SERVICE_TOKEN": TOKEN,
            "REGISTRY__DSN": _NO_POSTGRES,
            "REGISTRY__LAST_KNOWN_GOOD": str(folder / f"{name}-registry.json"),
            "TELEMETRY__LOG_LEVEL": "warning",
            "WORKERS__ADDRESSES": workers,
            **(settings or {}),
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)} | {_PREFIX + k: v for k, v in values.items()}
        super().__init__(name, [sys.executable, "-m", "router"], core=core, folder=folder, env=env)
