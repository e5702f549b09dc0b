"""Commands as bytes: packing an MGET of 500 keys argument by argument takes longer than Redis takes to answer it.

Here is also which slot of a Redis Cluster a key belongs to (Redis Cluster specification, "Hash tags").
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence
from typing import Final

SLOTS: Final = 16384
_GLOB: Final = frozenset(b"\\*?[]")
_BEFORE: Final = tuple(b"\r\n$%d\r\n" % size for size in range(1024))  # what stands before an argument of that many bytes


def pack(command: bytes, arguments: Sequence[bytes] = ()) -> bytes:
    """Return one command in the form Redis reads (RESP)."""
    head = b"*%d\r\n$%d\r\n%b" % (len(arguments) + 1, len(command), command)
    try:
        before = [_BEFORE[len(a)] for a in arguments]
    except IndexError:  # a long one
        before = [b"\r\n$%d\r\n" % len(a) for a in arguments]
    pieces: list[bytes] = [b"\r\n"] * (2 * len(arguments) + 1)
    pieces[0:-1:2] = before
    pieces[1::2] = arguments
    return head + b"".join(pieces)


def pack_gets(keys: Sequence[bytes]) -> list[bytes]:
    """Return one GET per key."""
    return [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]


def slot_of(key: bytes) -> int:
    """Return the slot of a key: the CRC16 of what stands between its first brace and the next closing one, else of all of it."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


def literally(data: bytes) -> bytes:
    """Return a glob pattern that matches exactly these bytes; the length bytes in our keys may be `*` or `?`."""
    return b"".join([b"\\%c" % byte if byte in _GLOB else b"%c" % byte for byte in data])
