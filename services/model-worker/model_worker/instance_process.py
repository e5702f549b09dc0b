"""The child's side of a model instance in a process of its own: loads one model, answers calls over a socket, and never outlives its worker.

Signals are the worker's business: a Ctrl-C or SIGTERM that reaches the whole group must not end the model while the worker still drains.
Text that leaves this process names types and reasons, never what a model was given.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from model_worker.shared_arrays import Arena, Disconnected, receive, send
from plait.errors import PlaitError

if TYPE_CHECKING:
    from model_worker.backends import Model

_PR_SET_PDEATHSIG: Final = 1
Load = Callable[[Mapping[str, Any]], "Model"]


class Kind(IntEnum):
    """What a frame is."""

    LOAD = 1  # JSON: folder, digest, options
    LOADED = 2  # JSON: platform, memory_bytes
    CALL = 3  # a table of inputs
    ANSWER = 4  # a table of outputs
    REFUSED = 5  # a serialized google.rpc.Status
    RAISED = 6  # the name of an exception's type


def load_pinned(order: Mapping[str, Any]) -> Model:
    """Load the artifact that lies in `folder`, once its manifest has the `digest` and its files are what the manifest says."""
    # Here, so that the conversation itself needs none of the libraries that artifacts and models do.
    from model_worker import artifacts, backends  # noqa: PLC0415
    from model_worker.backends import LoadOptions  # noqa: PLC0415
    from plait.registry.records import ModelVersion  # noqa: PLC0415

    version = ModelVersion(version="1", artifact=order["folder"], digest=order["digest"])
    options = LoadOptions(**{**order["options"], "buckets": tuple(order["options"]["buckets"])})
    return backends.load(artifacts.fetch(version, None), options)


def serve(channel: socket.socket, inputs: Arena, outputs: Arena, load: Load) -> None:
    """Load what the first frame orders, then answer calls until the other side hangs up."""
    try:
        _, body = receive(channel)
        try:
            model = load(json.loads(body))
            model.prepare_thread()
        except Exception as error:
            _tell(channel, error)
            return
        send(channel, Kind.LOADED, json.dumps({"platform": model.platform, "memory_bytes": model.memory_bytes}).encode())
        while True:
            _, table = receive(channel)
            try:
                answer = outputs.write(model(inputs.read(table)))
            except Exception as error:
                _tell(channel, error)
                if isinstance(error, PlaitError) and error.reason == "DEVICE_LOST":
                    return  # no call of this process will reach the device again; the next process's will
            else:
                send(channel, Kind.ANSWER, answer)
    except Disconnected:
        return


def main(load: Load = load_pinned) -> None:
    """Run one instance. Arguments: the worker's process id, then the descriptors of the socket, the inputs and the outputs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    parent, *fds = (int(argument) for argument in sys.argv[1:5])
    if not _dies_with(parent):
        return
    for fd in fds:
        os.set_inheritable(fd, False)
    os.dup2(2, 1)  # what a library prints goes where its complaints go
    with socket.socket(fileno=fds[0]) as channel:
        serve(channel, Arena(fds[1]), Arena(fds[2]), load)


def _dies_with(parent: int) -> bool:
    """Have the kernel kill this process with the worker (Linux; elsewhere the closed socket ends it once it is idle)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent  # it may have died before


def _tell(channel: socket.socket, error: Exception) -> None:
    if isinstance(error, PlaitError):
        send(channel, Kind.REFUSED, error.to_status().SerializeToString())
    else:
        send(channel, Kind.RAISED, type(error).__name__.encode())


if __name__ == "__main__":
    main()
