"""`plait features …`: what is done with the online features from outside."""

from __future__ import annotations

import typer

from plait.cli.features import import_feast

_HELP = """Take online features over.

  plait features import-feast feature_repo/ --out manifests/
"""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(name="features", help=_HELP, no_args_is_help=True)
    for command in (import_feast,):
        command.register(group)
    app.add_typer(group)
