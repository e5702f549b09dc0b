"""The sample request and answer an artifact brings along: what its .npz must hold, checked before any of it is read, and without pickle.

"input.<name>" and "output.<name>" are arrays of the signature's type and shape. Two types need another form, for want of one in numpy:

bfloat16  two bytes an element, as numpy writes ml_dtypes.bfloat16.
bytes     fixed-width strings (numpy's S or U, the latter meaning their UTF-8), which cannot end in zero bytes; or uint8 [size], the form of
          the Open Inference Protocol's raw BYTES: each element its length (4 bytes, little-endian), then itself. "shape.input.<name>",
          int64, is the shape of the latter; without it there is one dimension.

Neither numpy nor torch is needed here, so that publishing needs neither. The .npy format: NEP 1, https://numpy.org/neps/nep-0001-npy-format.html.
"""

from __future__ import annotations

import ast
import io
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec

MAX_BYTES: Final = 256 * 1024 * 1024  # of all arrays, unpacked: a small archive may claim terabytes
SHAPE_PREFIX: Final = "shape."
_MAX_HEADER_BYTES: Final = 10_000  # as numpy's own limit
_MAX_LISTED: Final = 10
_LENGTH: Final = struct.Struct("<I")
_DESCR: Final = re.compile(r"[<>|=]([a-zA-Z])([0-9]{1,9})\Z")
_BROKEN: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, SyntaxError, MemoryError,
    struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """How an array lies in its file: numpy's name of its type, its shape."""

    descr: str
    shape: tuple[int, ...]


def check(content: bytes, manifest: ArtifactManifest) -> None:
    """Check that an .npz holds what the manifest's signature needs, no array being empty.

    Raises FailedPrecondition (SELF_TEST_UNUSABLE) that names each array that is missing or differs.
    """
    problems: list[str] = []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size_bytes = sum(info.file_size for info in archive.infolist())
            if size_bytes > MAX_BYTES:
                raise unusable(f"its arrays take {size_bytes} bytes, at most {MAX_BYTES} are allowed: publish fewer rows")
            for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
                for spec in specs:
                    problems += _check_array(archive, f"{side}.{spec.name}", spec)
    except _BROKEN as error:
        raise unusable(f"it is not an .npz of plain arrays ({type(error).__name__}); numpy.savez writes one") from error
    if problems:
        more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
        raise unusable("; ".join([*problems[:_MAX_LISTED], *more]))


def elements(packed: bytes) -> list[bytes]:
    """Return the elements of BYTES in their raw form. Raises ValueError where that is not what it is."""
    found: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(packed):
        (length,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size + length
        found.append(packed[at - length : at])
    if at != len(packed):
        raise ValueError("each element is a 4-byte length and its bytes, and these end in the middle of one")
    return found


def unusable(why: str) -> FailedPrecondition:
    """Return the error for a self test that a worker could not run."""
    return FailedPrecondition(f"the self test cannot be used: {why}", reason="SELF_TEST_UNUSABLE")


def _check_array(archive: zipfile.ZipFile, key: str, spec: TensorSpec) -> Iterator[str]:
    if f"{key}.npy" not in archive.NameToInfo:
        yield f"it lacks {key!r}"
        return
    header = _header(archive, key)
    if header.descr == "|O":
        yield f"{key} holds Python objects, which only pickle reads: for bytes write numpy's S or U, or uint8 as docs/formats.md says"
        return
    packed = spec.dtype == "bytes" and header.descr == "|u1"
    if not packed and not _is_of_type(header.descr, spec.dtype):
        yield f"{key} is {header.descr} {list(header.shape)}, the signature says {spec.dtype} {list(spec.shape)}"
        return
    try:
        shape = _packed_shape(archive, key, header) if packed else header.shape
    except ValueError as error:
        yield f"{key}: {error}"
        return
    fits = len(shape) == len(spec.shape) and all(want in (-1, size) for size, want in zip(shape, spec.shape, strict=True))
    if not fits or not math.prod(shape):
        yield f"{key} is {spec.dtype} {list(shape)}, the signature says {spec.dtype} {list(spec.shape)}, of 1 element or more"


def _is_of_type(descr: str, dtype: str) -> bool:
    match dtype:
        case "bytes":
            return descr.startswith(("|S", "<U"))
        case "bfloat16":
            return descr in {"<V2", "|V2"}
        case _:
            return descr == BY_NAME[dtype].numpy


def _packed_shape(archive: zipfile.ZipFile, key: str, header: _Header) -> tuple[int, ...]:
    if len(header.shape) != 1:
        raise ValueError(f"packed bytes are uint8 [size], found {list(header.shape)}")
    count = len(elements(_data(archive, key)))
    if f"{SHAPE_PREFIX}{key}.npy" not in archive.NameToInfo:
        return (count,)
    beside = _header(archive, SHAPE_PREFIX + key)
    if beside.descr != "<i8" or len(beside.shape) != 1 or beside.shape[0] > 8:
        raise ValueError(f"{SHAPE_PREFIX}{key} is {beside.descr} {list(beside.shape)}, a shape is int64 [dimensions]")
    shape = struct.unpack(f"<{beside.shape[0]}q", _data(archive, SHAPE_PREFIX + key))
    if min(shape, default=0) < 0 or math.prod(shape) != count:
        raise ValueError(f"holds {count} elements, {SHAPE_PREFIX}{key} says {list(shape)}")
    return shape


def _data(archive: zipfile.ZipFile, key: str) -> bytes:
    """Return an array's bytes, without its header."""
    content = archive.read(f"{key}.npy")
    at, length = _header_place(content)
    return content[at + length :]


def _header(archive: zipfile.ZipFile, key: str) -> _Header:
    """Read an array's header; the array must be as large as that says. Raises ValueError, and what zipfile does."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as opened:
        start = opened.read(12 + _MAX_HEADER_BYTES)
    at, length = _header_place(start)
    if length > _MAX_HEADER_BYTES or at + length > len(start):
        raise ValueError("its header is too long")
    match ast.literal_eval(start[at : at + length].decode("latin1")):
        case {"descr": str() as descr, "shape": tuple() as shape} if all(type(size) is int and size >= 0 for size in shape):
            pass
        case _:
            raise ValueError("its header says no type and shape")
    item = _DESCR.match(descr)
    if item is None:
        return _Header(descr=descr, shape=shape)
    size_bytes = math.prod(shape) * int(item[2]) * (4 if item[1] == "U" else 1)
    if size_bytes != info.file_size - at - length:
        raise ValueError("its header says another size than it has")
    return _Header(descr=descr, shape=shape)


def _header_place(content: bytes) -> tuple[int, int]:
    """Return where the header of an .npy file begins and how long it is."""
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("it is no .npy file")
    if content[6] == 1:
        return 10, int.from_bytes(content[8:10], "little")
    return 12, int.from_bytes(content[8:12], "little")
