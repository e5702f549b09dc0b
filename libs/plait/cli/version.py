"""`plait version`."""

from __future__ import annotations

import importlib.metadata
import platform

import typer

from plait.cli.options import JsonOption
from plait.cli.output import write_json

_PARTS = ("plait", "plait-router", "plait-feature-retrieval", "plait-model-worker", "grpcio", "protobuf")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(version)


def version(as_json: JsonOption = False) -> None:
    """Show the versions of plait, its installed services and Python.

    Example:  plait version --json
    """
    versions = {name: found for name in _PARTS if (found := _version(name))}
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    if as_json:
        write_json(versions)
        return
    for name, found in versions.items():
        typer.echo(f"{name} {found}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
