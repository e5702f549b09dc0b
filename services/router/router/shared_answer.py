"""How an answer lies in Redis, for other routers: a header of fixed size, then its bytes. One of another version is none.

version u8 · made, by the wall clock, us i64 · took us i64 · how much of the invalidations its maker had heard, 16 bytes · answer
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_VERSION: Final = 1
_HEADER: Final = struct.Struct("<Bqq16s")
_PREFIX: Final = b"c1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAnswer:
    """An answer of some router: begun so long ago."""

    data: bytes
    age_s: float
    took_s: float
    heard: int


def key(question: bytes) -> bytes:
    """Return the key in Redis of a question's key."""
    return _PREFIX + question


def write(data: bytes, took_s: float, lives_s: float, heard: int) -> bytes:
    """Return the value of an answer that was begun `took_s` ago and will be kept for `lives_s`."""
    return _HEADER.pack(_VERSION, int(took_s * 1e6), int(lives_s * 1e6), heard.to_bytes(16, "little")) + data


def read(value: bytes, left_s: float) -> SharedAnswer | None:
    """Return what a value holds that Redis keeps for `left_s` more; None where it is none of ours."""
    if len(value) < _HEADER.size or value[0] != _VERSION:
        return None
    _, took_us, lives_us, heard = _HEADER.unpack_from(value)
    return SharedAnswer(
        data=value[_HEADER.size :],
        age_s=max(0.0, (took_us + lives_us) / 1e6 - left_s),
        took_s=max(0.0, took_us / 1e6),
        heard=int.from_bytes(heard, "little"),
    )
