"""The folder a local mesh lives in: what is where, who may read it, and that only one mesh at a time uses it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class StateFolder:
    """Paths under one folder; `prepared` makes it."""

    path: Path

    @property
    def endpoints(self) -> Path:
        return self.path / "endpoints.json"

    @property
    def credentials(self) -> Path:
        return self.path / "credentials.json"

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def redis(self) -> Path:
        return self.path / "redis"

    @property
    def artifact_cache(self) -> Path:
        return self.path / "artifact-cache"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def port_file(self, name: str) -> Path:
        return self.path / "run" / f"{name}.json"

    def last_known_good(self, name: str) -> Path:
        return self.path / "last-known-good" / f"{name}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep it to ourselves. The kernel gives the lock up when we die, so it is never stale.

        Raises FailedPrecondition (STATE_IN_USE, STATE_UNUSABLE).
        """
        try:
            for folder in (self.path / "logs", self.path / "run", self.path / "last-known-good"):
                folder.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+", encoding="ascii")
        except OSError as error:
            message = f"the state folder {self.path} cannot be used: {error.strerror}; choose another one with --state"
            raise FailedPrecondition(message, reason="STATE_UNUSABLE") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                message = f"a mesh (process {owner}) uses {self.path} already; end it, or choose another folder with --state"
                raise FailedPrecondition(message, reason="STATE_IN_USE") from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def write_private(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON that only the owner may read, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    draft.replace(path)
