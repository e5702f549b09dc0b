"""`plait bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli import extensions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def _complete(incomplete: str) -> list[str]:
    return extensions.names(extensions.BENCHES, incomplete)


def bench(
    name: Annotated[str, typer.Argument(help="What to measure, for example: rank.", autocompletion=_complete)],
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures to this file.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", file_okay=False, help="Keep the mesh's state in this folder; default: a temporary one.", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer calls: seconds instead of minutes, rougher figures.")] = False,
) -> None:
    """Measure the mesh against its floor, side by side on this machine.

    The floor is the same work in one process without any RPC; the ratio is what the mesh costs.

    Example:  plait bench rank --json reports/bench-rank.json
    """
    from rich.console import Console  # noqa: PLC0415

    run = extensions.find(extensions.BENCHES, name)
    run(Console(), json_path, state, quick)
