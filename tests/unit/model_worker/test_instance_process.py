from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.rpc import status_pb2
from tests.fakes import instance
from tests.fakes.worker_world import publish_doubler

from model_worker.instance_process import Kind, load_pinned, serve
from model_worker.shared_arrays import Arena, Disconnected, receive, send
from plait.errors import FailedPrecondition


class Worker:
    """The other side of `serve`, which runs in a thread here."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.inputs, self.outputs = Arena.create(), Arena.create()
        self._theirs = (theirs, Arena(os.dup(self.inputs.fd)), Arena(os.dup(self.outputs.fd)))
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        channel, inputs, outputs = self._theirs
        with channel:
            serve(channel, inputs, outputs, instance.load)
        inputs.close()
        outputs.close()

    def ask(self, kind: Kind, body: bytes) -> tuple[int, bytes]:
        send(self.channel, kind, body)
        return receive(self.channel)

    def load(self, digest: str = "") -> tuple[int, bytes]:
        return self.ask(Kind.LOAD, json.dumps({"digest": digest}).encode())

    def call(self, *inputs: Any) -> tuple[int, bytes]:
        return self.ask(Kind.CALL, self.inputs.write(inputs))

    def close(self) -> None:
        self.channel.close()
        self.thread.join()
        self.inputs.close()
        self.outputs.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def order(text: bytes) -> Any:
    return np.array([text], np.object_)


def test_it_loads_answers_and_ends_when_the_worker_hangs_up(worker: Worker) -> None:
    kind, body = worker.load()
    assert (kind, json.loads(body)) == (Kind.LOADED, {"platform": "puppet", "memory_bytes": 1234})
    for n in range(3):
        kind, table = worker.call(np.arange(n))
        assert kind == Kind.ANSWER
        assert worker.outputs.read(table)[0].tolist() == list(range(n))
    worker.channel.shutdown(socket.SHUT_RDWR)
    worker.thread.join(30)
    assert not worker.thread.is_alive()


def test_what_a_model_raises_is_told_without_its_message(worker: Worker) -> None:
    worker.load()
    assert worker.call(order(b"raise")) == (Kind.RAISED, b"KeyError")
    kind, body = worker.call(order(b"oom"))
    assert kind == Kind.REFUSED
    assert status_pb2.Status.FromString(body).message == "the device is full"
    assert worker.call(np.zeros(1))[0] == Kind.ANSWER


def test_a_table_that_lies_hurts_that_call_alone(worker: Worker) -> None:
    worker.load()
    assert worker.ask(Kind.CALL, b"nonsense") == (Kind.RAISED, b"ValueError")
    assert worker.call(np.zeros(1))[0] == Kind.ANSWER


def test_after_a_refused_load_it_ends(worker: Worker) -> None:
    assert worker.load("refused")[0] == Kind.REFUSED
    with pytest.raises(Disconnected):
        receive(worker.channel)


def test_only_the_pinned_artifact_is_loaded(tmp_path: Path) -> None:
    version = publish_doubler(tmp_path / "doubler")
    options = {"num_threads": 1, "device": "cpu", "autocast": "", "buckets": [1, 2]}
    ours = {"folder": version.artifact, "digest": version.digest, "options": options}
    model = load_pinned(json.loads(json.dumps(ours)))
    assert model([np.ones((2, 2), np.float32)])[0].tolist() == [[2, 2], [2, 2]]
    (tmp_path / "doubler" / "model.pt2").write_bytes(b"another")
    with pytest.raises(FailedPrecondition) as caught:
        load_pinned(ours)
    assert caught.value.reason == "ARTIFACT_CORRUPT"


def test_the_child_imports_no_library_it_does_not_need() -> None:
    code = "import sys, model_worker.instance_process; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "model_worker.instance_process" in modules
    assert not modules & {
        "torch",
        "onnxruntime",
        "asyncpg",
        "redis",
        "opentelemetry.sdk",
        "psutil",
    }  # grpc is there: plait.errors holds its codes


def test_a_process_whose_worker_is_gone_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = str(theirs.fileno())
        run = subprocess.run([*instance.COMMAND, "1", fd, fd, fd], pass_fds=[theirs.fileno()], timeout=60, check=False)
    assert run.returncode == 0
