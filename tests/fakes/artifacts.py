"""Artifacts on disk, made by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from model_worker import backends
from model_worker.artifacts import Artifact, Sample
from model_worker.backends import LoadOptions, Model
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest, Format
from plait.registry.records import Signature


def artifact_of(folder: Path, content: bytes, format_: Format, signature: Signature, **more: Any) -> Artifact:
    """Write `content` as the entry of an artifact and return it as the worker would hold it once verified."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").write_bytes(content)
    manifest = ArtifactManifest(name="m", format=format_, entry="model", inputs=signature.inputs, outputs=signature.outputs, **more)
    artifact.write(folder, manifest)
    read = artifact.read(folder)
    sample = Sample(inputs=tuple(np.zeros(0) for _ in signature.inputs), outputs=None, tolerance=0.0)
    return Artifact(manifest=read, folder=folder, sample=sample)


def load(content: bytes, format_: Format, signature: Signature, **options: Any) -> Model:
    """Load a model from these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        return backends.load(artifact_of(Path(folder), content, format_, signature), LoadOptions(**options))
