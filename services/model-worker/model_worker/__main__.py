"""`python -m model_worker`."""

from model_worker.app import open_service
from model_worker.settings import ModelWorkerSettings
from plait.rpc.process import run

if __name__ == "__main__":
    run("model-worker", ModelWorkerSettings, open_service)
