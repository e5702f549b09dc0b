"""All of plait on this machine: PostgreSQL, the registry, Redis and the three services, up together and down together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Protocol, Self

from plait.local import keys
from plait.local.child import Child
from plait.local.endpoints import Endpoints
from plait.local.keys import Keys
from plait.local.postgres import EmbeddedPostgres
from plait.local.processes import ServiceProcess
from plait.local.redis import EmbeddedRedis
from plait.local.services import FEATURE_RETRIEVAL, MODEL_WORKER, ROUTER, SERVICES, Ties, settings
from plait.local.state import StateFolder
from plait.local.supervisor import Report, supervise
from plait.registry.store import Store

DATABASE: Final = "plait"
POSTGRES: Final = "postgres"
REDIS: Final = "redis"
REGISTRY: Final = "registry"


class Startable(Protocol):
    """A part that can be started again at the same address."""

    @property
    def child(self) -> Child:
        """The process of the last start."""

    async def start(self) -> Child:
        """Start it and return once it answers."""


def _say_nothing(_name: str, _what: str) -> None:
    pass


class Mesh:
    """Everything that `plait up` runs, for the length of an `async with`; `endpoints` says where, also in <state>/endpoints.json.

    What ends unasked is started again at the same address; `watch` raises once that is hopeless. `postgres_dsn` and `redis_url`
    stand for servers of yours instead of embedded ones. `report` hears of each part by name. Enter it on the main thread: on Linux
    the processes die with the thread that started them. Raises FailedPrecondition (STATE_IN_USE, STATE_UNUSABLE,
    LOCAL_NOT_INSTALLED), Unavailable (LOCAL_START_FAILED, REGISTRY_UNAVAILABLE).
    """

    def __init__(
        self,
        state: Path,
        *,
        postgres_dsn: str | None = None,
        redis_url: str | None = None,
        report: Report = _say_nothing,
        start_timeout_s: float = 60.0,
    ) -> None:
        self._state = StateFolder(state.absolute())
        self._postgres_dsn = postgres_dsn
        self._redis_url = redis_url
        self._report = report
        self._start_timeout_s = start_timeout_s
        self._services: dict[str, ServiceProcess] = {}
        self._children: dict[str, Callable[[], Child]] = {}
        self._supervisors: list[asyncio.Task[NoReturn]] = []
        self._stack = AsyncExitStack()
        self._ties: Ties
        self._keys: Keys

    def __repr__(self) -> str:
        return f"<Mesh {self._state.path} {[child() for child in self._children.values()]}>"

    @property
    def endpoints(self) -> Endpoints:
        """Where everything is now; process ids change when something had to be started again."""
        return Endpoints(
            router=self._services[ROUTER].address,
            feature_retrieval=self._services[FEATURE_RETRIEVAL].address,
            model_worker=self._services[MODEL_WORKER].address,
            postgres_dsn=self._ties.postgres_dsn,
            redis_url=self._ties.redis_url,
            api_key=self._keys.api_key,
            service_token=self._keys.service_token,
            metrics={name: process.metrics_address for name, process in self._services.items()},
            pids={name: child().pid for name, child in self._children.items()},
            state=str(self._state.path),
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def watch(self) -> NoReturn:
        """Run until something ends too often to be started again, then raise why. Cancel it to go on without watching."""
        done, _ = await asyncio.wait(self._supervisors, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise RuntimeError("a supervisor ended, which it never should")

    async def _open(self, stack: AsyncExitStack) -> None:
        """Start everything in order; each start stands beside its end, and the stack ends them in reverse."""
        stack.enter_context(self._state.locked())
        self._state.endpoints.unlink(missing_ok=True)
        for name, service in SERVICES.items():
            self._services[name] = ServiceProcess(service, self._state, start_timeout_s=self._start_timeout_s)
            stack.callback(self._services[name].close)
        dsn = self._postgres_dsn or await self._start_postgres(stack)
        self._keys = await self._prepare_registry(dsn)
        url = self._redis_url or await self._start_redis(stack)
        self._ties = Ties(
            postgres_dsn=dsn,
            redis_url=url,
            service_token=self._keys.service_token,
            privacy_key=self._keys.privacy_key,
            feature_retrieval=self._services[FEATURE_RETRIEVAL].address,
            model_worker=self._services[MODEL_WORKER].address,
            artifact_cache=str(self._state.artifact_cache),
        )
        stack.push_async_callback(self._stop_services)
        await self._start_services()
        for name, process in self._services.items():
            self._supervise(stack, name, process)
        stack.callback(self._state.endpoints.unlink, missing_ok=True)
        self.endpoints.write(self._state.path)

    async def _start_postgres(self, stack: AsyncExitStack) -> str:
        self._report(POSTGRES, "starting")
        server = EmbeddedPostgres(self._state.postgres, log=self._state.log(POSTGRES))
        await stack.enter_async_context(server)
        self._supervise(stack, POSTGRES, server)
        self._report(POSTGRES, "up")
        return server.create_database(DATABASE)

    async def _start_redis(self, stack: AsyncExitStack) -> str:
        self._report(REDIS, "starting")
        server = EmbeddedRedis(self._state.redis, log=self._state.log(REDIS))
        await stack.enter_async_context(server)
        self._supervise(stack, REDIS, server)
        self._report(REDIS, "up")
        return server.url

    async def _prepare_registry(self, dsn: str) -> Keys:
        self._report(REGISTRY, "migrating")
        async with await Store.open(dsn, max_connections=1) as store:
            prepared = await keys.prepare(store, self._state)
        self._report(REGISTRY, "up")
        return prepared

    async def _start_services(self) -> None:
        """Start them at the same time: none needs another to be up, only to know where it will be."""
        try:
            async with asyncio.TaskGroup() as group:
                for process in self._services.values():
                    group.create_task(self._start_service(process), name=f"start {process.name}")
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _start_service(self, process: ServiceProcess) -> None:
        process.configure(settings(SERVICES[process.name], self._ties))
        self._report(process.name, "starting")
        await process.start()
        self._report(process.name, "up")

    async def _stop_services(self) -> None:
        """End the router first: what it holds still needs the others."""
        await self._services[ROUTER].stop()
        await asyncio.gather(*(process.stop() for process in self._services.values()))

    def _supervise(self, stack: AsyncExitStack, name: str, part: Startable) -> None:
        """Watch a part that is up, until the stack is about to end it."""
        self._children[name] = lambda: part.child
        task = asyncio.create_task(supervise(name, part.child, lambda: self._restart(part), self._report), name=f"supervise {name}")
        self._supervisors.append(task)
        stack.push_async_callback(_cancel, task)

    async def _restart(self, part: Startable) -> Child:
        child = await part.start()
        if self._state.endpoints.exists():
            self.endpoints.write(self._state.path)
        return child


async def _cancel(task: asyncio.Task[NoReturn]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
