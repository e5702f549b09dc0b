"""`plait bench`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

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
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            help="Other servers to measure beside ours, with commas between, or all; each is installed on its own, about 1 GB. Default: none.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="Measure on this device, for example cuda, against eager PyTorch. Default: the CPU.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure the mesh or a part of it against its floor, side by side on this machine.

    The floor is the same work in one process without any RPC; the ratio is what the mesh costs. `worker` also knows other model servers,
    `features` knows Feast.

    Example:  plait bench rank --json reports/bench-rank.json

    Example:  plait bench worker --peers mosec,kserve --json reports/bench-worker.json

    Example:  plait bench worker --device cuda

    Example:  plait bench features --quick --peers feast
    """
    from rich.console import Console  # noqa: PLC0415

    run = extensions.find(extensions.BENCHES, name)
    run(Console(), json_path, state, quick, **_taken(run, name, {"peers": peers, "device": device}))


def _taken(run: Any, name: str, given: dict[str, str | None]) -> dict[str, str]:
    """Return what was given of the options that not every benchmark takes.

    Raises InvalidArgument (BENCH_WITHOUT_PEERS, BENCH_WITHOUT_DEVICE) where this one does not.
    """
    from plait.errors import InvalidArgument  # noqa: PLC0415

    found = {option: value for option, value in given.items() if value is not None}
    for option in found:
        if option not in inspect.signature(run).parameters:
            raise InvalidArgument(
                f"the benchmark {name!r} knows no {option}: leave --{option} out", reason=f"BENCH_WITHOUT_{option.upper()}"
            )
    return found
