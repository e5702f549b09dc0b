"""Nothing of an artifact is used before it was found to be what was published."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_worker import artifacts
from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest, SelfTest
from plait.registry.records import Batching, ModelVersion, TensorSpec

USER = TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request")
ITEM = TensorSpec(name="item", dtype="int64", shape=(-1, 3))
SCORE = TensorSpec(name="score", dtype="float32", shape=(-1,))
GOOD = {
    "input.user": np.ones((1, 2), np.float32),
    "input.item": np.ones((4, 3), np.int64),
    "output.score": np.ones(4, np.float32),
}


def publish(folder: Path, self_test: dict[str, Any] | bytes | None = None) -> ModelVersion:
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"weights")
    if isinstance(self_test, bytes):
        (folder / "test.npz").write_bytes(self_test)
    elif self_test is not None:
        np.savez(folder / "test.npz", **self_test)
    manifest = ArtifactManifest(
        name="m",
        format="torchscript",
        entry="model.pt",
        inputs=(USER, ITEM),
        outputs=(SCORE,),
        batching=Batching(row_splits="row_splits"),
        self_test=SelfTest(file="test.npz", tolerance=0.5) if self_test is not None else None,
    )
    return ModelVersion(version="1", artifact=str(folder), digest=artifact.write(folder, manifest))


def reason(version: ModelVersion, root: Path | None = None) -> str:
    with pytest.raises((FailedPrecondition, InvalidArgument)) as refused:
        artifacts.fetch(version, root)
    return refused.value.reason


def test_what_was_published_is_read(tmp_path: Path) -> None:
    found = artifacts.fetch(publish(tmp_path / "m", GOOD), None)
    assert found.read("model.pt") == b"weights"
    assert found.manifest.name == "m"
    assert [a.tolist() for a in found.sample.inputs] == [GOOD["input.user"].tolist(), GOOD["input.item"].tolist()]
    assert found.sample.outputs is not None
    assert found.sample.tolerance == 0.5


def test_without_a_self_test_several_rows_are_made_up_whose_floats_differ(tmp_path: Path) -> None:
    sample = artifacts.fetch(publish(tmp_path / "m"), None).sample
    user, item = sample.inputs
    assert (user.shape, user.dtype, item.shape, item.dtype) == ((1, 2), np.float32, (4, 3), np.int64)
    assert len(set(user.ravel().tolist())) == 2
    assert not item.any()
    assert sample.outputs is None


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "model.pt").write_bytes(b"weightz"), "ARTIFACT_CORRUPT"),
        (lambda f: (f / "model.pt").unlink(), "ARTIFACT_CORRUPT"),
        (lambda f: (f / "test.npz").write_bytes(b""), "ARTIFACT_CORRUPT"),
        (lambda f: (f / "model.yaml").write_text((f / "model.yaml").read_text() + "\n"), "ARTIFACT_CORRUPT"),
        (lambda f: (f / "model.yaml").unlink(), "ARTIFACT_MISSING"),
    ],
)
def test_what_is_not_what_was_published_is_refused(tmp_path: Path, spoil: Any, expected: str) -> None:
    version = publish(tmp_path / "m", GOOD)
    spoil(tmp_path / "m")
    assert reason(version) == expected


def test_another_digest_is_refused(tmp_path: Path) -> None:
    version = publish(tmp_path / "m", GOOD)
    assert reason(dataclasses.replace(version, digest="sha256:" + "0" * 64)) == "ARTIFACT_CORRUPT"
    assert reason(dataclasses.replace(version, digest="")) == "ARTIFACT_CORRUPT"


def test_bytes_that_change_between_check_and_use_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = publish(tmp_path / "m", GOOD)
    check = artifact.verify_files

    def check_then_change(folder: Any, manifest: Any) -> None:
        check(folder, manifest)
        (tmp_path / "m" / "model.pt").write_bytes(b"weightz")

    monkeypatch.setattr(artifact, "verify_files", check_then_change)
    with pytest.raises(FailedPrecondition) as refused:
        artifacts.fetch(version, None).read("model.pt")
    assert refused.value.reason == "ARTIFACT_CORRUPT"


def test_nothing_outside_of_the_root_is_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    inside, outside = publish(root / "m", GOOD), publish(tmp_path / "m", GOOD)
    artifacts.fetch(inside, root)
    artifacts.fetch(dataclasses.replace(inside, artifact="m"), root)
    assert reason(outside, root) == "ARTIFACT_OUTSIDE_ROOT"
    assert reason(dataclasses.replace(outside, artifact="../m"), root) == "ARTIFACT_OUTSIDE_ROOT"
    (root / "link").symlink_to(tmp_path / "m")
    assert reason(dataclasses.replace(outside, artifact="link"), root) == "ARTIFACT_OUTSIDE_ROOT"
    assert reason(dataclasses.replace(inside, artifact="s3://bucket/m"), root) == "ARTIFACT_LOCATION"


def pickled() -> bytes:
    target = io.BytesIO()
    np.savez(target, **{**GOOD, "input.user": np.array([[object()]])})
    return target.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        pickled(),
        {k: v for k, v in GOOD.items() if k != "output.score"},
        {**GOOD, "input.user": np.ones((1, 2), np.float64)},
        {**GOOD, "input.user": np.ones((2, 2), np.float32)},
        {**GOOD, "input.item": np.ones((4,), np.int64)},
        {**GOOD, "input.item": np.ones((0, 3), np.int64)},
    ],
    ids=["no archive", "pickle", "output missing", "dtype", "fixed dimension", "dimensions", "empty"],
)
def test_a_self_test_that_cannot_be_used_is_named(tmp_path: Path, content: Any) -> None:
    assert reason(publish(tmp_path / "m", content)) == "SELF_TEST_UNUSABLE"


def test_bytes_are_made_up_as_bytes() -> None:
    made = artifacts._made_up(TensorSpec(name="x", dtype="bytes", shape=(-1,)))
    assert made.tolist() == [b"", b"", b"", b""]
