"""The patterns that docs/redis.md gives for a tenant let its tools read its rows, and nobody else's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from feature_retrieval.row_codec import KeySpace

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
