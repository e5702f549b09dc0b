"""Packed repeated protobuf fields ↔ numpy, a whole field at a time.

Reading `fp32_contents` element by element makes a Python object per cell, which costs more than most models. The packed wire form of
floats, doubles and booleans is already the array; integers are varints, and those decode with a few vector operations
(https://protobuf.dev/programming-guides/encoding/#varints).
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype of numpy
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MORE: Final = 0x80
_LOW7: Final = np.uint64(0x7F)
_MAX_VARINT_BYTES: Final = 10


def only(message: bytes, number: int) -> memoryview | None:
    """Return the packed bytes of field `number` (below 16) of a serialized message that holds nothing else, or None where it does."""
    if not message or message[0] != number << 3 | 2:
        return None
    length = shift = 0
    at = 1  # after the tag
    while True:
        byte = message[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < _MORE:
            return memoryview(message)[at:] if at + length == len(message) else None


def field(number: int, content: bytes) -> bytes:
    """Return a serialized message that holds nothing but `content` as the packed field `number` (below 16)."""
    head = bytearray([number << 3 | 2])
    length = len(content)
    while length >= _MORE:
        head.append(length & 0x7F | _MORE)
        length >>= 7
    head.append(length)
    return bytes(head) + content


def decode_varints(content: memoryview) -> npt.NDArray[np.uint64]:
    """Return the values of consecutive varints as uint64 [n]; negative ones appear as their two's complement."""
    octets = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(octets < _MORE)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    lengths = ends - starts + 1
    values = np.zeros(len(ends), np.uint64)
    for k in range(int(lengths.max(initial=0))):
        longer = lengths > k
        values[longer] |= (octets[starts[longer] + k].astype(np.uint64) & _LOW7) << np.uint64(7 * k)
    return values


def encode_varints(values: Array) -> bytes:
    """Return integers [n] as consecutive varints; negative ones take ten bytes, as protobuf's int32 and int64 do."""
    left = values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values.astype(np.uint64)
    octets = np.zeros((len(left), _MAX_VARINT_BYTES), np.uint8)
    used = np.ones((len(left), _MAX_VARINT_BYTES), np.bool_)
    for k in range(_MAX_VARINT_BYTES):
        if k:
            used[:, k] = left > 0
        octets[:, k] = left & _LOW7
        left = left >> np.uint64(7)
        octets[:, k] |= np.where(left > 0, np.uint8(_MORE), np.uint8(0))
    return octets[used].tobytes()
