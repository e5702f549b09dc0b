"""Reading an artifact's files from wherever it lies, with every byte hashed on its way.

A source only brings bytes. What they must be is the manifest's to say, and `copy` is the one place that compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry import artifact, signing
from plait.registry.artifact import FileDigest
from plait.registry.locations import Location

CHUNK_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How to speak with an object store. Credentials and endpoints come from the environment or the cloud's identity, never from here.

    `timeout_s`: one request, its body included. `stall_s`: without a byte. `retries`: per request, with exponential backoff and jitter.
    `allow_http`: speak without TLS where the endpoint says http://, as stores on one's own machine do.
    """

    timeout_s: float = 600.0
    connect_timeout_s: float = 5.0
    stall_s: float = 30.0
    retries: int = 4
    allow_http: bool = False


class Source(Protocol):
    """An artifact's files by their names in `model.yaml`; its `str` says where they lie.

    Raises FailedPrecondition (ARTIFACT_MISSING, ARTIFACT_FORBIDDEN, ARTIFACT_STORE_MISCONFIGURED), InvalidArgument (ARTIFACT_LOCATION),
    Unavailable (ARTIFACT_STORE_UNAVAILABLE).
    """

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return a small file, or its first `most_bytes` + 1 bytes where it is larger."""

    def chunks(self, name: str, size_bytes: int = 0) -> Iterator[bytes]:
        """Yield a file piece by piece as it arrives; the size it should have (0 = not known) helps to choose how it is fetched."""


class FolderSource:
    """An artifact in a folder; a link that leads out of it is not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __repr__(self) -> str:
        return f"<FolderSource {self._folder}>"

    def __str__(self) -> str:
        return str(self._folder)

    def read(self, name: str, most_bytes: int) -> bytes:
        content = bytearray()
        for chunk in self.chunks(name):
            content += chunk[: most_bytes + 1 - len(content)]
            if len(content) > most_bytes:
                break
        return bytes(content)

    def chunks(self, name: str, size_bytes: int = 0) -> Iterator[bytes]:
        file = self._folder / PurePosixPath(name)
        if not artifact.lies_inside(file, self._folder):
            raise FailedPrecondition(f"{name} lies outside the artifact's folder and is not opened", reason="ARTIFACT_CORRUPT")
        if artifact.is_file(self._folder):
            raise InvalidArgument(f"{self._folder} is a file: name the artifact's folder, where model.yaml is", reason="ARTIFACT_LOCATION")
        if not artifact.is_file(file):
            raise FailedPrecondition(f"there is no file {name} in {self._folder}", reason="ARTIFACT_MISSING")
        try:
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise artifact.unreadable(file, error) from error


def open_source(location: Location, options: StoreOptions) -> Source:
    """Return what reads from a location. Nothing is read yet. Raises FailedPrecondition (ARTIFACT_STORE_MISCONFIGURED)."""
    if isinstance(location, Path):
        return FolderSource(location)
    try:
        from plait.registry.object_store import Bucket  # noqa: PLC0415 - whoever has folders only needs no object store's library
    except ModuleNotFoundError as error:
        message = f"{location.scheme}:// needs the object store's library: pip install 'plait[artifacts]'"
        raise FailedPrecondition(message, reason="ARTIFACT_STORE_MISCONFIGURED") from error
    return Bucket(location, options)


def read_manifest(source: Source) -> bytes:
    """Return the bytes of `model.yaml`, or one more than `artifact.MAX_BYTES` of them. Raises as `Source` does."""
    try:
        return source.read(artifact.FILE_NAME, artifact.MAX_BYTES)
    except FailedPrecondition as error:
        if error.reason != "ARTIFACT_MISSING":
            raise
        raise FailedPrecondition(f"there is no artifact at {source}: it has no {artifact.FILE_NAME}", reason="ARTIFACT_MISSING") from error


def read_signature(source: Source) -> bytes | None:
    """Return the bytes of `model.yaml.sig`, or None where there is none. Raises as `Source` does."""
    try:
        return source.read(signing.FILE_NAME, signing.MAX_BYTES)
    except FailedPrecondition as error:
        if error.reason != "ARTIFACT_MISSING":
            raise
        return None


def copy(source: Source, name: str, expected: FileDigest, write: Callable[[bytes], object]) -> None:
    """Hand a file's bytes to `write` as they arrive; return once they proved to be what was published. Raises as `verified` does."""
    for chunk in verified(source, name, expected):
        write(chunk)


def verified(source: Source, name: str, expected: FileDigest) -> Iterator[bytes]:
    """Yield a file as it arrives; it is proven to be what was published once this ends without an error.

    Stops at the first byte more than `expected.size_bytes`. Raises FailedPrecondition (ARTIFACT_CORRUPT) and as `Source` does; a listed
    file that is not there is ARTIFACT_CORRUPT too, because an artifact without it is not what was published.
    """
    sha256, size_bytes = hashlib.sha256(), 0
    try:
        for chunk in source.chunks(name, expected.size_bytes):
            size_bytes += len(chunk)
            if size_bytes > expected.size_bytes:
                raise _corrupt(name, f"it holds more than the {expected.size_bytes} bytes that were published")
            sha256.update(chunk)
            yield chunk
    except FailedPrecondition as error:
        if error.reason != "ARTIFACT_MISSING":
            raise
        raise _corrupt(name, "it is missing") from error
    found = FileDigest(sha256=sha256.hexdigest(), size_bytes=size_bytes)
    if found != expected:
        wanted = f"expected sha256 {expected.sha256} ({expected.size_bytes} bytes)"
        raise _corrupt(name, f"{wanted}, found {found.sha256} ({found.size_bytes} bytes)")


def _corrupt(name: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the artifact's file {name} is not what was published: {message}",
        reason="ARTIFACT_CORRUPT",
        metadata={"file": name, "problem": message},
    )
