from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.fakes.instance import COMMAND
from tests.fakes.worker_world import publish_ranker

from model_worker.backends import LoadOptions
from model_worker.process_instance import ModelRaised, ProcessModel, State, _Child
from plait.dtypes import BY_NAME
from plait.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted, Unavailable

RESTARTS = 31
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def puppet(digest: str = "", **more: Any) -> ProcessModel:
    return ProcessModel(Path("/"), digest, LoadOptions(), name="ranker version 7", command=COMMAND, **more)


def say(order: str) -> list[Any]:
    return [np.array([order.encode()], np.object_)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def ready_again(model: ProcessModel, former: int | None) -> bool:
    return model.state is State.READY and model.pid != former


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessModel]:
    """A child for the tests that leave it as it was."""
    model = puppet()
    yield model
    model.close()


@pytest.fixture
def own() -> Iterator[ProcessModel]:
    model = puppet()
    yield model
    model.close()


def test_arrays_of_every_type_come_back(shared: ProcessModel) -> None:
    for dtype in BY_NAME.values():
        values: Any = [[b"a", b""], [b"\0" * 300, b"z"]] if dtype.name == "bytes" else [[0, 1], [1, 0]]
        sent = np.array(values, np.object_ if dtype.name == "bytes" else np.dtype(dtype.numpy))
        (back,) = shared([sent])
        assert back.dtype == sent.dtype
        assert back.tolist() == sent.tolist()


def test_answers_outlive_the_next_call_and_growth(shared: ProcessModel) -> None:
    (first,) = shared([ROWS])
    large = np.arange(500_000, dtype=np.float64)
    (second,) = shared([large])
    assert np.array_equal(first, ROWS)
    assert np.array_equal(second, large)
    assert first.flags.writeable


def test_it_says_what_it_is(shared: ProcessModel) -> None:
    assert (shared.platform, shared.state) == ("puppet", State.READY)
    assert shared.memory_bytes > 1_000_000  # the process, which is more than the model's 1234
    assert repr(shared) == f"<ProcessModel ranker version 7 ready pid={shared.pid} restarts=0>"


def test_errors_cross_typed_and_without_values(shared: ProcessModel) -> None:
    with pytest.raises(ModelRaised, match=r"\AKeyError\Z"):
        shared(say("raise"))
    with pytest.raises(ResourceExhausted) as caught:
        shared(say("oom"))
    assert (caught.value.reason, caught.value.retry_after_s) == ("OUT_OF_DEVICE_MEMORY", 1.5)
    assert np.array_equal(shared([ROWS])[0], ROWS)  # the process goes on
    assert shared.restarts == 0


def test_the_child_ignores_the_workers_signals_and_holds_no_secrets(shared: ProcessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared(say("ignored"))[0].tolist() == [True, True]
    monkeypatch.setenv("PLAIT_SECRET", "s")
    model = puppet()
    try:
        assert model(say("environment PLAIT_SECRET"))[0].item() == b"none"
        # stdin, stdout, stderr, the socket, two memories, mapped (mmap keeps its own), and the folder being listed: none of the other child's
        assert model(say("descriptors"))[0].item() == 9
    finally:
        model.close()


def test_a_process_killed_while_it_computes_is_replaced(tmp_path: Path, shared: ProcessModel) -> None:
    model = puppet()
    try:
        former = model.pid
        started = tmp_path / "started"

        def kill() -> None:
            until(lambda: started.exists() and started.read_text() != "")
            os.kill(int(started.read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(Unavailable, match="ranker version 7") as caught:
            model(say(f"hang {started}"))
        killer.join()
        assert caught.value.reason == "INSTANCE_LOST"
        assert np.array_equal(shared([ROWS])[0], ROWS)  # the others go on
        until(lambda: ready_again(model, former))
        assert np.array_equal(model([ROWS])[0], ROWS)
        assert model.restarts == 1
        assert model.ended == "killed by SIGKILL"
    finally:
        model.close()


def test_a_process_that_hangs_is_killed_and_replaced(own: ProcessModel, tmp_path: Path) -> None:
    former = own.pid
    own.call_timeout_s = 0.2
    with pytest.raises(DeadlineExceeded, match="ranker version 7") as caught:
        own(say(f"hang {tmp_path / 'x'}"))
    assert caught.value.reason == "MODEL_HUNG"
    with pytest.raises(Unavailable) as refused:
        own([ROWS])  # at once: the queue does not wait for the restart
    assert refused.value.reason == "INSTANCE_LOST"
    own.call_timeout_s = None
    until(lambda: ready_again(own, former))
    assert np.array_equal(own([ROWS])[0], ROWS)


def test_a_crash_and_an_idle_death_are_replaced_and_leak_nothing_however_often(own: ProcessModel) -> None:
    here = psutil.Process()
    own([ROWS])  # maps the memory, which takes descriptors too
    descriptors, threads = here.num_fds(), threading.active_count()
    for n in range(1, RESTARTS + 1):
        former = own.pid
        assert former is not None
        if n % 3 == 0:
            own.restart()
        elif n % 3 == 1:
            os.kill(former, signal.SIGKILL)
        else:
            with pytest.raises(Unavailable):
                own(say("abort"))
        until(lambda former=former: ready_again(own, former))  # type: ignore[misc]
        assert np.array_equal(own([ROWS])[0], ROWS)
        assert own.restarts == n
        assert not psutil.pid_exists(former)  # reaped
    until(lambda: (here.num_fds(), threading.active_count()) == (descriptors, threads))


def test_one_that_takes_all_the_memory_it_may_says_so_and_harms_no_other(own: ProcessModel, shared: ProcessModel) -> None:
    with pytest.raises(ModelRaised, match=r"\AMemoryError\Z"):
        own(say("eat it"))
    assert np.array_equal(shared([ROWS])[0], ROWS)
    assert np.array_equal(own([ROWS])[0], ROWS)  # Python has freed it again; the kernel would have killed the process, see above


def test_a_process_that_cannot_be_had_takes_no_descriptors() -> None:
    here = psutil.Process()
    descriptors, (soft, hard) = here.num_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    errors = []
    while not errors or errors[-1] == errno.EMFILE:
        unused = os.dup(2)
        os.close(unused)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (unused + len(errors), hard))  # so many it gets of those it needs
            with pytest.raises(OSError) as failed:  # noqa: PT011 - which one is what ends the loop
                _Child(("/nowhere/python",))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        errors.append(failed.value.errno or 0)
        assert here.num_fds() == descriptors
    assert errors[-1] == errno.ENOENT  # in the end there were enough
    assert len(errors) > 6


def test_a_keeper_outlives_whatever_keeps_it_from_starting(own: ProcessModel) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    former = own.pid
    assert former is not None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        os.kill(former, signal.SIGKILL)
        until(lambda: own.state is State.DEAD and own.restarts >= 1)
        with pytest.raises(Unavailable) as refused:
            own([ROWS])
        assert refused.value.reason == "INSTANCE_LOST"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    own.restart()
    until(lambda: own.state is State.READY)
    assert np.array_equal(own([ROWS])[0], ROWS)


def test_a_fault_of_the_keeper_is_survived(own: ProcessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    former = own.pid
    assert former is not None
    own([ROWS])  # maps the memory, which takes descriptors too
    descriptors = psutil.Process().num_fds()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    os.kill(former, signal.SIGKILL)
    until(lambda: own.state is State.DEAD and own.restarts >= 1)
    monkeypatch.undo()
    own.restart()
    until(lambda: own.state is State.READY)
    assert np.array_equal(own([ROWS])[0], ROWS)
    until(lambda: psutil.Process().num_fds() == descriptors)


def test_no_named_memory_is_left(own: ProcessModel) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no /dev/shm here")
    own([ROWS])
    pid = own.pid
    assert pid is not None
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "memfd:plait-arrays (deleted)" in maps
    assert "/dev/shm/" not in maps


def test_close_reaps_even_what_does_not_listen(tmp_path: Path) -> None:
    model = puppet()
    pid = model.pid
    assert pid is not None
    started = tmp_path / "started"
    errors: list[Exception] = []

    def call() -> None:
        try:
            model(say(f"hang {started}"))
        except Unavailable as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    until(started.exists)
    model.close()
    caller.join()
    assert len(errors) == 1
    assert not psutil.pid_exists(pid)
    model.close()  # again is no fault


@pytest.mark.parametrize(
    ("digest", "error", "reason"),
    [
        ("refused", FailedPrecondition, "ARTIFACT_INVALID"),
        ("breaks", Internal, "MODEL_LOAD_FAILED"),
        ("hangs", DeadlineExceeded, "MODEL_HUNG"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(digest: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as caught:
        puppet(digest, load_timeout_s=1.5)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert not [c for c in psutil.Process().children() if c.cmdline()[:3] == list(COMMAND) and c.status() == psutil.STATUS_ZOMBIE]


def test_a_command_that_is_not_there_is_an_error() -> None:
    with pytest.raises(Unavailable, match="cannot be started"):
        ProcessModel(Path("/"), "", LoadOptions(), name="m", command=("/nowhere/python",))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_the_child_dies_with_its_worker_even_while_it_computes(tmp_path: Path) -> None:
    started = tmp_path / "started"
    code = (
        "import sys; from tests.unit.model_worker.test_process_instance import puppet, say;"
        "puppet()(say('hang ' + sys.argv[1]))"
    )  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(started)]) as worker:
        until(lambda: started.exists() and started.read_text() != "")
        child = psutil.Process(int(started.read_text()))
        worker.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_threads_each_with_their_own_process_do_not_mix() -> None:
    models = [puppet() for _ in range(2)]
    wrong: list[int] = []

    def work(n: int) -> None:
        for k in range(300):
            sent = np.full((k % 50 + 1, 3), n * 1000 + k, np.int64)
            if not np.array_equal(models[n]([sent])[0], sent):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        model.close()
    assert wrong == []


def test_what_the_process_says_is_logged_and_cut(own: ProcessModel, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    own(say("say " + "x" * 1000))
    own.close()
    said = caplog.text + capsys.readouterr().out
    assert "x" * 300 in said
    assert "x" * 301 not in said


def test_a_real_artifact_is_loaded_checked_and_run(tmp_path: Path) -> None:
    version = publish_ranker(tmp_path / "ranker")
    folder = Path(version.artifact)
    user, item = np.array([[1, 2, 3]], np.float32), np.eye(3, dtype=np.float32)
    model = ProcessModel(folder, version.digest or "", LoadOptions(), name="ranker version 1")
    try:
        assert model.platform == "pytorch_torchscript"
        assert model.memory_bytes > 0
        assert np.allclose(np.ravel(model([user, item, np.array([0, 3], np.int64)])[0]), [1, 2, 3])
    finally:
        model.close()
    with pytest.raises(FailedPrecondition) as caught:
        ProcessModel(folder, "sha256:" + "0" * 64, LoadOptions(), name="ranker version 1")
    assert caught.value.reason == "ARTIFACT_CORRUPT"


def test_a_process_whose_device_is_lost_is_replaced(own: ProcessModel) -> None:
    former = own.pid
    with pytest.raises(Unavailable) as caught:
        own(say("lost"))
    assert caught.value.reason == "DEVICE_LOST"
    until(lambda: ready_again(own, former))
    assert np.array_equal(own([ROWS])[0], ROWS)
    assert own.restarts == 1
