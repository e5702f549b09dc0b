"""`python -m router`."""

from plait.rpc import core


def main() -> None:
    """Run the service."""
    core.use_pollers()
    from plait.rpc.process import run  # noqa: PLC0415
    from router.app import open_service  # noqa: PLC0415 - grpc is imported from here on
    from router.settings import RouterSettings  # noqa: PLC0415

    run("router", RouterSettings, open_service)


if __name__ == "__main__":
    main()
