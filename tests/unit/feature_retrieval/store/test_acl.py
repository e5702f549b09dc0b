"""The patterns that docs/redis.md gives for a tenant let its tools read its rows, and nobody else's."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis

from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.redis import APPLIED, RedisStore, Swap
from feature_retrieval.store.tracking import Listener
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.local.redis import EmbeddedRedis
from plait.redis.dispatch import Receipt

_DOCS = Path(__file__).parents[4] / "docs" / "redis.md"
_TENANTS = ["a", "shop", "*" * 3, "b" * 42, "b" * 43, "c" * 62, "c" * 63, "d-1", "[x]", "sh"]


@pytest.fixture(scope="module")
def patterns() -> Callable[[str], list[bytes]]:
    code = re.search(r"```python\n(.*?)```", _DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    names: dict[str, Callable[[str], list[bytes]]] = {}
    exec(code[1], names)  # noqa: S102  (our own document)
    return names["patterns"]


@pytest.fixture
def admin(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client
        client.acl_deluser("tenant")


def keys_of(tenant: str) -> list[bytes]:
    space = KeySpace.of(tenant, "item", "stats", 1, 2)
    ids = ["x", "}", "*"]
    name = bytes([len(tenant)]) + tenant.encode()
    return [*space.keys(ids), *space.mark_keys(ids), space.applied_key("x", 3), b"e1{" + name + b"}", b"d1{" + name + b"}"]


@pytest.mark.parametrize("tenant", _TENANTS)
def test_a_tenant_sees_its_own_keys_only(patterns: Callable[[str], list[bytes]], admin: redis.Redis, redis_url: str, tenant: str) -> None:
    rules = [b"~" + pattern for pattern in patterns(tenant)]
    admin.execute_command("ACL", "SETUSER", "tenant", "reset", "on", ">secret", *rules, "+get", "+type", "+auth")  # type: ignore[no-untyped-call]
    host = redis_url.rpartition("@")[2]
    with redis.Redis.from_url(f"redis://tenant:secret@{host}", driver_info=None) as client:
        for key in keys_of(tenant):
            assert client.get(key) is None
        for other in _TENANTS:
            if other != tenant:
                for key in keys_of(other):
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        client.get(key)


def test_names_without_an_exact_pattern_are_refused(patterns: Callable[[str], list[bytes]]) -> None:
    with pytest.raises(ValueError, match="shorter or longer"):
        patterns("n" * 9)


async def test_a_service_needs_no_more_rights_than_the_documented(tmp_path: Path) -> None:
    found = re.search(r"A service needs `([^`]*)`", _DOCS.read_text(encoding="utf-8"))
    assert found
    row = struct.pack("<HHIqqQ", 1, 1, 0, 1, 0, 0)
    async with EmbeddedRedis(tmp_path / "r") as server:
        with redis.Redis.from_url(server.url) as client:
            rules = ["on", ">pw", "~*", "-@all", *found[1].split()]
            client.execute_command("ACL", "SETUSER", "service", *rules)
        store, receipt, told = RedisStore(f"redis://service:pw@{server.address}", ack="synced"), Receipt(), Told()
        watching = asyncio.create_task(store.watch(lambda: [b"a"], told))
        try:
            await asyncio.wait_for(told.on.wait(), 20)
            assert await store.write([b"a"], [b"m"], [row], 0, receipt) == bytes([APPLIED])
            assert await store.settle(receipt) == pb.DURABILITY_SYNCED
            swapped = await store.swap([Swap(key=b"a", mark_key=b"m", old=row, mark=None, new=row + b"1", applied={b"s": [1]})])
            assert (swapped, await store.applied([b"s"], [[1]])) == ([True], [[True]])
            assert await store.erase([b"m"], [[b"a"]], [5]) == [1]
            await store.note(b"m1", b"1")
            await store.streams.append([b"e"], [{b"e": b""}])
            assert await store.streams.read_group([b"e"], b"g", b"c", count=1, timeout_s=1)
            assert [key async for page in store.scan(b"s") for key in page.keys] == [b"s"]
            assert await store.remove([b"s"]) == 1
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await store.close()


class Told(Listener):
    """Says when it is connected."""

    def __init__(self) -> None:
        self.on = asyncio.Event()

    def connected(self, prefixes: Sequence[bytes]) -> None:
        self.on.set()
