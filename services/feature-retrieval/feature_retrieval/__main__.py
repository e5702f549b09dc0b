"""`python -m feature_retrieval`."""

from feature_retrieval.app import open_service
from feature_retrieval.settings import FeatureRetrievalSettings
from plait.rpc.process import run

if __name__ == "__main__":
    run("feature-retrieval", FeatureRetrievalSettings, open_service)
