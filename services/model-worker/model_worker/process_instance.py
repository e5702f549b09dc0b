"""A model in a process of its own: what it does to its process, crash, hang, run out of memory, happens to no other model.

`ProcessModel` is a `backends.Model`, so whoever runs it need not know. A thread of its own, the keeper, starts the process, waits for its
end and starts the next one; so a caller never waits for a restart, and a process that dies while idle is noticed and reaped at once. The
keeper must also outlive the process because Linux sends PR_SET_PDEATHSIG when the thread that started it ends, not the whole parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Final, cast

import psutil  # type: ignore[import-untyped]
from google.rpc import status_pb2

from model_worker.backends import LoadOptions
from model_worker.instance_process import Kind
from model_worker.packed import Array
from model_worker.shared_arrays import Arena, Disconnected, receive, send
from plait.errors import DeadlineExceeded, Internal, PlaitError, Unavailable, from_status
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

COMMAND: Final = (sys.executable, "-P", "-m", "model_worker.instance_process")
_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 30.0
_OURS: Final = "PLAIT_"  # settings, secrets among them: a model has no business with them
_CRASH: Final = "Fatal Python error"  # faulthandler's first line
_CLOSE_GRACE_S: Final = 2.0
_MAX_LOGGED_LINES: Final = 20  # of each process
_MAX_LOGGED_CHARS: Final = 300  # of each line


class State(StrEnum):
    """Where an instance is."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class ModelRaised(Exception):
    """The model raised something in its process; the message is the name of its type."""


class _Child:
    """One process, its socket and its memory. All that it holds is given back by `close`, which must follow `wait`."""

    def __init__(self, command: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:  # gives back what was taken where the rest cannot be had
            self.inputs, self.outputs = (stack.enter_context(contextlib.closing(Arena.create())) for _ in range(2))
            self.channel, theirs = map(stack.enter_context, socket.socketpair())
            fds = (theirs.fileno(), self.inputs.fd, self.outputs.fd)
            self.process = subprocess.Popen(  # noqa: S603 - the command is ours
                [*command, str(os.getpid()), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
                pass_fds=fds,
                start_new_session=True,  # a terminal's Ctrl-C is for the worker
            )
            self.stderr = cast("IO[bytes]", self.process.stderr)  # whoever reads it closes it
            theirs.close()
            stack.pop_all()

    def load(self, order: bytes, timeout_s: float) -> dict[str, Any]:
        """Have it load; return what it says of the model."""
        self.channel.settimeout(timeout_s)
        send(self.channel, Kind.LOAD, order)
        kind, body = receive(self.channel)
        if kind != Kind.LOADED:
            raise _error(kind, body)
        told: dict[str, Any] = json.loads(body)
        return told

    def call(self, inputs: Sequence[Array], timeout_s: float | None) -> list[Array]:
        """Compute in it."""
        self.channel.settimeout(timeout_s)
        send(self.channel, Kind.CALL, self.inputs.write(inputs))
        kind, body = receive(self.channel)
        if kind != Kind.ANSWER:
            raise _error(kind, body)
        # BYTES are made anew by reading; the rest is copied, for the next answer is written to the same place.
        return [array if array.dtype.hasobject else array.copy() for array in self.outputs.read(body)]

    def own_bytes(self) -> int:
        """Return the bytes it shares with no other process; 0 where that cannot be told."""
        try:
            return int(psutil.Process(self.process.pid).memory_full_info().uss)
        except psutil.Error:
            return 0

    def hang_up(self) -> None:
        """End the conversation, which ends an idle process and frees whoever waits for an answer."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give everything back but its stderr."""
        self.channel.close()
        self.inputs.close()
        self.outputs.close()


class ProcessModel:
    """A model that computes in a child process. Calls come from one thread at a time, `close` and `restart` from any.

    `folder` holds a verified artifact and `digest` is that of its manifest, which the child checks again. `name` says the model and its
    version in messages. A call may take `call_timeout_s` (None: for ever) and loading `load_timeout_s`. `restarts` counts the processes
    that were started after the first, `ended` says why the last one that had loaded ended unasked. `memory_bytes`: what the process holds
    that it shares with no other, once it has loaded, or its weights where that is more.
    """

    def __init__(
        self,
        folder: Path,
        digest: str,
        options: LoadOptions,
        *,
        name: str,
        call_timeout_s: float | None = None,
        load_timeout_s: float = 120.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Start the process and wait until it has loaded.

        Raises FailedPrecondition as the backend does, DeadlineExceeded (MODEL_HUNG), Unavailable (INSTANCE_LOST).
        """
        order = {"folder": str(folder.resolve()), "digest": digest, "options": dataclasses.asdict(options)}
        self._order = json.dumps(order).encode()
        self._command = command
        self._on_cpu = options.device == "cpu"
        self._name = name
        self.call_timeout_s = call_timeout_s
        self._load_timeout_s = load_timeout_s
        self._calling = threading.Lock()  # held during a call: descriptors are not closed under it
        self._changed = threading.Condition()
        self._closing = False
        self._hurry = False
        self._child: _Child | None = None
        self._why = ""
        self._tried = False
        self._failure: PlaitError | None = None
        self.state = State.STARTING
        self.restarts = 0
        self.ended = ""
        self.platform = ""
        self.memory_bytes = 0
        self._keeper = threading.Thread(target=self._keep, name=f"keeper {name}", daemon=True)
        self._keeper.start()
        with self._changed:
            self._changed.wait_for(lambda: self._tried)
            failure = self._failure
        if failure is not None:
            self.close()
            raise failure

    def __repr__(self) -> str:
        return f"<ProcessModel {self._name} {self.state} pid={self.pid} restarts={self.restarts}>"

    @property
    def pid(self) -> int | None:
        """The process's id, None while there is none."""
        child = self._child
        return child.process.pid if child else None

    def prepare_thread(self) -> None:
        """Nothing: the child prepares its own thread."""

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Compute in the child. Blocks without the interpreter's lock.

        Raises what the model raises as PlaitError, else ModelRaised; Unavailable (INSTANCE_LOST) where the process ended or is not ready;
        DeadlineExceeded (MODEL_HUNG) where it was killed for taking longer than `call_timeout_s`. The next process is then on its way.
        """
        with self._calling:
            child = self._child
            if child is None or self.state is not State.READY:
                why = f"the last start failed with {self._failure.reason}" if self._failure else "its process is being started"
                raise self._lost(f"is not ready: {why}")
            try:
                return child.call(inputs, self.call_timeout_s)
            except TimeoutError as error:
                self._end(child, "a call took too long")
                raise self._hung("answer", self.call_timeout_s) from error
            except Disconnected as error:
                self._end(child, "")
                raise self._lost("was lost: its process ended while it computed") from error
            except ValueError as error:
                self._end(child, "it answered what is no answer")
                raise self._lost("was lost: its process answered what is no answer") from error

    def restart(self) -> None:
        """Kill the process, if there is one, and start the next without waiting for the backoff."""
        with self._changed:
            self._hurry = True
            child = self._child
            self._changed.notify_all()
        if child is not None:
            self._end(child, "a restart was asked for")

    def close(self) -> None:
        """End the process and wait for it; killed where it does not end by itself."""
        with self._changed:
            self._closing = True
            child = self._child
            self._changed.notify_all()
        if child is not None:
            child.hang_up()
        self._keeper.join(_CLOSE_GRACE_S)
        if self._keeper.is_alive() and child is not None:
            child.process.kill()
        self._keeper.join()

    def _end(self, child: _Child, why: str) -> None:
        with self._changed:
            if self._child is child:
                self.state = State.DEAD
                self._why = self._why or why
        child.process.kill()  # the keeper reaps it; Popen knows whether it did already

    def _keep(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                lived = self._live()
            except Exception:  # no thread, no descriptor: without a keeper nothing would ever be started again
                log.exception("an instance cannot be kept", model=self._name)
                self._settle(State.DEAD, self._lost("cannot be started"))
                lived = False
            backoff_s = _FIRST_BACKOFF_S if lived else min(backoff_s * 2, _MAX_BACKOFF_S)
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._hurry, backoff_s)
                if self._closing:
                    return
                self._hurry = False
                self.restarts += 1
                self.state = State.STARTING

    def _live(self) -> bool:
        """See one process from its start to its end; whether it ever was ready."""
        try:
            child = _Child(self._command)
        except OSError as error:
            self._settle(State.DEAD, self._lost(f"cannot be started ({error.strerror})"))
            return False
        with self._changed:
            self._child, self._why = child, ""
            if self._closing:
                child.hang_up()
        told: list[str] = []
        try:
            reader = self._start_reader(child, told)
            ready = self._loaded(child)
            code = child.process.wait()
            reader.join(_CLOSE_GRACE_S)  # a process that the model started may hold the pipe open
        finally:
            child.process.kill()  # where it has not ended, something here went wrong
            child.process.wait()
            child.hang_up()
            with self._calling:  # a call that still held the socket sees its end first
                with self._changed:
                    self._child, self.state, why = None, State.DEAD, self._why
                    closing = self._closing
                child.close()
        if ready and not closing:
            reason = self.ended = why or _ending(code)
            log.warning("the process of a model instance ended", model=self._name, reason=reason, said="".join(told))
        return ready

    def _loaded(self, child: _Child) -> bool:
        try:
            told = child.load(self._order, self._load_timeout_s)
            self.platform, self.memory_bytes = str(told["platform"]), self._held_bytes(child, int(told["memory_bytes"]))
        except TimeoutError:
            failure: PlaitError = self._hung("load", self._load_timeout_s)
        except PlaitError as error:
            failure = error
        except ModelRaised as error:
            failure = Internal(f"{self._name} cannot be loaded: {error} was raised in its process", reason="MODEL_LOAD_FAILED")
        except (Disconnected, ValueError, KeyError, TypeError):
            failure = self._lost("was lost: its process ended while it loaded")
        else:
            self._settle(State.READY, None)
            return True
        child.process.kill()
        self._settle(State.DEAD, failure)
        return False

    def _held_bytes(self, child: _Child, weights_bytes: int) -> int:
        """Return what it holds where its weights are: beside an accelerator's memory, the process's own is no part of it."""
        return max(weights_bytes, child.own_bytes()) if self._on_cpu else weights_bytes

    def _settle(self, state: State, failure: PlaitError | None) -> None:
        with self._changed:
            self.state, self._failure, self._tried = state, failure, True
            self._changed.notify_all()

    def _start_reader(self, child: _Child, told: list[str]) -> threading.Thread:
        reader = threading.Thread(target=self._log_lines, args=(child.stderr, told), name="stderr", daemon=True)
        try:
            reader.start()
        except RuntimeError:
            child.stderr.close()
            raise
        return reader

    def _log_lines(self, stderr: IO[bytes], told: list[str]) -> None:
        """Read to the end whatever comes, since a full pipe would stop the process; log the first lines, cut."""
        logged = 0
        with stderr:
            while line := stderr.readline(4096):
                text = line.decode(errors="replace").strip()[:_MAX_LOGGED_CHARS]
                if text and logged < _MAX_LOGGED_LINES:
                    logged += 1
                    if not told or not told[0].startswith(_CRASH):  # what comes after that line is where it stood
                        told[:] = [text]
                    log.warning("a model instance said", model=self._name, line=text)

    def _lost(self, what: str) -> Unavailable:
        return Unavailable(f"an instance of {self._name} {what}; try again", reason="INSTANCE_LOST", retry_after_s=_FIRST_BACKOFF_S)

    def _hung(self, what: str, timeout_s: float | None) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._name} did not {what} within {timeout_s} s and its process was killed", reason="MODEL_HUNG")


def _error(kind: int, body: bytes) -> Exception:
    if kind == Kind.RAISED:
        return ModelRaised(body.decode(errors="replace")[:100])
    if kind != Kind.REFUSED:
        return ValueError("an unexpected frame")
    status = status_pb2.Status.FromString(body)
    return from_status(status.code, status.message, body)


def _ending(code: int) -> str:
    if code >= 0:
        return f"it exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
