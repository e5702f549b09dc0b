"""`python -m model_worker`."""

from plait.rpc import core


def main() -> None:
    """Run the service."""
    core.use_pollers()
    from model_worker.app import open_service  # noqa: PLC0415 - grpc is imported from here on
    from model_worker.settings import ModelWorkerSettings  # noqa: PLC0415
    from plait.rpc.process import run  # noqa: PLC0415

    run("model-worker", ModelWorkerSettings, open_service)


if __name__ == "__main__":
    main()
