"""Commands byte by byte, against what the client library itself would send."""

from __future__ import annotations

import fnmatch
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection
from redis.crc import key_slot

from feature_retrieval.row_codec import KeySpace
from plait.redis.commands import literally, pack, pack_gets, slot_of

_IDS = st.text(st.sampled_from("a}{*?[]\\\0ü"), max_size=9) | st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.sampled_from([b"GET", b"EVALSHA"]), st.lists(st.binary(max_size=40) | st.binary(min_size=3, max_size=3), max_size=5))
def test_packed_as_redis_py_packs(command: bytes, arguments: list[bytes]) -> None:
    library: Any = Connection
    assert pack(command, arguments) == b"".join(library().pack_command(command, *arguments))
    assert b"".join(pack_gets(arguments)) == b"".join(pack(b"GET", [key]) for key in arguments)


@given(st.lists(st.sampled_from([0, 9, 99, 1023, 1024, 1025, 70_000]), min_size=1, max_size=3))
def test_arguments_of_every_size(sizes: list[int]) -> None:
    library: Any = Connection
    arguments = [b"x" * size for size in sizes]
    assert pack(b"SET", arguments) == b"".join(library().pack_command(b"SET", *arguments))


@given(st.binary(max_size=60) | st.text(st.sampled_from("{}ab"), max_size=9).map(str.encode))
def test_slots_are_those_of_redis(key: bytes) -> None:
    assert slot_of(key) == key_slot(key)


@given(st.text(st.sampled_from("ab}{"), min_size=1, max_size=63), _IDS, st.integers(-(1 << 63), (1 << 63) - 1))
def test_all_keys_of_an_entity_lie_in_one_slot(tenant: str, entity_id: str | int, bucket: int) -> None:
    spaces = [KeySpace.of(tenant, "item", view, version, epoch) for view, version, epoch in (("a", 1, 0), ("b}", 2, 125), ("c{", 125, 9))]
    keys = [space.keys([entity_id])[0] for space in spaces]
    marks = [space.mark_keys([entity_id])[0] for space in spaces]
    applied = [space.applied_key(entity_id, bucket) for space in spaces]
    assert len({slot_of(key) for key in (*keys, *marks, *applied)}) == 1


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_a_literal_pattern_matches_itself_only(data: bytes, other: bytes) -> None:
    pattern = literally(data)
    assert bytes(byte for at, byte in enumerate(pattern) if not (byte == 92 and _escapes(pattern, at))) == data
    if other != data:
        assert literally(other) != pattern
    plain = bytes(byte for byte in data if byte not in b"\\*?[]")
    assert fnmatch.fnmatchcase(plain.decode("latin-1"), literally(plain).decode("latin-1"))


def _escapes(pattern: bytes, at: int) -> bool:
    """Return whether the backslash at a place escapes what follows: an even number of them stands before it."""
    before = at
    while before and pattern[before - 1] == 92:
        before -= 1
    return (at - before) % 2 == 0
