"""From what the registry says of a version to bytes that are proven to be what was published; nothing is used before its digest was checked."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from model_worker.packed import Array
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import ModelVersion, TensorSpec

_MADE_UP_ROWS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request and, where a self test is published, the answer it must give (to `tolerance`, absolute and relative)."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...] | None
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A version's manifest, the folder that holds its verified files, and a sample request."""

    manifest: ArtifactManifest
    folder: Path
    sample: Sample

    def read(self, name: str) -> bytes:
        """Return a file's bytes, checked again: what is hashed is what is used. Raises FailedPrecondition (ARTIFACT_CORRUPT)."""
        return _read(self.folder, self.manifest, name)


def fetch(version: ModelVersion, root: Path | None) -> Artifact:
    """Read and verify one version. `root`: folder outside of which nothing is opened, and where relative references start.

    Raises FailedPrecondition (ARTIFACT_MISSING, ARTIFACT_CORRUPT, ARTIFACT_INVALID, ARTIFACT_OUTSIDE_ROOT) and InvalidArgument
    (ARTIFACT_LOCATION).
    """
    folder = artifact.location(version.artifact, root or Path.cwd())
    if root is not None and not folder.is_relative_to(root.resolve()):
        raise FailedPrecondition("the artifact lies outside of this worker's artifact root", reason="ARTIFACT_OUTSIDE_ROOT")
    manifest = artifact.read_pinned(folder, version.digest)
    artifact.verify_files(folder, manifest)
    return Artifact(manifest=manifest, folder=folder, sample=_sample(folder, manifest))


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
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            inputs = tuple(_member(arrays, f"input.{t.name}", t) for t in manifest.inputs)
            outputs = tuple(_member(arrays, f"output.{t.name}", t) for t in manifest.outputs)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unusable(f"it is not an .npz of plain arrays ({type(error).__name__})") from error
    return Sample(inputs=inputs, outputs=outputs, tolerance=manifest.self_test.tolerance)


def _made_up(spec: TensorSpec) -> Array:
    """Return an input for want of a published one: several rows, so that joining and splitting can be proven, of which floats differ (equal
    rows would prove nothing) and everything else is zero, which is an id that any vocabulary has."""
    shape = [abs(size) for size in spec.shape]
    if spec.per == "row" and spec.shape[0] == -1:
        shape[0] = _MADE_UP_ROWS
    array = np.zeros(shape, BY_NAME[spec.dtype].numpy)
    if array.dtype.kind == "O":
        array[...] = b""
    elif array.dtype.kind == "f":
        array[...] = np.linspace(0, 1, array.size).reshape(shape)
    return array


def _member(arrays: Any, name: str, spec: TensorSpec) -> Array:
    if name not in arrays:
        raise _unusable(f"it lacks {name!r}")
    array: Array = arrays[name]
    fits = array.ndim == len(spec.shape) and all(want in (-1, size) for size, want in zip(array.shape, spec.shape, strict=True))
    if not fits or array.size == 0 or array.dtype != np.dtype(BY_NAME[spec.dtype].numpy):
        raise _unusable(f"{name} is {array.dtype} {list(array.shape)}, the signature says {spec.dtype} {list(spec.shape)}")
    return array


def _unusable(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"the self test cannot be used: {why}", reason="SELF_TEST_UNUSABLE")
