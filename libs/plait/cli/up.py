"""`plait up`."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import DEFAULT_STATE, StateOption
from plait.cli.output import write_line, write_note, write_table

if TYPE_CHECKING:
    from plait.local.endpoints import Endpoints
    from plait.local.mesh import Mesh

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LABELS = {"postgres": "PostgreSQL", "redis": "Redis"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(up)


def up(
    state: StateOption = DEFAULT_STATE,
    postgres_dsn: Annotated[
        str | None,
        typer.Option("--postgres-dsn", envvar="PLAIT_POSTGRES_DSN", help="Use this Postgres, not an embedded one.", show_default=False),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option("--redis-url", envvar="PLAIT_REDIS_URL", help="Use this Redis, not an embedded one.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON, in one line, once all is up.")] = False,
) -> None:
    """Run everything on this machine, in the foreground, until Ctrl-C.

    PostgreSQL, Redis and the three services, each a process of its own. What is kept in the state folder is there again next time.

    Once all are SERVING, its endpoints.json holds every address and a ready API key; only you may read it.

    Example:  plait up --state .state

    Example:  plait up --redis-url redis://cache.internal:6379/0
    """
    asyncio.run(_up(state, postgres_dsn, redis_url, as_json))


async def _up(state: Path, postgres_dsn: str | None, redis_url: str | None, as_json: bool) -> None:
    """Run the mesh until a signal; the first one ends it in order, however far it has come."""
    from plait.local.mesh import Mesh  # noqa: PLC0415

    started = time.monotonic()

    def report(name: str, what: str) -> None:
        if not as_json:
            write_note(f"{time.monotonic() - started:6.1f} s  {_LABELS.get(name, name)}: {what}")

    mesh = Mesh(state, postgres_dsn=postgres_dsn, redis_url=redis_url, report=report)
    running = asyncio.create_task(_run(mesh, as_json, started), name="mesh")
    stopped = asyncio.Event()

    def stop() -> None:
        if not stopped.is_set():
            stopped.set()
            running.cancel()

    for number in _STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await running
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise
    if not as_json:
        write_note("everything is down")


async def _run(mesh: Mesh, as_json: bool, started: float) -> None:
    async with mesh:
        if as_json:
            write_json_line(mesh.endpoints)
        else:
            _show(mesh.endpoints, time.monotonic() - started)
        await mesh.watch()


def write_json_line(endpoints: Endpoints) -> None:
    """Print the addresses, without the secrets, in one line that a program can wait for."""
    import json  # noqa: PLC0415

    document = {**endpoints.public(), "endpoints_file": str(Path(endpoints.state) / "endpoints.json")}
    typer.echo(json.dumps(document))


def _show(endpoints: Endpoints, took_s: float) -> None:
    rows = [
        ("router", endpoints.router),
        ("feature-retrieval", endpoints.feature_retrieval),
        ("model-worker", endpoints.model_worker),
        ("postgres", _host(endpoints.postgres_dsn)),
        ("redis", _host(endpoints.redis_url)),
    ]
    write_table(
        ("part", "address", "metrics", "pid"),
        [(_LABELS.get(n, n), address, _metrics(endpoints, n), endpoints.pids.get(n, "yours")) for n, address in rows],
    )
    write_line(f"\nup in {took_s:.1f} s; addresses and an API key: {endpoints.state}/endpoints.json; logs: {endpoints.state}/logs/")
    write_line("Ctrl-C ends it all", "dim")


def _metrics(endpoints: Endpoints, name: str) -> str:
    return f"http://{endpoints.metrics[name]}/metrics" if name in endpoints.metrics else ""


def _host(url: str) -> str:
    """Return host:port of a URL that also holds a password."""
    from urllib.parse import urlsplit  # noqa: PLC0415

    return urlsplit(url).netloc.rpartition("@")[2]
