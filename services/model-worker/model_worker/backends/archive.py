"""A zip read into members that are each expected, and written anew: two readers of one zip need not agree on what is in it, so what was
checked here is all that torch's reader gets to see."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Final

from plait.errors import FailedPrecondition

Content = bytes | memoryview  # a view of the archive where a member is large
_LARGE_BYTES: Final = 1024 * 1024  # to copy that much at once would hold the interpreter's lock for too long
_LOCAL_HEADER: Final = struct.Struct("<26xHH")  # bytes of the name and of the extra field, between which and the content nothing is
_MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024  # of one compressed member; torch compresses code and nothing else


def members(content: bytes, expected: re.Pattern[str], left_out: re.Pattern[str], *, written_by: str) -> dict[str, Content]:
    """Return the members by name below the archive's own folder, those `left_out` excepted.

    Raises FailedPrecondition: ARTIFACT_UNSAFE where one is not `expected` or comes twice, ARTIFACT_INVALID where this is no such zip.
    """
    found: dict[str, Content] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                if left_out.fullmatch(name):
                    continue
                if not expected.fullmatch(name) or name in found:
                    raise unsafe(f"it holds {info.filename[:80]!r}, which is no part of a plain model, or twice")
                if info.compress_type != zipfile.ZIP_STORED and info.file_size > _MAX_INFLATED_BYTES:
                    raise ValueError("too large")
                large = info.compress_type == zipfile.ZIP_STORED and info.file_size >= _LARGE_BYTES
                found[name] = _view(content, archive, info) if large else archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise invalid(error, written_by) from error
    return found


def _view(content: bytes, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> memoryview:
    """Return a stored member where it lies. Raises what reading it would."""
    with archive.open(info):  # checks its header against the archive's list
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(content, info.header_offset)
    start = info.header_offset + zipfile.sizeFileHeader + name_bytes + extra_bytes  # type: ignore[attr-defined]
    found = memoryview(content)[start : start + info.file_size]
    if len(found) != info.file_size or zlib.crc32(found) != info.CRC:
        raise zipfile.BadZipFile("damaged")
    return found


def zipped(content: Mapping[str, Content]) -> bytes:
    """Return an archive of these members, as torch reads it. What is large is copied in pieces, between which others may run."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            with archive.open(zipfile.ZipInfo(f"archive/{name}"), "w", force_zip64=len(data) > zipfile.ZIP64_LIMIT) as member:
                for at in range(0, len(data), _LARGE_BYTES):
                    member.write(data[at : at + _LARGE_BYTES])
    return target.getvalue()


def unsafe(why: str) -> FailedPrecondition:
    """Return the error for an archive that might run code of its own."""
    return FailedPrecondition(f"the model's archive is refused: {why}; export plain tensors and aten operators", reason="ARTIFACT_UNSAFE")


def invalid(error: Exception, written_by: str) -> FailedPrecondition:
    """Return the error for what is no such archive."""
    return FailedPrecondition(
        f"this is no archive that {written_by} wrote ({type(error).__name__}): export the model again", reason="ARTIFACT_INVALID"
    )
