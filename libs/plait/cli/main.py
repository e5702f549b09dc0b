"""The `plait` command: its subcommands, and how every failure is told.

Each subcommand imports what it needs when it runs, so that `plait --help` and shell completion stay quick.
"""

from __future__ import annotations

import sys

import typer

from plait.cli import artifact, bench, cache, demo, explain, features, keys, migrate, outcome, rank, registry, up, version
from plait.cli.failures import FailuresGroup

_HELP = """Rank items for users through a mesh of three gRPC services.

Start here:

  plait up                    run everything on this machine

  plait demo                  rank real listings through the whole mesh

  plait apply -f manifests/   say which models, features and routes exist

  plait rank --route home --user 42 --items 7,8,9
"""

app = typer.Typer(
    name="plait",
    help=_HELP,
    cls=FailuresGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (up, demo, bench, artifact, registry, rank, explain, cache, outcome, keys, migrate, version, features):
    command.register(app)


def main() -> None:
    """Run the command line; the exit status is 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a title in another script must not end a command on a plain terminal
    app()


if __name__ == "__main__":
    main()
