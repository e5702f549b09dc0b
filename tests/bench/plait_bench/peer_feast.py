"""Feast as a peer of the features benchmark: its environment, and the process in it that reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from plait.errors import Unavailable
from plait_bench.environments import Environment, foreign_environ

_PACKAGE: Final = "feast[redis,grpcio]==0.67.0"
ENVIRONMENT: Final = Environment(name="feast", steps=((f"{_PACKAGE} (about 0.7 GB, once)", (_PACKAGE,)),))
_SCRIPT: Final = Path(__file__).parent / "peer_servers" / "feast_reader.py"
_TAIL: Final = 2000


class FeastProcess:
    """Feast in a process of its own, on the caller's core; see `peer_servers/feast_reader.py` for what it does."""

    def __init__(self, python: Path, folder: Path, address: str, password: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "feast.log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [str(python), str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=foreign_environ(python) | {"FEAST_USAGE": "False"},
                cwd=folder,
                text=True,
            )
        self._send({"folder": str(folder), "address": address, "password": password})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()

    def do(self, what: str, **given: Any) -> Any:
        """Have something done; return the answer. Raises Unavailable (BENCH_SERVER_FAILED) where the process has ended."""
        self._send({"do": what, **given})
        line = self._popen.stdout.readline() if self._popen.stdout is not None else ""
        if not line:
            tail = self._log.read_bytes()[-_TAIL:].decode(errors="replace")
            raise Unavailable(f"feast ended; it said:\n{tail}\n(log: {self._log})", reason="BENCH_SERVER_FAILED")
        return json.loads(line)

    def round(self, shape: str, asked: Sequence[Sequence[str]], seconds: float, *, tensor: bool) -> list[float]:
        """Return what each call took, in seconds."""
        taken: list[float] = self.do("round", shape=shape, asked=[list(ids) for ids in asked], seconds=seconds, tensor=tensor)["taken_s"]
        return taken

    def _send(self, message: Any) -> None:
        if self._popen.stdin is None:
            return
        try:
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            return  # its last words are told by whoever waits for an answer
