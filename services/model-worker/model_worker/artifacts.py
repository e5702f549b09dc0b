"""From what the registry says of a version to bytes that are proven to be what was published; nothing is used before its digest was checked."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from model_worker.artifact_cache import ArtifactCache, Lease
from model_worker.contents import objects
from model_worker.packed import Array
from model_worker.settings import ArtifactSettings
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry import artifact, locations, self_test
from plait.registry.artifact import ArtifactManifest
from plait.registry.locations import Location
from plait.registry.records import ModelVersion, TensorSpec
from plait.registry.signing import Trust
from plait.registry.sources import StoreOptions, open_source

_MADE_UP_ROWS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request and, where a self test is published, the answer it must give (to `tolerance`, absolute and relative)."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...] | None
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A version's manifest, the folder that holds its verified files, and a sample request.

    The folder stays as it is until `close`, or until the artifact is forgotten; without a lease it is somebody else's to keep.
    """

    manifest: ArtifactManifest
    folder: Path
    sample: Sample
    lease: Lease | None = None

    def read(self, name: str) -> bytes:
        """Return a file's bytes, checked again: what is hashed is what is used. Raises FailedPrecondition (ARTIFACT_CORRUPT)."""
        return _read(self.folder, self.manifest, name)

    def close(self) -> None:
        """Let go of the folder, once nothing will read it again; closing twice is fine."""
        if self.lease is not None:
            self.lease.close()


class Fetcher:
    """Brings artifacts from where they may come from into the cache, and says no to all others. Thread-safe; blocks.

    `root`: folder outside of which nothing is opened, and where relative references start. Raises FailedPrecondition
    (ARTIFACT_CACHE_UNUSABLE) where the cache's folder cannot be written.
    """

    def __init__(self, settings: ArtifactSettings, root: Path | None) -> None:
        self._settings = settings
        self._root = root
        self._trust = Trust(settings.trusted_keys, required=settings.require_signature)
        self._options = StoreOptions(
            timeout_s=settings.timeout_s, stall_s=settings.stall_s, retries=settings.retries, allow_http=settings.allow_http
        )
        self._cache = ArtifactCache(
            settings.cache or default_cache(os.environ),
            max_bytes=settings.max_bytes,
            concurrency=settings.concurrency,
            timeout_s=settings.timeout_s,
        )

    def __repr__(self) -> str:
        return f"<Fetcher {self._cache!r} {self._trust!r}>"

    def fetch(self, version: ModelVersion) -> Artifact:
        """Return one version, verified, in the cache's folder; close it once nothing reads the folder any more.

        Raises FailedPrecondition: ARTIFACT_MISSING, ARTIFACT_CORRUPT, ARTIFACT_INVALID, ARTIFACT_OUTSIDE_ROOT, ARTIFACT_SOURCE_FORBIDDEN,
        ARTIFACT_FORBIDDEN, ARTIFACT_STORE_MISCONFIGURED, SIGNATURE_MISSING, SIGNATURE_INVALID, SIGNATURE_UNTRUSTED, SELF_TEST_UNUSABLE,
        and what the cache raises; InvalidArgument: ARTIFACT_LOCATION; Unavailable: ARTIFACT_STORE_UNAVAILABLE, ARTIFACT_FETCH_TIMEOUT.
        """
        location = locations.parse(version.artifact, self._root or Path.cwd())
        self._check_allowed(location)
        held = self._cache.acquire(version.digest, open_source(location, self._options), self._trust)
        try:
            sample = _sample(held.lease.folder, held.manifest)
        except BaseException:
            held.lease.close()
            raise
        return Artifact(manifest=held.manifest, folder=held.lease.folder, sample=sample, lease=held.lease)

    def close(self) -> None:
        """End what is being fetched, so that no thread holds up the process's end; artifacts that are held stay."""
        self._cache.close()

    def _check_allowed(self, location: Location) -> None:
        scheme = "file" if isinstance(location, Path) else location.scheme
        if scheme not in self._settings.schemes:
            raise _forbidden(f"artifacts may not come from {scheme}:// here (setting artifacts.schemes)")
        if isinstance(location, Path):
            _check_inside(location, self._root)
        elif self._settings.buckets and location.bucket not in self._settings.buckets:
            raise _forbidden(f"artifacts may not come from the bucket {location.bucket} here (setting artifacts.buckets)")


def default_cache(environ: Mapping[str, str]) -> Path:
    """Return the user's folder for copies of artifacts, as the XDG Base Directory Specification has it.

    Raises FailedPrecondition (ARTIFACT_CACHE_UNUSABLE) where the user has no home.
    """
    given = Path(environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "plait" / "artifacts"
    except RuntimeError as error:
        message = "this user has no home folder to keep artifacts in: set artifacts.cache"
        raise FailedPrecondition(message, reason="ARTIFACT_CACHE_UNUSABLE") from error


def fetch(version: ModelVersion, root: Path | None) -> Artifact:
    """Verify one version in the folder it lies in, without a copy: for tools and tests. `root` as in `Fetcher`.

    Raises FailedPrecondition (ARTIFACT_MISSING, ARTIFACT_CORRUPT, ARTIFACT_INVALID, ARTIFACT_OUTSIDE_ROOT) and InvalidArgument
    (ARTIFACT_LOCATION).
    """
    folder = locations.parse(version.artifact, root or Path.cwd())
    if not isinstance(folder, Path):
        raise InvalidArgument(f"{folder} can only be fetched into a cache", reason="ARTIFACT_LOCATION")
    _check_inside(folder, root)
    manifest = artifact.read_pinned(folder, version.digest)
    artifact.verify_files(folder, manifest)
    return Artifact(manifest=manifest, folder=folder, sample=_sample(folder, manifest))


def _check_inside(folder: Path, root: Path | None) -> None:
    if root is not None and not folder.is_relative_to(root.resolve()):
        raise FailedPrecondition("the artifact lies outside of this worker's artifact root", reason="ARTIFACT_OUTSIDE_ROOT")


def _forbidden(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="ARTIFACT_SOURCE_FORBIDDEN")


def _read(folder: Path, manifest: ArtifactManifest, name: str) -> bytes:
    """Read a file once and check those very bytes: what is hashed is what is used, whatever happens to the file meanwhile."""
    try:
        content = (folder / PurePosixPath(name)).read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"the artifact's file {name} cannot be read: {error.strerror}", reason="ARTIFACT_MISSING") from error
    if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
        raise FailedPrecondition(f"the artifact's file {name} changed while it was read", reason="ARTIFACT_CORRUPT")
    return content


def _sample(folder: Path, manifest: ArtifactManifest) -> Sample:
    if manifest.self_test is None:
        return Sample(inputs=tuple(_made_up(t) for t in manifest.inputs), outputs=None, tolerance=0.0)
    content = _read(folder, manifest, manifest.self_test.file)
    self_test.check(content, manifest)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            inputs = tuple(_member(arrays, f"input.{t.name}", t) for t in manifest.inputs)
            outputs = tuple(_member(arrays, f"output.{t.name}", t) for t in manifest.outputs)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise self_test.unusable(f"it is not an .npz of plain arrays ({type(error).__name__})") from error
    return Sample(inputs=inputs, outputs=outputs, tolerance=manifest.self_test.tolerance)


def _made_up(spec: TensorSpec) -> Array:
    """Return an input for want of a published one: several rows, so that joining and splitting can be proven, of which floats differ (equal
    rows would prove nothing) and everything else is zero, which is an id that any vocabulary has."""
    shape = [abs(size) for size in spec.shape]
    if spec.per == "row" and spec.shape[0] == -1:
        shape[0] = _MADE_UP_ROWS
    if math.prod(shape) * max(1, BY_NAME[spec.dtype].size_bytes) > self_test.MAX_BYTES:
        raise FailedPrecondition(f"the input {spec.name} is too large to make one up: publish a self test", reason="SELF_TEST_UNUSABLE")
    array = np.zeros(shape, BY_NAME[spec.dtype].numpy)
    if array.dtype.kind == "O":
        array[...] = b""
    elif array.dtype.kind == "f":
        array[...] = np.linspace(0, 1, array.size).reshape(shape)
    return array


def _member(arrays: Any, key: str, spec: TensorSpec) -> Array:
    """Return one array of a self test that was checked, in the form models take it in."""
    array: Array = arrays[key]
    if spec.dtype == "bfloat16":
        return array.view(BY_NAME["bfloat16"].numpy)
    if spec.dtype != "bytes":
        return array
    if array.dtype.kind != "u":
        return objects([item if isinstance(item, bytes) else item.encode() for item in array.ravel().tolist()], array.shape)
    found = self_test.elements(array.tobytes())
    shape = self_test.SHAPE_PREFIX + key
    return objects(found, tuple(arrays[shape].tolist()) if shape in arrays else (len(found),))
