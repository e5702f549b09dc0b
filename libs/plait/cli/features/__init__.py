"""`plait features …`: history of the online features, who is erased from it, what is in it, and where they come from."""

from __future__ import annotations

import typer

from plait.cli.features import epochs, erase, events, explain, export, import_feast, materialize, rebuild, replay, skew

_HELP = """Fill, flip, look at and clean up the online features, and take them over from Feast.

  plait features materialize item-stats --from history.parquet

  plait features replay item-activity --from events.parquet

  plait features epochs item-stats

  plait features publish --from events.jsonl

  plait features explain home --id user=42 --id item=7

  plait features rollback item-stats --reason "wrong prices"

  plait features rebuild

  plait features import-feast feature_repo/ --out manifests/
"""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(name="features", help=_HELP, no_args_is_help=True)
    for command in (materialize, replay, epochs, rebuild, events, explain, skew, export, erase, import_feast):
        command.register(group)
    app.add_typer(group)
