"""The files of the skew log, read back: ServedRow messages, each behind its length as a varint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from plait.api.feature_retrieval.v1 import served_row_pb2
from plait.errors import InvalidArgument


def paths_of(log: Path) -> list[Path]:
    """Return the files of a folder (or the one file), oldest first. Raises InvalidArgument (SKEW_LOG_UNREADABLE) where there is none."""
    found = [log] if log.is_file() else sorted(log.glob("served-*.rows"))
    if not found:
        raise InvalidArgument(f"there is no served-*.rows in {log}: is the service's skew_log.share above 0?", reason="SKEW_LOG_UNREADABLE")
    return found


def read(path: Path) -> Iterator[Any]:
    """Yield the rows of a file; a row that is still being written at its end is left out.

    Raises InvalidArgument (SKEW_LOG_UNREADABLE) for a file that holds something else.
    """
    data = path.read_bytes()
    at = 0
    while at < len(data):
        size, begin = _varint(data, at)
        if begin + size > len(data):
            return
        try:
            yield served_row_pb2.ServedRow.FromString(data[begin : begin + size])
        except DecodeError as error:
            raise InvalidArgument(
                f"{path} holds something else than served rows, from byte {at} on", reason="SKEW_LOG_UNREADABLE"
            ) from error
        at = begin + size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends; one that is cut off is larger than what is left."""
    number = shift = 0
    for place in range(at, min(at + 10, len(data))):
        number |= (data[place] & 0x7F) << shift
        shift += 7
        if data[place] < 0x80:
            return number, place + 1
    return len(data) + 1, len(data)
