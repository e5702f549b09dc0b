from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import FailedPrecondition
from plait.registry import artifact
from plait.registry.artifact import Architecture, ArtifactManifest, FileDigest, SelfTest
from plait.registry.records import Batching, Execution, TensorSpec

MANIFEST = ArtifactManifest(
    name="ranker",
    format="torchscript",
    entry="model.pt",
    feature_set="home",
    inputs=(
        TensorSpec(name="user", dtype="float32", shape=(1, 41), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, 64)),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    batching=Batching(row_splits="row_splits"),
    self_test=SelfTest(file="self_test.npz"),
)

BATCHING = {"row_splits": "row_splits"}
FILE = {"sha256": "0" * 64, "size_bytes": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.pt").write_bytes(b"weights" * 1000)
    (tmp_path / "self_test.npz").write_bytes(b"arrays")
    (tmp_path / ".hidden").write_bytes(b"scratch")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "vocab.txt").write_text("a\nb\n")
    return tmp_path


def test_what_is_written_reads_back_with_every_digest(folder: Path) -> None:
    digest = artifact.write(folder, MANIFEST)
    found = artifact.read(folder)
    assert sorted(found.files) == ["extra/vocab.txt", "model.pt", "self_test.npz"]
    assert found.files["model.pt"] == FileDigest(sha256=hashlib.sha256(b"weights" * 1000).hexdigest(), size_bytes=7000)
    assert dataclasses.replace(found, files={}) == MANIFEST
    assert found.signature.feature_set == "home"
    assert digest == artifact.digest(folder) == artifact.digest(folder / "model.yaml")
    assert digest == "sha256:" + hashlib.sha256((folder / "model.yaml").read_bytes()).hexdigest()
    artifact.verify_files(folder, found)
    assert artifact.read_pinned(folder, digest) == found


def test_writing_twice_gives_the_same_digest(folder: Path) -> None:
    assert artifact.write(folder, MANIFEST) == artifact.write(folder, MANIFEST)


def test_the_documented_example_reads(folder: Path) -> None:
    text = """
apiVersion: plait.dev/v1
kind: ModelArtifact
name: marketplace-ranker
format: torchscript            # torchscript | torch_export
entry: model.pt
feature_set: marketplace-ranker
inputs:
  - {name: user, dtype: float32, shape: [1, 41], per: request}
  - {name: item, dtype: float32, shape: [-1, 64], per: row}
outputs:
  - {name: score, dtype: float32, shape: [-1]}
batching: {max_rows: 4096, max_queue_rows: 32768, max_queue_delay_ms: 2.0, row_splits: row_splits}
self_test: {file: self_test.npz, tolerance: 1.0e-4}
files: {model.pt: {sha256: HASH, size_bytes: 7000}, self_test.npz: {sha256: HASH, size_bytes: 6}}
"""
    found = artifact.parse(text.replace("HASH", "f" * 64).encode(), source="model.yaml")
    assert (found.name, found.self_test) == ("marketplace-ranker", SelfTest(file="self_test.npz", tolerance=1e-4))


def test_a_changed_truncated_or_missing_file_is_named_with_both_digests(folder: Path) -> None:
    artifact.write(folder, MANIFEST)
    manifest = artifact.read(folder)
    (folder / "model.pt").write_bytes(b"tampered")
    (folder / "self_test.npz").unlink()
    with pytest.raises(FailedPrecondition) as caught:
        artifact.verify_files(folder, manifest)
    assert caught.value.reason == "ARTIFACT_CORRUPT"
    found = {v.field: v.description for v in caught.value.violations}
    assert sorted(found) == ["model.pt", "self_test.npz"]
    assert manifest.files["model.pt"].sha256 in found["model.pt"]
    assert hashlib.sha256(b"tampered").hexdigest() in found["model.pt"]
    assert found["self_test.npz"] == "is missing"


def test_a_changed_model_yaml_does_not_pass_its_pin(folder: Path) -> None:
    digest = artifact.write(folder, MANIFEST)
    (folder / "model.yaml").write_bytes((folder / "model.yaml").read_bytes() + b"\n")
    with pytest.raises(FailedPrecondition) as caught:
        artifact.read_pinned(folder, digest)
    assert caught.value.reason == "ARTIFACT_CORRUPT"
    assert digest in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\\b", "C:a", "a\nb", "a\0b", ".."])
def test_names_that_leave_the_folder_are_refused(name: str, folder: Path) -> None:
    file = FileDigest(sha256="0" * 64, size_bytes=0)
    with pytest.raises(FailedPrecondition, match="is not opened"):
        artifact.verify_files(folder, dataclasses.replace(MANIFEST, files={name: file}))


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(b"secret")
    (folder / "link").symlink_to(outside)
    file = FileDigest(sha256=hashlib.sha256(b"secret").hexdigest(), size_bytes=6)
    with pytest.raises(FailedPrecondition, match="is not opened"):
        artifact.verify_files(folder, dataclasses.replace(MANIFEST, files={"link": file}))


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        ({"format": "pickle"}, "format", "expected one of torchscript, torch_export, aotinductor, onnx or safetensors, found 'pickle'"),
        ({"kind": "Model"}, "kind", "expected ModelArtifact, found 'Model'"),
        ({"entry": "other.pt"}, "entry", "not listed under files"),
        ({"self_test": {"file": "x.npz"}}, "self_test.file", "not listed under files"),
        ({"self_test": {"file": "self_test.npz", "tolerance": 2}}, "self_test.tolerance", "between 0 and 1"),
        ({"inputs": []}, "inputs", "at least one tensor"),
        ({"outputs": [{"name": "a", "dtype": "float8", "shape": [1]}]}, "outputs[0].dtype", "expected one of bool"),
        ({"outputs": [{"name": "a", "dtype": "float32", "shape": ["n"]}]}, "outputs[0].shape[0]", "expected a whole number"),
        ({"batching": {"max_rows": 0}}, "batching.max_rows", "expected 1 to max_queue_rows"),
        ({"batching": {"max_queue_delay_ms": -1}}, "batching.max_queue_delay_ms", "expected 0 to 1000"),
        ({"batching": {}}, "batching.row_splits", "must name the row-splits input"),
        ({"files": {"../x": {"sha256": "0" * 64, "size_bytes": 1}}}, "files.../x", "plain path inside"),
        ({"files": {"x": {"sha256": "zz", "size_bytes": 1}}}, "files.x.sha256", "64 hexadecimal digits"),
        ({"files": {"x": {"sha256": "0" * 64, "size_bytes": -1}}}, "files.x.size_bytes", "0 or more"),
        ({"files": {"x": "abc"}}, "files.x", "expected a mapping of fields"),
        ({"code": "import os"}, "code", "is not a field of this"),
        ({"format": "pickle"}, "format", "pickle is never loaded"),
        ({"format": 7}, "format", "expected one of"),
        ({"batching": BATCHING | {"max_bytes": 0}}, "batching.max_bytes", "expected 1 to"),
        ({"batching": BATCHING | {"preferred_rows": [8, 8]}}, "batching.preferred_rows[1]", "8 follows 8"),
        ({"batching": BATCHING | {"preferred_rows": [0]}}, "batching.preferred_rows[0]", "expected 1 to max_rows (4096), found 0"),
        ({"batching": BATCHING | {"buckets": [16, 4]}}, "batching.buckets[1]", "4 follows 16"),
        ({"batching": BATCHING | {"max_rows": 64, "buckets": [32, 65]}}, "batching.buckets[1]", "expected 1 to max_rows (64), found 65"),
        ({"batching": BATCHING | {"buckets": list(range(1, 66))}}, "batching.buckets", "at most 64"),
        ({"execution": {"instances": 0}}, "execution.instances", "expected 1 to 64, found 0"),
        ({"execution": {"instances": 65}}, "execution.instances", "expected 1 to 64, found 65"),
        ({"execution": {"devices": [0, 16]}}, "execution.devices[1]", "the number of a GPU, 0 to 15, found 16"),
        ({"execution": {"devices": [1, 0, 1]}}, "execution.devices[2]", "names GPU 1 twice"),
        ({"execution": {"devices": list(range(17))}}, "execution.devices", "has 17 entries; at most 16"),
        ({"execution": {"timeout_ms": -1}}, "execution.timeout_ms", "to 3600000, found -1"),
        ({"execution": {"kind": "fibre"}}, "execution.kind", "expected one of thread or process"),
        ({"execution": {"autocast": "float64"}}, "execution.autocast", "expected"),
        ({"architecture": {"name": "mlp"}}, "architecture", "belongs to the format safetensors only"),
        ({"format": "safetensors"}, "architecture", "is required"),
        ({"format": "safetensors", "architecture": {"name": "a b"}}, "architecture.name", "is not a name"),
        (
            {"format": "safetensors", "architecture": {"name": "mlp", "config": {"a-b": 1}}},
            "architecture.config.a-b",
            "not the name of an argument",
        ),
        (
            {"format": "safetensors", "architecture": {"name": "mlp", "config": {"rate": float("inf")}}},
            "architecture.config.rate",
            "finite",
        ),
        ({"labels": {"nothing": "extra/vocab.txt"}}, "labels.nothing", "is not an output; outputs: score"),
        ({"labels": {"score": "nothing.txt"}}, "labels.score", "is not listed under files"),
        ({"files": {"model.yaml": {"sha256": "0" * 64, "size_bytes": 1}}}, "files.model.yaml", "cannot be listed in itself"),
        ({"files": {"a/" + "ü" * 128: FILE}}, "files.a/" + "ü" * 128, "more than 255 bytes"),
        ({"files": {"a": FILE, "a/b": FILE}}, "files.a/b", "lies inside 'a'"),
        ({"files": {"model.yaml/b": FILE}}, "files.model.yaml/b", "lies inside 'model.yaml'"),
        ({"files": {"a/b/c" * 200: FILE}}, "files." + ("a/b/c" * 200)[:80], "longer than 900 bytes"),
        ({"files": {"a/" * 32 + "b": FILE}}, "files." + "a/" * 32 + "b", "deeper than 32 folders"),
    ],
)
def test_a_bad_model_yaml_is_refused_field_by_field(change: dict[str, object], field: str, part: str, folder: Path) -> None:
    artifact.write(folder, MANIFEST)
    data = yaml.safe_load((folder / "model.yaml").read_text()) | change
    (folder / "model.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(FailedPrecondition) as caught:
        artifact.read(folder)
    assert caught.value.reason == "ARTIFACT_INVALID"
    found = {v.field.partition(" ")[2]: v.description for v in caught.value.violations}
    assert part in found[field]


def test_all_that_can_be_said_reads_back(folder: Path) -> None:
    full = dataclasses.replace(
        MANIFEST,
        format="safetensors",
        architecture=Architecture(name="two_tower.v2", config={"hidden": (256, 128), "width": 8, "rate": 0.5, "norm": True, "act": "relu"}),
        batching=Batching(row_splits="row_splits", max_rows=64, max_bytes=1 << 20, preferred_rows=(8, 64), buckets=(1, 8, 64)),
        execution=Execution(instances=64, kind="process", devices=(0, 3), autocast="bfloat16", timeout_ms=250.0, finite=False),
        labels={"score": "extra/vocab.txt"},
    )
    artifact.write(folder, full)
    assert dataclasses.replace(artifact.read(folder), files={}) == full


def test_every_problem_is_told_at_once_with_its_line(folder: Path) -> None:
    artifact.write(folder, MANIFEST)
    lines = (folder / "model.yaml").read_text().replace("format: torchscript", "format: joblib").splitlines()
    lines += ["execution: {instances: 99}", "labels: {nobody: x.txt}"]
    with pytest.raises(FailedPrecondition) as caught:
        artifact.parse("\n".join(lines).encode(), source="model.yaml")
    where = {v.field for v in caught.value.violations}
    format_line = next(number for number, line in enumerate(lines, 1) if line.startswith("format:"))
    assert where == {
        f"model.yaml:{format_line} format",
        f"model.yaml:{len(lines) - 1} execution.instances",
        f"model.yaml:{len(lines)} labels.nobody",
    }
    assert len(caught.value.violations) == 4


def test_wrong_types_do_not_hide_broken_rules(folder: Path) -> None:
    artifact.write(folder, MANIFEST)
    data = yaml.safe_load((folder / "model.yaml").read_text())
    data |= {"batching": {"max_rows": "many"}, "execution": {"instances": 99}, "entry": "other.pt", "surprise": 1}
    with pytest.raises(FailedPrecondition) as caught:
        artifact.parse(yaml.safe_dump(data).encode(), source="model.yaml")
    fields = [v.field.partition(" ")[2] for v in caught.value.violations]
    assert sorted(fields) == ["batching.max_rows", "entry", "execution.instances", "surprise"]


def test_a_signature_is_no_part_of_what_it_signs(folder: Path) -> None:
    digest = artifact.write(folder, MANIFEST)
    (folder / "model.yaml.sig").write_bytes(b"signature")
    assert artifact.write(folder, MANIFEST) == digest
    assert "model.yaml.sig" not in artifact.read(folder).files


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "expected one YAML document, found 0"),
        (b"a: 1\n---\nb: 2\n", "found 2"),
        (b"\xff", "not UTF-8"),
        (b"a: [", "not YAML"),
        (b"- 1", "expected a mapping"),
        (b"x" * (artifact.MAX_BYTES + 1), "at most 1048576"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_what_is_no_model_yaml_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(content)
    with pytest.raises(FailedPrecondition, match=part):
        artifact.read(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_without_a_crash(content: bytes) -> None:
    with pytest.raises(FailedPrecondition):
        artifact.parse(content, source="model.yaml")


def test_a_missing_artifact_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="there is no artifact at") as caught:
        artifact.read(tmp_path / "nothing")
    assert caught.value.reason == "ARTIFACT_MISSING"


def test_writing_refuses_an_entry_that_is_not_there(folder: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"'other\.pt' is not listed"):
        artifact.write(folder, dataclasses.replace(MANIFEST, entry="other.pt"))
    assert not (folder / "model.yaml").exists()


@pytest.mark.parametrize("name", ["extra", "extra/vocab.txt"])
def test_what_may_not_be_read_is_told_as_that_and_never_left_out(folder: Path, name: str) -> None:
    artifact.write(folder, MANIFEST)
    found = artifact.read(folder)
    before = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("this user, root, may read everything")
    for act in (lambda: artifact.write(folder, MANIFEST), lambda: artifact.verify_files(folder, found)):
        with pytest.raises(FailedPrecondition, match="may not be read by this process") as refused:
            act()
        assert refused.value.reason == "ARTIFACT_FORBIDDEN"
    (folder / name).chmod(before)
    (folder / "model.yaml").chmod(0)
    with pytest.raises(FailedPrecondition, match="may not be read by this process"):
        artifact.read(folder)


def test_what_cannot_be_deleted_is_told(folder: Path) -> None:
    artifact.remove(folder / "model.pt")
    artifact.remove(folder / "model.pt")
    with pytest.raises(FailedPrecondition, match="cannot be deleted") as refused:
        artifact.remove(folder / "extra")
    assert refused.value.reason == "ARTIFACT_UNWRITABLE"
