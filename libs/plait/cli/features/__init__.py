"""`plait features …`: history of the online features, who is erased from it, and what is in it."""

from __future__ import annotations

import typer

from plait.cli.features import epochs, erase, export, materialize

_HELP = """Fill, flip, look at and clean up the online features.

  plait features materialize item-stats --from history.parquet

  plait features epochs item-stats

  plait features rollback item-stats --reason "wrong prices"
"""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(name="features", help=_HELP, no_args_is_help=True)
    for command in (materialize, epochs, export, erase):
        command.register(group)
    app.add_typer(group)
