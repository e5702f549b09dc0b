"""Where artifacts lie: a folder of this machine, or a prefix in a bucket."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from plait.errors import InvalidArgument

Scheme = Literal["file", "s3", "gs"]
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]\Z")
_MAX_KEY_BYTES: Final = 900  # S3 and GCS allow 1024; a file's name comes behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What every key of an artifact in an object store begins with; written s3://bucket/path or gs://bucket/path."""

    scheme: Literal["s3", "gs"]
    bucket: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"


Location = Path | Prefix


def parse(text: str, base: Path) -> Location:
    """Return the absolute folder or the prefix an artifact reference means; relative folders start at `base`.

    Raises InvalidArgument (ARTIFACT_LOCATION).
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _folder(base / text)
    if scheme in ("s3", "gs"):
        return _prefix(cast("Literal['s3', 'gs']", scheme), rest)
    if scheme != "file":
        raise _refused(f"{scheme[:20]!r} is not a scheme artifacts come by; use a folder, file:///…, s3://… or gs://…")
    if not rest.startswith("/"):
        raise _refused("a file:// address needs an absolute path: file:///folder")
    return _folder(Path(rest))


def _folder(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links that go round in circles, a NUL in the name
        raise _refused(f"{str(path)[:80]!r} cannot be the name of a folder: {_why(error)}") from error


def _why(error: Exception) -> str:
    return "its links go round in circles" if isinstance(error, RuntimeError) else "it holds what no path may"


def _prefix(scheme: Literal["s3", "gs"], rest: str) -> Prefix:
    bucket, _, path = rest.partition("/")
    path = path.rstrip("/")
    if not _BUCKET.match(bucket):
        raise _refused(f"{scheme}:// needs the name of a bucket and nothing else before the first slash: {scheme}://bucket/folder")
    if not path:
        raise _refused(f"{scheme}://{bucket} names a whole bucket; say which folder in it: {scheme}://{bucket}/folder")
    if any(part in ("", ".", "..") for part in path.split("/")) or not path.isprintable() or set(path) & set("?#\\"):
        raise _refused(f"the path in {scheme}://{bucket} holds an empty part, '.', '..', '?', '#', a backslash or a control character")
    if len(path.encode()) > _MAX_KEY_BYTES:
        raise _refused(f"the path in {scheme}://{bucket} is longer than {_MAX_KEY_BYTES} bytes")
    return Prefix(scheme=scheme, bucket=bucket, path=path)


def _refused(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="ARTIFACT_LOCATION")
