"""The frames of multiplexed streams as bytes: cut and joined without parsing what they carry.

A message of a stream costs gRPC as much as a call does, whatever is in it; so what gathers in one turn of the event loop goes as one message
(`more`). Both sides say in their metadata that they take such messages, so that old and new processes mix during an upgrade.

Only the outermost fields are looked at, what is inside others is skipped by its length (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from plait.api.types.v1 import types_pb2

JOINED: Final = ("x-plait-frames", "joined")
REQUEST_MORE: Final = 3  # the number of `more` in every Stream…Request

MOST: Final = 64  # frames in one message
MOST_BYTES: Final = 256 << 10  # in one message of several frames
_FRAME_BYTES: Final = 64 << 10  # a larger frame goes alone: copying it would cost more than a message does

_VARINT, _FIXED64, _BYTES, _GROUP, _END, _FIXED32 = range(6)
_DEEPEST: Final = 100  # groups in groups, as protobuf's own parsers have it
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Parts(NamedTuple):
    """A Stream…Response cut in its fields; None = not there."""

    call_id: int
    response: bytes | None
    status: bytes | None
    load: bytes | None


class Numbers(NamedTuple):
    """Where a Stream…Response has what is not at the same place in all of them; 0 = it has no such field."""

    load: int
    more: int

    @classmethod
    def of(cls, response_type: Any) -> Numbers:
        """Read them off a message class."""
        fields = response_type.DESCRIPTOR.fields_by_name
        return cls(*(fields[name].number if name in fields else 0 for name in cls._fields))


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place and the place behind it. ValueError, IndexError: there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, at
    raise ValueError("a number is longer than ten bytes")


def field(number: int, value: bytes) -> bytes:
    """Return a length-delimited field; `number` is below 16."""
    return _prefix(number, len(value)) + value


def skip(data: bytes, at: int) -> int:
    """Return the place behind the field whose tag is at a place, whatever it is. ValueError, IndexError: there is no whole one."""
    groups = list[int]()
    while True:
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number or tag >> 32:
            raise ValueError("no field has this number")
        if wire == _BYTES:
            length, at = varint(data, at)
            at += length
        elif wire == _VARINT:
            at = varint(data, at)[1]
        elif wire == _FIXED64:
            at += 8
        elif wire == _FIXED32:
            at += 4
        elif wire == _GROUP and len(groups) < _DEEPEST:
            groups.append(number)
        elif wire != _END or not groups or groups.pop() != number:
            raise ValueError("a group ends that has not begun")
        if at > len(data):
            raise ValueError("a field is cut off")
        if not groups:
            return at


def request_frame(header: types_pb2.CallHeader, request: bytes) -> bytes:
    """Return a serialized Stream…Request of a header and a request that is serialized already."""
    head = header.SerializeToString()
    return b"".join((_prefix(1, len(head)), head, _prefix(2, len(request)), request))


def parts(answer: bytes, numbers: Numbers) -> Parts:
    """Cut a serialized Stream…Response; of a field given twice the last counts. ValueError: no such message."""
    call_id, found = 0, [None, None, None]
    load_tag = numbers.load << 3 | _BYTES
    at, size = 0, len(answer)
    try:
        while at < size:
            tag = answer[at]
            if tag == 0x08:
                call_id, at = varint(answer, at + 1)
            elif tag in (0x12, 0x1A, load_tag) and tag != _BYTES:
                length = answer[at + 1]
                at += 2
                if length >= 0x80:
                    length, at = varint(answer, at - 1)
                end = at + length
                if end > size:
                    break
                found[2 if tag == load_tag else (tag >> 3) - 2] = answer[at:end]  # type: ignore[call-overload]
                at = end
            else:
                at = skip(answer, at)
    except IndexError:
        at = -1
    if at != size:
        raise ValueError("an answer is cut off")
    return Parts(call_id, *found)


def cut(message: bytes, more: int) -> Sequence[bytes]:
    """Return the frames of a message: itself, or those it holds in its field number `more`. ValueError: no such message."""
    tag, at, size = more << 3 | _BYTES, 0, len(message)
    if not size or message[0] != tag:
        return (message,)
    found = []
    try:
        while at < size:
            if message[at] != tag:
                at = skip(message, at)
                continue
            length, at = varint(message, at + 1)
            found.append(message[at : at + length])
            at += length
    except IndexError:
        at = -1
    if at != size:
        raise ValueError("a message is cut off")
    return found


def header(frame: bytes) -> bytes:
    """Return the CallHeader of a serialized Stream…Request, empty where it has none. ValueError: no such message."""
    at, found = 0, b""
    try:
        while at < len(frame):
            end = skip(frame, at)
            if frame[at] == 1 << 3 | _BYTES:
                length, start = varint(frame, at + 1)
                found = frame[start : start + length]
            at = end
    except IndexError:
        raise ValueError("a frame is cut off") from None
    return found


def join(waiting: deque[bytes], more: int) -> bytes:
    """Take frames off the left of a queue that is not empty, and return them as one message: as many as the bounds allow, at least one."""
    first = waiting.popleft()
    if not waiting or len(first) > _FRAME_BYTES or len(waiting[0]) > _FRAME_BYTES:
        return first
    pieces, size = [_prefix(more, len(first)), first], len(first)
    for _ in range(MOST - 1):
        if not waiting or len(waiting[0]) > _FRAME_BYTES or size + len(waiting[0]) > MOST_BYTES:
            break
        frame = waiting.popleft()
        size += len(frame)
        pieces += (_prefix(more, len(frame)), frame)
    return b"".join(pieces)


def _prefix(number: int, length: int) -> bytes:
    """Return what stands before the bytes of a length-delimited field."""
    if length < 0x80:
        return bytes((number << 3 | _BYTES, length))
    out = bytearray((number << 3 | _BYTES,))
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)
