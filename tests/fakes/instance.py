"""The child of a ProcessModel around a model made by hand: started as a script, it is a real process without the cost of a library's import."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_worker import instance_process
from model_worker.packed import Array
from plait.errors import FailedPrecondition, ResourceExhausted, Unavailable

COMMAND = (sys.executable, "-P", __file__)  # -P: this folder holds a model_worker too


class Puppet:
    """Answers its inputs, unless the first is one BYTES element that says what to do instead."""

    platform = "puppet"
    memory_bytes = 1234

    def prepare_thread(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing is held."""

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        order = inputs[0].item() if inputs and inputs[0].dtype.hasobject and inputs[0].size == 1 else b""
        match order.partition(b" ") if isinstance(order, bytes) else (b"", b"", b""):
            case (b"raise", _, _):
                raise KeyError("a secret value")
            case (b"oom", _, _):
                raise ResourceExhausted("the device is full", reason="OUT_OF_DEVICE_MEMORY", retry_after_s=1.5)
            case (b"lost", _, _):
                raise Unavailable("the device does not answer", reason="DEVICE_LOST")
            case (b"hang", _, path):
                Path(os.fsdecode(path)).write_text(str(os.getpid()))
                threading.Event().wait()
            case (b"say", _, text):
                os.write(2, text + b"\n")
            case (b"eat", _, _):
                held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))
                eaten = []
                while True:
                    eaten.append(bytearray(16 << 20))
            case (b"abort", _, _):
                os.abort()
            case (b"environment", _, name):
                return [np.array([os.environb.get(name, b"none")], np.object_)]
            case (b"ignored", _, _):
                return [np.array([signal.getsignal(s) is signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)])]
            case (b"descriptors", _, _):
                return [np.array(len(list(Path("/proc/self/fd").iterdir())))]
        return inputs


def load(order: Mapping[str, Any]) -> Puppet:
    """Refuse where the digest says so."""
    match order["digest"]:
        case "refused":
            raise FailedPrecondition("it cannot be used", reason="ARTIFACT_INVALID")
        case "hangs":
            threading.Event().wait()
        case "breaks":
            raise ImportError("a library is missing")
    return Puppet()


if __name__ == "__main__":
    instance_process.main(load)
