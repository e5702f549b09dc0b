"""`python -m feature_retrieval`."""

from plait.rpc import core


def main() -> None:
    """Run the service."""
    core.use_pollers()
    from feature_retrieval.app import open_service  # noqa: PLC0415 - grpc is imported from here on
    from feature_retrieval.settings import FeatureRetrievalSettings  # noqa: PLC0415
    from plait.rpc.process import run  # noqa: PLC0415

    run("feature-retrieval", FeatureRetrievalSettings, open_service)


if __name__ == "__main__":
    main()
