"""`python -m router`."""

from plait.rpc.process import run
from router.app import open_service
from router.settings import RouterSettings

if __name__ == "__main__":
    run("router", RouterSettings, open_service)
