"""The `plait` script, also as `python -m plait.cli` where it is not on the path."""

from plait.rpc import core


def main() -> None:
    """Run the command line."""
    core.use_pollers()
    from plait.cli import main as commands  # noqa: PLC0415 - grpc is imported from here on

    commands.main()


if __name__ == "__main__":
    main()
