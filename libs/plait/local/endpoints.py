"""Where a running local mesh is, and the keys to it: what `plait up` writes and everything that wants to talk to it reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from plait.errors import FailedPrecondition
from plait.local.state import StateFolder, write_private

_SECRETS: Final = ("postgres_dsn", "redis_url", "api_key", "service_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Addresses are "host:port". `metrics` and `pids` are by name of the part; only what this mesh started has a process id."""

    router: str
    feature_retrieval: str
    model_worker: str
    postgres_dsn: str = field(repr=False)
    redis_url: str = field(repr=False)
    api_key: str = field(repr=False)
    service_token: str = field(repr=False)
    metrics: Mapping[str, str] = field(default_factory=dict)
    pids: Mapping[str, int] = field(default_factory=dict)
    state: str = ""

    @classmethod
    def read(cls, state: Path) -> Self:
        """Read them from a state folder. Raises FailedPrecondition (MESH_NOT_RUNNING)."""
        path = StateFolder(state).endpoints
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in document.items() if name in names})
        except FileNotFoundError:
            message = f"no mesh is running on {state}: there is no {path}; start one with: plait up --state {state}"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            message = f"{path} cannot be read ({type(error).__name__}); start the mesh again with: plait up --state {state}"
        raise FailedPrecondition(message, reason="MESH_NOT_RUNNING")

    def write(self, state: Path) -> None:
        """Write them whole, for the owner's eyes only."""
        write_private(StateFolder(state).endpoints, dataclasses.asdict(self))

    def public(self) -> dict[str, Any]:
        """Return everything but the secrets, fit for a screen or a log."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _SECRETS}
