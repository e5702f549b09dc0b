"""HPACK as far as the load generator speaks it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait_bench import hpack


@given(value=st.integers(0, 1 << 40), prefix=st.integers(1, 8), tail=st.binary(max_size=3))
def test_integers_come_back(value: int, prefix: int, tail: bytes) -> None:
    coded = hpack.integer(value, prefix)
    assert hpack.read_integer(coded + tail, 0, prefix) == (value, len(coded))


def test_integers_are_those_of_the_rfc() -> None:
    assert hpack.integer(10, 5) == b"\x0a"  # RFC 7541, C.1.1 to C.1.3
    assert hpack.integer(1337, 5) == b"\x1f\x9a\x0a"
    assert hpack.integer(42, 8) == b"\x2a"


def test_huffman_is_that_of_the_rfc() -> None:
    assert hpack.huffman("307") == bytes.fromhex("640eff")  # C.6.2
    assert hpack.huffman("0") == b"\x07"


NAMES = st.text("abcdefghij-", min_size=1, max_size=12).filter(lambda name: name != "grpc-status")
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=4)


@given(before=FIELDS, status=st.integers(0, 16), after=FIELDS, coded=st.booleans(), indexed=st.booleans(), resized=st.booleans())
def test_the_status_is_found_among_other_fields(
    before: list[tuple[str, str]], status: int, after: list[tuple[str, str]], coded: bool, indexed: bool, resized: bool
) -> None:
    if coded:
        name, value = hpack.huffman("grpc-status"), hpack.huffman(str(status))
        middle = b"\x40" + hpack.integer(len(name), 7, 0x80) + name + hpack.integer(len(value), 7, 0x80) + value
    else:
        middle = hpack.field("grpc-status", str(status))
    block = (
        b"\x20" * resized
        + b"\x88" * indexed
        + b"".join(hpack.field(*f) for f in before)
        + middle
        + b"".join(hpack.field(*f) for f in after)
    )
    assert hpack.grpc_status(block) == status


@given(fields=FIELDS)
def test_no_status_is_none(fields: list[tuple[str, str]]) -> None:
    assert hpack.grpc_status(b"\x88" + hpack.field(31, "application/grpc") + b"".join(hpack.field(*f) for f in fields)) is None


def test_what_needs_state_or_is_cut_off_is_refused() -> None:
    with pytest.raises(ValueError, match="dynamic table"):
        hpack.grpc_status(hpack.integer(62, 7, 0x80))
    with pytest.raises(ValueError, match="longer than its block"):
        hpack.grpc_status(hpack.field("name", "value")[:-1])
