"""Protobuf's wire format by hand, where parsing would cost more than the call: an inference passes the router with its tensors unread.

Only the outermost fields are looked at, what is inside others is skipped by its length (https://protobuf.dev/programming-guides/encoding/).
Whoever is behind parses the whole and answers for what is wrong further in.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from plait.api.inference.v2 import inference_pb2
from plait.errors import InvalidArgument
from plait.rpc.frames import field, skip, varint

_MODEL, _VERSION, _ID, _PARAMETERS = 0x0A, 0x12, 0x1A, 0x22  # the tags of fields 1 to 4, length-delimited


class Head(NamedTuple):
    """What a ModelInferRequest says of itself before its tensors."""

    model: str
    version: str
    id: str


def head(data: bytes) -> Head:
    """Return the names in a serialized ModelInferRequest; of a field given twice the last counts. InvalidArgument: no such message."""
    model = version = id_ = b""
    at, size = 0, len(data)
    try:
        while at < size:
            tag = data[at]
            if tag & 0x87 != 2 or tag == 2:  # not length-delimited, or a number of 16 and more, or none
                at = skip(data, at)
                continue
            length = data[at + 1]
            at += 2
            if length >= 0x80:
                length, at = varint(data, at - 1)
            end = at + length
            if tag == _MODEL:
                model = data[at:end]
            elif tag == _VERSION:
                version = data[at:end]
            elif tag == _ID:
                id_ = data[at:end]
            at = end
        if at == size:
            return Head(model.decode(), version.decode(), id_.decode())
    except (IndexError, ValueError):  # (what is no UTF-8 is a ValueError)
        pass
    raise InvalidArgument("the request cannot be parsed: is it the message this method takes?", reason="MALFORMED_MESSAGE")


def without_tensors(answer: bytes) -> inference_pb2.ModelInferResponse | None:
    """Return what a serialized ModelInferResponse says before its tensors: names and parameters; None of what is no such message.

    Servers write fields in the order of their numbers, as protobuf's libraries do; of one that does not, less is seen.
    """
    at, size = 0, len(answer)
    try:
        while at < size and answer[at] <= _PARAMETERS:
            at = skip(answer, at)
        return inference_pb2.ModelInferResponse.FromString(answer[:at])
    except (IndexError, ValueError, DecodeError):
        return None


def renaming(model: str, version: str) -> bytes:
    """Return what gives a serialized ModelInferRequest another name when it is appended: the last one counts, and nothing before it is touched."""
    return field(1, model.encode()) + field(2, version.encode())
