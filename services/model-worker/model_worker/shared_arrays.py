"""Arrays between two processes: their bytes lie in shared memory, and only a small table of types, shapes and places is sent.

The table is a fixed binary layout, so nothing that the other side writes is ever unpickled, and every entry is checked against the memory
it points into. The memory has no name in any file system, so nothing is left behind however either side ends, and where the platform can
seal it (memfd, Linux) neither side can shrink it under the other's feet.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from model_worker.packed import Array
from plait.dtypes import BY_NAME, BY_NUMBER

_ALIGN: Final = 64
_MAX_DIMS: Final = 32
_MAX_BODY_BYTES: Final = 1024 * 1024
_FRAME: Final = struct.Struct("<II")  # kind, bytes of the body
_TABLE: Final = struct.Struct("<QI")  # size of the memory, count of arrays
_ENTRY: Final = struct.Struct("<BBQQ")  # number of the type, dimensions, offset, bytes; the dimensions follow
_LENGTH: Final = struct.Struct("<I")  # before each element of a BYTES array
_BYTES: Final = BY_NAME["bytes"].number
_NUMBER: Final = {np.dtype(d.numpy): d.number for d in BY_NUMBER.values()}
_DTYPE: Final = {d.number: np.dtype(d.numpy) for d in BY_NUMBER.values()}


class Disconnected(Exception):
    """The other side is gone."""


class Arena:
    """Memory shared by whoever holds the file descriptor; it grows and never shrinks. One side writes, the other reads."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._size = 0
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Arena:
        """Make new memory, of no size yet."""
        if not hasattr(os, "memfd_create"):
            with tempfile.TemporaryFile() as file:  # 0600, and without a name from here on
                return cls(os.dup(file.fileno()))
        fd = os.memfd_create("plait-arrays", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return cls(fd)

    def write(self, arrays: Sequence[Array]) -> bytes:
        """Copy the arrays in, one after the other from the start, and return the table that `read` takes.

        Raises TypeError for a type that has no number.
        """
        entries: list[bytes] = []
        contents: list[tuple[int, Array, tuple[int, ...]]] = []
        end = 0
        for array in arrays:
            number = _NUMBER.get(array.dtype)
            if number is None:
                raise TypeError(f"{array.dtype} is no type of a tensor")
            content = _joined(array) if number == _BYTES else array
            entries.append(_ENTRY.pack(number, array.ndim, end, content.nbytes) + struct.pack(f"<{array.ndim}q", *array.shape))
            contents.append((end, content, content.shape))
            end += -(-content.nbytes // _ALIGN) * _ALIGN
        memory = self._mapped(end, grow=True)
        for offset, content, shape in contents:
            if content.size:
                np.copyto(np.ndarray(shape, content.dtype, memory, offset), content)
        return _TABLE.pack(self._size, len(entries)) + b"".join(entries)

    def read(self, table: bytes) -> list[Array]:
        """Return the arrays a table describes, as views of the memory (BYTES arrays are made anew). Raises ValueError where it lies."""
        try:
            size, count = _TABLE.unpack_from(table)
            memory = self._mapped(size, grow=False)
            at = _TABLE.size
            arrays: list[Array] = []
            for _ in range(count):
                number, ndim, offset, nbytes = _ENTRY.unpack_from(table, at)
                if ndim > _MAX_DIMS:
                    raise ValueError("too many dimensions")
                shape = struct.unpack_from(f"<{ndim}q", table, at + _ENTRY.size)
                at += _ENTRY.size + 8 * ndim
                arrays.append(_array(memory, _DTYPE[number], shape, offset, nbytes))
        except (struct.error, KeyError, OverflowError) as error:
            raise ValueError("this is no table of arrays") from error
        return arrays

    def close(self) -> None:
        """Give the descriptor back; arrays that were read keep the memory until they are gone."""
        self._map = None
        os.close(self.fd)

    def _mapped(self, size: int, *, grow: bool) -> mmap.mmap | bytearray:
        if self._map is None or size > self._size:
            if size == 0:
                return bytearray()
            if grow:
                size = max(mmap.PAGESIZE, 1 << (size - 1).bit_length())  # doubled, so that growth is rare
                os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)  # ValueError where the file is not that large; views keep the former one alive
            self._size = size
        return self._map


def send(channel: socket.socket, kind: int, body: bytes = b"") -> None:
    """Send one frame. Raises Disconnected, TimeoutError (the socket's)."""
    try:
        channel.sendall(_FRAME.pack(kind, len(body)) + body)
    except TimeoutError:
        raise
    except OSError as error:
        raise Disconnected from error


def receive(channel: socket.socket) -> tuple[int, bytes]:
    """Return one frame's kind and body. Raises Disconnected, TimeoutError (the socket's), ValueError for a body that is too long."""
    try:
        content = channel.recv(65536)  # nearly always all of it: the two sides take turns
        while len(content) < _FRAME.size:
            content += _more(channel, content)
        kind, length = _FRAME.unpack_from(content)
        if length > _MAX_BODY_BYTES:
            raise ValueError("the frame is too long")
        while len(content) < _FRAME.size + length:
            content += _more(channel, content)
    except TimeoutError:
        raise
    except OSError as error:
        raise Disconnected from error
    return kind, content[_FRAME.size : _FRAME.size + length]


def _more(channel: socket.socket, so_far: bytes) -> bytes:
    if not so_far or not (more := channel.recv(65536)):
        raise Disconnected
    return more


def _array(memory: Any, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int, nbytes: int) -> Array:
    if any(n < 0 for n in shape) or offset % _ALIGN or (nbytes and offset + nbytes > len(memory)):
        raise ValueError("an array lies outside of the memory")
    if dtype.hasobject:
        return _split(memoryview(memory)[offset : offset + nbytes], shape)
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError("an array's shape does not fit its bytes")
    return np.ndarray(shape, dtype, memory, offset) if nbytes else np.empty(shape, dtype)


def _joined(array: Array) -> Array:
    parts: list[bytes] = []
    for element in array.ravel().tolist():
        if not isinstance(element, bytes):
            raise TypeError("an element of a BYTES tensor is not bytes")
        parts += (_LENGTH.pack(len(element)), element)
    return np.frombuffer(b"".join(parts), np.uint8)


def _split(content: memoryview, shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    if count * _LENGTH.size > len(content):
        raise ValueError("a BYTES array is cut off")
    flat = np.empty(count, np.object_)
    at = 0
    for i in range(count):
        if at + _LENGTH.size > len(content):
            raise ValueError("a BYTES array is cut off")
        (length,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size
        if at + length > len(content):
            raise ValueError("a BYTES array is cut off")
        flat[i] = bytes(content[at : at + length])
        at += length
    return flat.reshape(shape)
