"""`plait demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli import extensions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def _complete(incomplete: str) -> list[str]:
    return extensions.names(extensions.DEMOS, incomplete)


def demo(
    name: Annotated[
        str | None, typer.Argument(help="Which demo; not needed while only one is installed.", autocompletion=_complete, show_default=False)
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the measured figures to this file.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", file_okay=False, help="Keep the mesh's state in this folder; default: a temporary one.", show_default=False
        ),
    ] = None,
) -> None:
    """Rank real listings through the whole mesh, and show what happened.

    It starts a mesh, replays events into the feature store, trains and publishes a model, ranks, and ends the mesh again.

    Example:  plait demo --json demo.json
    """
    from rich.console import Console  # noqa: PLC0415

    run = extensions.find(extensions.DEMOS, name)
    run(Console(), json_path, state)
