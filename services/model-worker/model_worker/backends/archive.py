"""A zip read into members that are each expected, and written anew: two readers of one zip need not agree on what is in it, so what was
checked here is all that torch's reader gets to see."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Final

from plait.errors import FailedPrecondition

_MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024  # of one compressed member; torch compresses code and nothing else


def members(content: bytes, expected: re.Pattern[str], left_out: re.Pattern[str], *, written_by: str) -> dict[str, bytes]:
    """Return the members by name below the archive's own folder, those `left_out` excepted.

    Raises FailedPrecondition: ARTIFACT_UNSAFE where one is not `expected` or comes twice, ARTIFACT_INVALID where this is no such zip.
    """
    found: dict[str, bytes] = {}
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
                found[name] = archive.read(info)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise invalid(error, written_by) from error
    return found


def zipped(content: Mapping[str, bytes]) -> bytes:
    """Return an archive of these members, as torch reads it."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(f"archive/{name}", data)
    return target.getvalue()


def unsafe(why: str) -> FailedPrecondition:
    """Return the error for an archive that might run code of its own."""
    return FailedPrecondition(f"the model's archive is refused: {why}; export plain tensors and aten operators", reason="ARTIFACT_UNSAFE")


def invalid(error: Exception, written_by: str) -> FailedPrecondition:
    """Return the error for what is no such archive."""
    return FailedPrecondition(
        f"this is no archive that {written_by} wrote ({type(error).__name__}): export the model again", reason="ARTIFACT_INVALID"
    )
