"""The life of a service process, the same for every service: settings → constructors → SERVING → SIGTERM → drain → close in reverse."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from plait.rpc.https import metrics_context
from plait.rpc.server import RpcServer
from plait.settings import ServiceSettings, SettingsError, fields, load
from plait.telemetry import logging
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

EX_CONFIG: Final = 78  # sysexits.h
S = TypeVar("S", bound=ServiceSettings)


class Tasks:
    """Owns the background loops of a process. One that ends, in whatever way, is a fault and stops the process."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Tasks {[task.get_name() for task in self._tasks]}>"

    def start(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        """Run an endless loop until the process ends."""
        self._tasks.append(self._group.create_task(self._guard(loop, name), name=name))

    def stop(self) -> None:
        """Cancel every loop; the group waits for them."""
        for task in self._tasks:
            task.cancel()

    @staticmethod
    async def _guard(loop: Coroutine[Any, Any, None], name: str) -> None:
        await loop
        raise RuntimeError(f"the background loop {name!r} ended, which it never should")


OpenService = Callable[[S, AsyncExitStack, Tasks], Awaitable[RpcServer]]


def run(name: str, settings_class: type[S], open_service: OpenService[S]) -> None:
    """Run the service `name` until SIGTERM or SIGINT; exit 78 for bad settings, 1 for a fault.

    `--settings` prints every setting with its meaning instead.
    """
    if "--settings" in sys.argv[1:]:
        sys.stdout.writelines(f"{setting}: {meaning}\n" for setting, meaning in fields(settings_class))
        return
    try:
        settings = load(settings_class)
    except SettingsError as error:
        sys.stderr.write(f"{name}: {error}\n(run with --settings to see all of them)\n")
        raise SystemExit(EX_CONFIG) from None
    logging.configure(settings.telemetry, name)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(name, settings, open_service))
    except Exception as error:  # the end of the process: say why, in one line of the log
        log.critical("the process stops because of a fault", exc_info=error)
        raise SystemExit(1) from None


async def serve(name: str, settings: S, open_service: OpenService[S], stop: asyncio.Event | None = None) -> None:
    """Open the service, serve until `stop` (or a signal), drain, close."""
    stop = stop or _stop_on_signals()
    async with AsyncExitStack() as stack:
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        stack.callback(server.tracing.close)
        addresses = {}
        if settings.telemetry.metrics_port is not None:
            endpoint = server.metrics.serve(
                settings.telemetry.metrics_host, settings.telemetry.metrics_port, metrics_context(settings.telemetry)
            )
            stack.callback(endpoint.close)
            addresses["metrics"] = endpoint.address
        await server.start()
        tasks.start(server.tend(), "server")
        addresses["rpc"] = server.address
        _spare_the_collector()
        if settings.rpc.port_file is not None:
            _write_atomically(settings.rpc.port_file, json.dumps(addresses))
        log.info("serving", address=server.address, pid=os.getpid())
        try:
            await stop.wait()
        finally:
            log.info("draining", server=repr(server))
            await server.drain()
            log.info("drained")


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _spare_the_collector() -> None:
    """Keep what start-up made out of every later collection: a full one over torch's and grpc's modules costs tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
