"""An artifact is pushed whole or not seen at all, is never changed afterwards, and is proven where it lies."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from tests.fakes.object_store import ObjectStore

from plait.errors import PlaitError
from plait.registry import artifact, publishing, signing
from plait.registry.artifact import ArtifactManifest
from plait.registry.locations import Prefix
from plait.registry.records import TensorSpec
from plait.registry.signing import Trust
from plait.registry.sources import StoreOptions

SPEC = TensorSpec(name="x", dtype="float32", shape=(-1, 3))
OPTIONS = StoreOptions(timeout_s=20, stall_s=5, retries=0, allow_http=True)
FREE = Trust(required=False)
WEIGHTS = b"w" * (9 * 1024 * 1024)  # more than one part
PEM, PUBLIC = signing.generate()

both = pytest.mark.parametrize(
    "to", [Prefix(scheme="s3", bucket="models", path="m/1"), Prefix(scheme="gs", bucket="models", path="m/1")], ids=str
)
S3 = Prefix(scheme="s3", bucket="models", path="m/1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.onnx").write_bytes(WEIGHTS)
    (tmp_path / "m" / "a vocab.txt").write_bytes(b"a\nb\n")
    artifact.write(tmp_path / "m", ArtifactManifest(name="m", format="onnx", entry="model.onnx", inputs=(SPEC,), outputs=(SPEC,)))
    return tmp_path / "m"


def reason(folder: Path, to: Prefix = S3) -> str:
    with pytest.raises(PlaitError) as refused:
        publishing.push(folder, to, OPTIONS, lambda _: None)
    return refused.value.reason


@both
def test_a_pushed_artifact_is_whole_where_it_lies(folder: Path, object_store: ObjectStore, to: Prefix) -> None:
    publishing.sign(folder, PEM)
    sent: list[int] = []
    found = publishing.push(folder, to, OPTIONS, sent.append)
    assert object_store.objects == {f"models/m/1/{f.name}": f.read_bytes() for f in folder.iterdir()}
    assert (found.digest, found.location) == (artifact.digest(folder), to)
    assert sum(sent) == found.size_bytes == len(WEIGHTS) + 4
    read: list[int] = []
    publishing.verify(found, OPTIONS, Trust([str(PUBLIC)], required=True), read.append)
    assert sum(read) == found.size_bytes


def test_model_yaml_comes_last(folder: Path, object_store: ObjectStore) -> None:
    publishing.sign(folder, PEM)
    publishing.push(folder, S3, OPTIONS, lambda _: None)
    written = [name for method, name in object_store.order if method in {"PUT", "POST"} and name != "models"]  # that one deletes the claim
    assert written[0] == "models/m/1/model.yaml.push"
    assert written[-1] == "models/m/1/model.yaml"
    assert written.count("models/m/1/model.yaml") == 1


def test_what_changes_on_its_way_is_never_seen(folder: Path, object_store: ObjectStore) -> None:
    (folder / "model.onnx").write_bytes(WEIGHTS[:-1] + b"x")
    assert reason(folder) == "ARTIFACT_CORRUPT"
    assert "models/m/1/model.yaml" not in object_store.objects
    assert "models/m/1/model.onnx" not in object_store.objects


def test_pushing_again_adds_a_signature_and_sends_nothing_twice(folder: Path, object_store: ObjectStore) -> None:
    publishing.push(folder, S3, OPTIONS, lambda _: None)
    publishing.sign(folder, PEM)
    object_store.requests.clear()
    found = publishing.push(folder, S3, OPTIONS, lambda _: None)
    assert found.signed is not None
    assert found.signed.key_id == PUBLIC.id
    assert [name for method, name in object_store.requests if method in {"PUT", "POST"}] == ["models/m/1/model.yaml.sig"]


def test_another_artifact_is_never_written_over(folder: Path, object_store: ObjectStore) -> None:
    publishing.push(folder, S3, OPTIONS, lambda _: None)
    before = dict(object_store.objects)
    (folder / "a vocab.txt").write_bytes(b"c\n")
    artifact.write(folder, artifact.read(folder))
    assert reason(folder) == "ARTIFACT_EXISTS"
    assert object_store.objects == before


def test_of_two_who_push_different_artifacts_at_once_one_is_told(folder: Path, object_store: ObjectStore) -> None:
    def another_arrives(_: int) -> None:
        object_store.objects["models/m/1/model.yaml"] = b"theirs"

    with pytest.raises(PlaitError) as refused:
        publishing.push(folder, S3, OPTIONS, another_arrives)
    assert refused.value.reason == "ARTIFACT_EXISTS"
    assert object_store.objects["models/m/1/model.yaml"] == b"theirs"


def test_of_two_who_push_the_same_artifact_at_once_both_are_right(folder: Path, object_store: ObjectStore) -> None:
    content = (folder / "model.yaml").read_bytes()
    publishing.push(folder, S3, OPTIONS, lambda _: object_store.objects.__setitem__("models/m/1/model.yaml", content))
    assert object_store.objects == {f"models/m/1/{f.name}": f.read_bytes() for f in folder.iterdir()}


def other(folder: Path) -> Path:
    """Return another artifact, whose files have the same names."""
    made = folder.with_name("other")
    shutil.copytree(folder, made)
    (made / "a vocab.txt").write_bytes(b"c\n")
    artifact.write(made, artifact.read(made))
    return made


@both
def test_nobody_writes_among_the_files_of_a_push_under_way(folder: Path, object_store: ObjectStore, to: Prefix) -> None:
    theirs, reasons = other(folder), []

    def they_try(_: int) -> None:
        if not reasons:
            reasons.append(reason(theirs, to))

    found = publishing.push(folder, to, OPTIONS, they_try)
    assert reasons == ["ARTIFACT_EXISTS"]
    publishing.verify(found, OPTIONS, FREE, lambda _: None)
    assert object_store.objects == {f"models/m/1/{f.name}": f.read_bytes() for f in folder.iterdir()}


def test_what_came_just_before_the_claim_is_not_written_over(folder: Path, object_store: ObjectStore) -> None:
    theirs = other(folder)
    publishing.push(theirs, S3, OPTIONS, lambda _: None)
    before = dict(object_store.objects)
    turns = itertools.count()
    object_store.faults["models/m/1/model.yaml"] = lambda handler, _: bool(not next(turns) and (handler.fail(404, "NoSuchKey"), True)[1])
    assert reason(folder) == "ARTIFACT_EXISTS"
    assert object_store.objects == before


def test_the_claim_of_a_killed_process_is_taken_over_by_the_same_artifact_only(folder: Path, object_store: ObjectStore) -> None:
    object_store.objects["models/m/1/model.yaml.push"] = artifact.digest(folder).encode()
    with pytest.raises(PlaitError, match=r"or delete model\.yaml\.push there"):
        publishing.push(other(folder), S3, OPTIONS, lambda _: None)
    publishing.push(folder, S3, OPTIONS, lambda _: None)
    assert "models/m/1/model.yaml.push" not in object_store.objects


def test_a_push_that_fails_gives_up_its_claim(folder: Path, object_store: ObjectStore) -> None:
    (folder / "model.onnx").write_bytes(WEIGHTS[:-1] + b"x")
    assert reason(folder) == "ARTIFACT_CORRUPT"
    artifact.write(folder, artifact.read(folder))
    publishing.push(folder, S3, OPTIONS, lambda _: None)


def test_who_may_not_delete_may_push(folder: Path, object_store: ObjectStore) -> None:
    object_store.undeletable.add("models/m/1/model.yaml.push")
    found = publishing.push(folder, S3, OPTIONS, lambda _: None)
    publishing.verify(found, OPTIONS, FREE, lambda _: None)
    publishing.push(folder, S3, OPTIONS, lambda _: None)
    assert reason(other(folder)) == "ARTIFACT_EXISTS"


def test_only_what_is_whole_is_signed(folder: Path) -> None:
    (folder / "a vocab.txt").write_bytes(b"c\n")
    with pytest.raises(PlaitError) as refused:
        publishing.sign(folder, PEM)
    assert refused.value.reason == "ARTIFACT_CORRUPT"
    assert not (folder / "model.yaml.sig").exists()


def test_rot_in_the_store_is_found(folder: Path, object_store: ObjectStore) -> None:
    found = publishing.push(folder, S3, OPTIONS, lambda _: None)
    object_store.objects["models/m/1/model.onnx"] = WEIGHTS[:-1] + b"x"
    with pytest.raises(PlaitError, match=r"model\.onnx: expected sha256"):
        publishing.verify(found, OPTIONS, FREE, lambda _: None)
