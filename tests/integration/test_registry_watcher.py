"""The watcher against a real PostgreSQL that changes, breaks, is killed, comes back, or never was there."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from tests.fakes.registry_world import HOME, SHOP, eventually, manifests
from tests.fakes.tcp_proxy import TcpProxy

from plait.errors import Unavailable
from plait.local.postgres import EmbeddedPostgres
from plait.registry import watcher as watching
from plait.registry.records import Snapshot, Tenant
from plait.registry.store import Store
from plait.registry.watcher import Watcher

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(watching, "MAX_BACKOFF_S", 0.1)


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    return postgres_dsn


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(dsn) as opened:
        await opened.migrate()
        yield opened


@pytest.fixture
async def proxy(dsn: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(address(dsn)) as opened:
        yield opened


def address(dsn: str) -> tuple[str, int]:
    parts = urlsplit(dsn)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def through(proxy: TcpProxy, dsn: str) -> str:
    """Return the DSN with the proxy's address in it."""
    parts = urlsplit(dsn)
    user = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}"))


async def test_a_commit_is_visible_within_100_ms_without_polling(store: Store, dsn: str) -> None:
    async with Watcher(dsn, poll_s=3600) as watcher:
        await watcher.first(10)
        took_ms = []
        for n in range(20):
            seen = asyncio.Event()
            stop = watcher.subscribe(lambda s, name=f"t{n}", seen=seen: seen.set() if name in s.tenants else None)  # type: ignore[misc]
            await store.apply(manifests(Tenant(name=f"t{n}")), actor="anna")
            committed = time.perf_counter()
            await asyncio.wait_for(seen.wait(), 10)
            took_ms.append((time.perf_counter() - committed) * 1e3)
            stop()
        took_ms.sort()
        print(f"commit → visible: p50 {took_ms[10]:.2f} ms, max {took_ms[-1]:.2f} ms")  # noqa: T201
        assert watcher.snapshot.revision == 21


async def test_subscribers_get_whole_snapshots_and_a_failing_one_harms_nobody(store: Store, dsn: str) -> None:
    seen: list[Snapshot] = []

    def broken(_: Snapshot) -> None:
        raise RuntimeError("boom")

    async with Watcher(dsn, poll_s=3600) as watcher:
        watcher.subscribe(broken)
        watcher.subscribe(seen.append)
        await watcher.first(10)
        await store.apply(manifests(), actor="anna")
        await eventually(lambda: watcher.snapshot.revision == 2)
        late: list[Snapshot] = []
        watcher.subscribe(late.append)
        assert late == [watcher.snapshot]
        assert [s.revision for s in seen] == [1, 2]
        assert seen[-1] is watcher.snapshot
        assert seen[-1].routes == {"home": HOME}
        assert repr(watcher).startswith("<Watcher connected source=postgres revision=2 ")


async def test_a_burst_of_changes_is_coalesced_and_ends_at_the_last(store: Store, dsn: str) -> None:
    seen: list[int] = []
    async with Watcher(dsn, poll_s=3600) as watcher:
        await watcher.first(10)
        watcher.subscribe(lambda snapshot: seen.append(snapshot.revision))
        await asyncio.gather(*(store.apply(manifests(Tenant(name=f"t{n}")), actor="anna") for n in range(30)))
        await eventually(lambda: watcher.snapshot.revision == 31)
    assert seen == sorted(set(seen))
    assert len(watcher.snapshot.tenants) == 31


async def test_incremental_reloads_end_where_a_full_read_does(store: Store, dsn: str) -> None:
    async with Watcher(dsn, poll_s=3600) as watcher:
        await watcher.first(10)
        await store.apply(manifests(), actor="anna")
        await eventually(lambda: watcher.snapshot.revision == 2)
        await store.apply(manifests(dataclasses.replace(HOME, timeout_s=3.0)), actor="anna")
        await eventually(lambda: watcher.snapshot.revision == 3)
        await store.delete("Route", "home", actor="anna")
        await eventually(lambda: watcher.snapshot.revision == 4)
        await store.rollback("Route", "home", actor="anna")
        key, _ = await store.create_key("shop", actor="anna")
        await eventually(lambda: watcher.snapshot.revision == 6)
        assert watcher.snapshot.keys == {key.sha256: key}
        assert watcher.snapshot == await store.snapshot()


async def test_polling_finds_what_no_notification_announced(store: Store, dsn: str) -> None:
    async with Watcher(dsn, poll_s=0.02) as watcher:
        await watcher.first(10)
        connection = await asyncpg.connect(dsn)
        await connection.execute("update plait.revision set value = 7")
        await connection.close()
        await eventually(lambda: watcher.snapshot.revision == 7)


async def test_a_cut_connection_is_made_again_and_nothing_is_missed(store: Store, dsn: str, proxy: TcpProxy) -> None:
    target = proxy.target
    async with Watcher(through(proxy, dsn), poll_s=3600) as watcher:
        await watcher.first(10)
        await proxy.cut()
        await eventually(lambda: not watcher.connected)
        await store.apply(manifests(SHOP), actor="anna")
        assert watcher.snapshot.revision == 1
        assert "disconnected source=postgres revision=1" in repr(watcher)
        proxy.target = target
        await eventually(lambda: watcher.connected)
        assert "shop" in watcher.snapshot.tenants


async def test_a_killed_backend_is_survived(store: Store, dsn: str) -> None:
    async with Watcher(dsn, poll_s=3600) as watcher:
        await watcher.first(10)
        connection = await asyncpg.connect(dsn)
        await connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'plait-watcher'")
        await connection.close()
        await store.apply(manifests(SHOP), actor="anna")
        await eventually(lambda: "shop" in watcher.snapshot.tenants)


@pytest.fixture
def home() -> Iterator[Path]:
    """A data folder that PostgreSQL's account can reach."""
    with tempfile.TemporaryDirectory(prefix="plait-test-") as folder:
        yield Path(folder) / "postgres"


async def test_postgres_killed_and_started_again_elsewhere_is_found_again(home: Path) -> None:
    async with TcpProxy(None) as proxy, AsyncExitStack() as stack:
        async with EmbeddedPostgres(home) as server:
            proxy.target = address(server.dsn)
            dsn = through(proxy, server.dsn)
            async with await Store.open(dsn) as store:
                await store.migrate()
                await store.apply(manifests(), actor="anna")
            watcher = await stack.enter_async_context(Watcher(dsn, poll_s=3600))
            await watcher.first(10)
            os.kill(server.child.pid, signal.SIGKILL)
            await eventually(lambda: not watcher.connected)
        proxy.target = None
        assert watcher.snapshot.routes == {"home": HOME}
        async with EmbeddedPostgres(home) as again:
            proxy.target = address(again.dsn)
            await eventually(lambda: watcher.connected)
            async with await Store.open(dsn) as store:
                await store.apply(manifests(Tenant(name="later")), actor="anna")
            await eventually(lambda: "later" in watcher.snapshot.tenants)
            await stack.aclose()


async def test_a_restart_without_postgres_starts_from_the_file(store: Store, dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "state" / "registry.json"
    await store.apply(manifests(), actor="anna")
    key, _ = await store.create_key("shop", actor="anna")
    async with Watcher(dsn, file) as before:
        await before.first(10)
        await eventually(file.exists)
    assert file.stat().st_mode & 0o777 == 0o600
    async with Watcher(NOWHERE, file) as after:
        snapshot = await after.first(10)
        assert snapshot == before.snapshot
        assert snapshot.keys == {key.sha256: key}
        assert "disconnected source=file revision=3" in repr(after)


async def test_the_file_gives_way_to_postgres_when_it_comes_back(store: Store, dsn: str, proxy: TcpProxy, tmp_path: Path) -> None:
    file, target = tmp_path / "registry.json", proxy.target
    async with Watcher(dsn, file) as before:
        await before.first(10)
        await eventually(file.exists)
    await store.apply(manifests(SHOP), actor="anna")
    await proxy.cut()
    async with Watcher(through(proxy, dsn), file) as watcher:
        assert (await watcher.first(10)).revision == 1
        proxy.target = target
        await eventually(lambda: watcher.source == "postgres")
        assert "shop" in watcher.snapshot.tenants
        await eventually(lambda: b'\\"shop\\"' in file.read_bytes())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "plait-registry-snapshot", "version": 99}', b"\xff\xfe"])
async def test_a_corrupt_file_is_ignored_and_said(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "registry.json"
    file.write_bytes(content)
    async with Watcher(NOWHERE, file) as watcher:
        with pytest.raises(Unavailable, match="no last-known-good file"):
            await watcher.first(0.3)


async def test_a_file_that_cannot_be_written_stops_nothing(store: Store, dsn: str, tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder is wanted")
    async with Watcher(dsn, blocker / "registry.json") as watcher:
        await watcher.first(10)
        await store.apply(manifests(SHOP), actor="anna")
        await eventually(lambda: "shop" in watcher.snapshot.tenants)


async def test_tables_that_are_not_there_yet_are_waited_for(dsn: str) -> None:
    async with Watcher(dsn) as watcher:
        with pytest.raises(Unavailable):
            await watcher.first(0.1)
        async with await Store.open(dsn) as store:
            await store.migrate()
        assert (await watcher.first(10)).revision == 1


async def test_without_a_dsn_it_serves_the_file_and_goes_on_trying(store: Store, dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "registry.json"
    async with Watcher(dsn, file) as before:
        await before.first(10)
        await eventually(file.exists)
    async with Watcher("", file) as watcher:
        assert (await watcher.first(10)).revision == 1
