"""Protobuf's wire format by hand, where parsing would cost more than the call: an inference passes the router with its tensors unread.

Only the outermost fields are looked at, what is inside others is skipped by its length (https://protobuf.dev/programming-guides/encoding/).
Whoever is behind parses the whole and answers for what is wrong further in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from plait.errors import InvalidArgument

if TYPE_CHECKING:
    from plait.api.types.v1 import types_pb2

_VARINT, _FIXED64, _BYTES, _GROUP, _END, _FIXED32 = range(6)
_DEEPEST: Final = 100


class Head(NamedTuple):
    """What a ModelInferRequest says of itself before its tensors."""

    model: str
    version: str
    id: str


class Parts(NamedTuple):
    """A StreamInferResponse cut in its fields; None = not there."""

    call_id: int
    response: bytes | None
    status: bytes | None
    load: bytes | None


def head(data: bytes) -> Head:
    """Return the names in a serialized ModelInferRequest; of a field given twice the last counts. InvalidArgument: no such message."""
    found = [b"", b"", b""]
    for number, wire, start, end in _fields(data):
        if wire == _BYTES and number <= len(found):
            found[number - 1] = data[start:end]
    try:
        return Head(*(value.decode() for value in found))
    except UnicodeDecodeError:
        raise _malformed() from None


def renamed(data: bytes, model: str, version: str) -> bytes:
    """Return the ModelInferRequest under another name: appended, as the last one counts, so that nothing before it is touched."""
    return b"".join((data, _field(1, model.encode()), _field(2, version.encode())))


def frame(header: types_pb2.CallHeader, request: bytes) -> bytes:
    """Return a serialized StreamInferRequest of a header and a request that is serialized already."""
    return _field(1, header.SerializeToString()) + _field(2, request)


def parts(answer: bytes) -> Parts:
    """Cut a serialized StreamInferResponse; each field counts as its sender wrote it last. InvalidArgument: no such message."""
    call_id, found = 0, dict[int, bytes]()
    for number, wire, start, end in _fields(answer):
        if number == 1 and wire == _VARINT:
            call_id = _varint(answer, start)[0]
        elif wire == _BYTES:
            found[number] = answer[start:end]
    return Parts(call_id, found.get(2), found.get(3), found.get(4))


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, and where the value starts and ends, of each outermost field."""
    at, size, open_groups = 0, len(data), list[int]()
    while at < size:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number or tag >> 32:
            raise _malformed()
        start = at
        if wire == _BYTES:
            length, start = _varint(data, at)
            at = start + length
        elif wire == _VARINT:
            at = _varint(data, at)[1]
        elif wire == _FIXED64:
            at += 8
        elif wire == _FIXED32:
            at += 4
        elif wire == _GROUP and len(open_groups) < _DEEPEST:
            open_groups.append(number)
        elif wire != _END or not open_groups or open_groups.pop() != number:
            raise _malformed()
        if at > size:
            raise _malformed()
        if not open_groups:
            yield number, wire, start, at
    if open_groups:
        raise _malformed()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _malformed()
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise _malformed()


def _field(number: int, value: bytes) -> bytes:
    """Return a length-delimited field."""
    length, out = len(value), bytearray((number << 3 | _BYTES,))
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out) + value


def _malformed() -> InvalidArgument:
    return InvalidArgument("the request cannot be parsed: is it the message this method takes?", reason="MALFORMED_MESSAGE")
