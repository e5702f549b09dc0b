"""How the command line tells a failure: what, why and what to do next, in red, on stderr, without a traceback."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

DEBUG = "PLAIT_DEBUG"


class FailuresGroup(TyperGroup):
    """Ends the process with status 1 and one clear message where a command raises; PLAIT_DEBUG=1 shows the traceback instead."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, BrokenPipeError) or os.environ.get(DEBUG, "") not in {"", "0"} or not _is_failure(error):
                raise
            tell(error)
            raise typer.Exit(1) from None


def tell(error: Exception) -> None:
    """Print an error to stderr."""
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from plait.errors import PlaitError  # noqa: PLC0415

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if isinstance(error, PlaitError):
        first, *more = str(error).split("\n")
        console.print(Text.assemble(("error: ", "bold red"), (first, "red"), (f"  [{error.reason}]", "dim")))
        for line in more:
            console.print(Text(line, style="red"))
    else:
        console.print(Text.assemble(("error: ", "bold red"), (f"{type(error).__name__}: {error}", "red")))
        console.print(Text(f"this is a fault of plait; {DEBUG}=1 shows where", style="dim"))


def _is_failure(error: Exception) -> bool:
    """Say whether it is ours to tell; wrong usage and typer's own signals are not."""
    return type(error).__module__.partition(".")[0] not in {"typer", "click"}  # click: where typer does not yet bring its own
