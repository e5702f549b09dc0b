"""From a folder that somebody published to a program that may serve: pinned, verified, loaded, tested, warmed.

Runs on a background thread. Whatever is wrong comes out as one FailedPrecondition that says what to do; nothing of it is used before
its digest was checked.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from model_worker.backends import torch as backend
from model_worker.packed import Array
from model_worker.ragged import Arrays, Ragged
from model_worker.runner import Forward
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import ModelVersion, TensorSpec

_WARM_RUNS: Final = 3  # TorchScript profiles, then optimises, then runs as it will


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A verified, tested, warm model: what it is, how to call it, how its requests are joined."""

    manifest: ArtifactManifest
    forward: Forward
    ragged: Ragged


def load(version: ModelVersion, *, threads: int) -> Program:
    """Return the program of a published version.

    Raises FailedPrecondition: ARTIFACT_MISSING, ARTIFACT_CORRUPT, ARTIFACT_INVALID, MODEL_UNSAFE, MODEL_UNLOADABLE, MODEL_UNSERVABLE,
    SELF_TEST_FAILED.
    """
    folder = artifact.location(version.artifact, Path.cwd())
    manifest = artifact.read_pinned(folder, version.digest)
    _check_servable(manifest)
    artifact.verify_files(folder, manifest)
    forward = backend.load(manifest.format, folder / manifest.entry, threads=threads)
    program = Program(manifest=manifest, forward=forward, ragged=Ragged(manifest.signature, row_splits=bool(manifest.batching.row_splits)))
    sample, expected = _sample(folder, manifest)
    _self_test(program, sample, expected)
    return program


def _check_servable(manifest: ArtifactManifest) -> None:
    for spec in (*manifest.inputs, *manifest.outputs):
        first = 1 if spec.per == "request" and spec in manifest.inputs else -1
        if spec.dtype == "bytes":
            raise _unservable(f"tensor {spec.name!r} is BYTES, which torch has no tensors of: encode it as numbers")
        if spec.per == "row" and spec.shape[0] != first:
            raise _unservable(f"tensor {spec.name!r} has one entry per row, so its first dimension must be -1, found {spec.shape[0]}")
        if spec.per == "request" and spec.shape[0] not in (first, 1):
            raise _unservable(f"tensor {spec.name!r} has one entry per request, so its first dimension must be 1, found {spec.shape[0]}")


def _sample(folder: Path, manifest: ArtifactManifest) -> tuple[Arrays, Arrays]:
    """Return inputs to try the program with and the outputs expected of it; made up, and none expected, without a self test."""
    if manifest.self_test is None:
        return tuple(_made_up(spec) for spec in manifest.inputs), ()
    file = folder / manifest.self_test.file
    try:
        with np.load(file, allow_pickle=False) as arrays:
            inputs = tuple(_pick(arrays, f"input.{spec.name}", spec) for spec in manifest.inputs)
            return inputs, tuple(_pick(arrays, f"output.{spec.name}", spec) for spec in manifest.outputs)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _failed(f"{file.name} is not an .npz file of plain arrays") from error


def _pick(arrays: Mapping[str, Array], name: str, spec: TensorSpec) -> Array:
    if name not in arrays:
        raise _failed(f"the self test holds no array {name!r}")
    array = arrays[name]
    fits = array.ndim == len(spec.shape) and all(wanted in (-1, found) for found, wanted in zip(array.shape, spec.shape, strict=True))
    if array.dtype != np.dtype(BY_NAME[spec.dtype].numpy) or not fits or not array.size:
        raise _failed(f"array {name!r} is {array.dtype} {list(array.shape)}, the signature says {spec.dtype} {list(spec.shape)}")
    return np.ascontiguousarray(array)


def _made_up(spec: TensorSpec) -> Array:
    shape = tuple(2 if size == -1 else size for size in spec.shape)
    return np.zeros(shape, BY_NAME[spec.dtype].numpy)


def _self_test(program: Program, sample: Arrays, expected: Arrays) -> None:
    """Run the sample alone, in company and as a single row, which also warms the program; compare what was promised.

    In company matters: a program that mixes up the requests of a batch answers each of them rightly alone.
    """
    manifest = program.manifest
    rows = next((len(array) for array, spec in zip(sample, manifest.inputs, strict=True) if spec.per == "row"), 1)
    for _ in range(_WARM_RUNS):
        alone = _run(program, [sample], [rows])[0]
        first, second = _run(program, [sample, sample], [rows, rows])
        _run(program, *_single_row(program, sample, rows))
    tolerance = manifest.self_test.tolerance if manifest.self_test else 1e-4
    for case, found, wanted in (("alone", alone, expected), ("first of two", first, alone), ("second of two", second, alone)):
        for spec, a, b in zip(manifest.outputs, found, wanted, strict=False):
            if not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
                raise _failed(f"{case}, output {spec.name!r} is off by up to {gap:.3g}, {tolerance:g} is allowed")


def _single_row(program: Program, sample: Arrays, rows: int) -> tuple[list[Arrays], list[int]]:
    if rows == 1 or any(spec.per == "request" for spec in program.manifest.outputs):
        return [sample], [rows]
    work, n = program.ragged.chunks(sample, rows, 1)[0]
    return [work], [n]


def _run(program: Program, requests: Sequence[Arrays], rows: Sequence[int]) -> list[Arrays]:
    try:
        return program.ragged.split(program.forward(program.ragged.join(requests, rows)), rows)
    except Exception as error:
        line = str(error).strip().rpartition("\n")[2][:300]
        raise _failed(f"{len(rows)} request(s) of {rows[0]} row(s) raise {type(error).__name__}: {line}") from error


def _failed(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"the model does not pass its self test: {what}; fix it and publish it anew", reason="SELF_TEST_FAILED")


def _unservable(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"the model cannot be served: {what}", reason="MODEL_UNSERVABLE")
