"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_STATE: Final = Path(".state")

StateOption = Annotated[
    Path,
    typer.Option("--state", envvar="PLAIT_STATE", file_okay=False, help="Folder of the local mesh: its data, logs and endpoints.json."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DsnOption = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        envvar="PLAIT_POSTGRES_DSN",
        help="Postgres of the registry, as postgresql://user:password@host:port/database; default: that of the mesh on --state.",
        show_default=False,
    ),
]
AllowHttpOption = Annotated[
    bool,
    typer.Option(
        "--allow-http",
        envvar="PLAIT_ALLOW_HTTP",
        help="Speak without TLS to an object store whose endpoint (AWS_ENDPOINT_URL) says http://.",
    ),
]


def registry_dsn(dsn: str | None, state: Path) -> str:
    """Return the DSN given, else that of the mesh running on `state`. Raises FailedPrecondition (REGISTRY_UNKNOWN)."""
    from plait.errors import FailedPrecondition  # noqa: PLC0415
    from plait.local.endpoints import Endpoints  # noqa: PLC0415

    if dsn:
        return dsn
    try:
        return Endpoints.read(state).postgres_dsn
    except FailedPrecondition as error:
        message = f"which registry? {error.message}; or name one with --dsn or PLAIT_POSTGRES_DSN"
        raise FailedPrecondition(message, reason="REGISTRY_UNKNOWN") from error
