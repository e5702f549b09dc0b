"""Nothing of an artifact is used before it was found to be what was published."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.fakes.object_store import ObjectStore

from model_worker import artifacts, backends, proof
from model_worker.artifacts import Fetcher
from model_worker.backends import LoadOptions
from model_worker.ragged import Layout
from model_worker.settings import ArtifactSettings
from plait.errors import FailedPrecondition, InvalidArgument, Unavailable
from plait.registry import artifact, signing
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


# --- with a cache


def fetcher(tmp_path: Path, root: Path | None = None, **settings: Any) -> Fetcher:
    return Fetcher(ArtifactSettings(**{"cache": tmp_path / "cache", "retries": 0} | settings), root)


def refusal(fetcher: Fetcher, version: ModelVersion) -> str:
    with pytest.raises((FailedPrecondition, InvalidArgument, Unavailable)) as refused:
        fetcher.fetch(version)
    return refused.value.reason


def push(store: ObjectStore, version: ModelVersion, address: str) -> ModelVersion:
    for file in Path(version.artifact).iterdir():
        store.objects[f"{address.partition('://')[2]}/{file.name}"] = file.read_bytes()
    return dataclasses.replace(version, artifact=address)


@pytest.mark.parametrize("address", ["s3://models/m/1", "gs://models/m/1"])
def test_an_artifact_comes_from_an_object_store_and_stays_while_it_is_held(tmp_path: Path, object_store: ObjectStore, address: str) -> None:
    version = push(object_store, publish(tmp_path / "m", GOOD), address)
    with_http = fetcher(tmp_path, allow_http=True)
    found = with_http.fetch(version)
    assert found.folder.parent == tmp_path / "cache"
    assert found.read("model.pt") == b"weights"
    assert found.sample.outputs is not None
    object_store.objects.clear()
    again = with_http.fetch(version)
    assert again.folder == found.folder
    for each in (found, again, again):
        each.close()
    assert refusal(fetcher(tmp_path / "other"), version) == "ARTIFACT_STORE_MISCONFIGURED"


def test_a_folder_is_used_from_its_copy(tmp_path: Path) -> None:
    version = publish(tmp_path / "m", GOOD)
    found = fetcher(tmp_path).fetch(version)
    (tmp_path / "m" / "model.pt").write_bytes(b"weightz")
    assert found.read("model.pt") == b"weights"
    (found.folder / "model.pt").write_bytes(b"weightz")
    with pytest.raises(FailedPrecondition, match="changed while it was read"):
        found.read("model.pt")
    found.close()


def test_only_what_the_settings_allow_is_fetched(tmp_path: Path, object_store: ObjectStore) -> None:
    folder = publish(tmp_path / "m", GOOD)
    remote = push(object_store, folder, "s3://models/m/1")
    assert refusal(fetcher(tmp_path, schemes=("gs", "file")), remote) == "ARTIFACT_SOURCE_FORBIDDEN"
    assert refusal(fetcher(tmp_path, schemes=("s3",)), folder) == "ARTIFACT_SOURCE_FORBIDDEN"
    assert refusal(fetcher(tmp_path, buckets=("other",), allow_http=True), remote) == "ARTIFACT_SOURCE_FORBIDDEN"
    assert refusal(fetcher(tmp_path, root=tmp_path / "root"), folder) == "ARTIFACT_OUTSIDE_ROOT"
    assert refusal(fetcher(tmp_path), dataclasses.replace(folder, artifact="ftp://models/m")) == "ARTIFACT_LOCATION"
    assert not object_store.requests
    fetcher(tmp_path, buckets=("models",), allow_http=True).fetch(remote).close()
    fetcher(tmp_path, root=tmp_path).fetch(dataclasses.replace(folder, artifact="m")).close()


def test_a_signature_is_required_where_the_settings_say_so(tmp_path: Path) -> None:
    pem, public = signing.generate()
    version, strict = publish(tmp_path / "m", GOOD), fetcher(tmp_path, require_signature=True, trusted_keys=(str(public),))
    assert refusal(strict, version) == "SIGNATURE_MISSING"
    signature, _ = signing.sign((tmp_path / "m" / "model.yaml").read_bytes(), pem)
    (tmp_path / "m" / "model.yaml.sig").write_bytes(signature)
    strict.fetch(version).close()


def test_an_artifact_whose_self_test_cannot_be_used_is_let_go(tmp_path: Path) -> None:
    small = fetcher(tmp_path, max_bytes=1024 * 1024)
    spoilt = publish(tmp_path / "m", b"0" * 800_000)
    assert refusal(small, spoilt) == "SELF_TEST_UNUSABLE"
    small.fetch(publish(tmp_path / "n", {**GOOD, "input.item": np.ones((30_000, 3), np.int64)})).close()


def test_the_cache_is_the_users_own_unless_a_setting_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifacts.default_cache({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me/plait/artifacts")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifacts.default_cache({}) == tmp_path / ".cache" / "plait" / "artifacts"
    assert artifacts.default_cache({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "plait" / "artifacts"


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


def text_model(folder: Path, given: Any, expected: Any) -> ModelVersion:
    """Publish a graph that repeats each of its strings, with a self test of these arrays."""
    folder.mkdir()
    x, y = (helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("StringConcat", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "test.npz", **{"input.x": given, "output.y": expected})
    specs = [TensorSpec(name=name, dtype="bytes", shape=(-1,)) for name in "xy"]
    manifest = ArtifactManifest(
        name="t", format="onnx", entry="model.onnx", inputs=(specs[0],), outputs=(specs[1],), self_test=SelfTest(file="test.npz")
    )
    return ModelVersion(version="1", artifact=str(folder), digest=artifact.write(folder, manifest))


def packed(*elements: bytes) -> Any:
    return np.frombuffer(b"".join(len(e).to_bytes(4, "little") + e for e in elements), np.uint8)


def prove(version: ModelVersion) -> None:
    made = artifacts.fetch(version, None)
    layout = Layout.of(made.manifest.signature, made.manifest.batching)
    proven = proof.prove(backends.load(made, LoadOptions()), layout, made, 64)
    assert (proven.joins, proven.splits) == (True, True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([b"ab", "é".encode()]), np.array([b"abab", "éé".encode()])),
        (np.array(["ab", "é"]), np.array(["abab", "éé"])),
        (packed(b"ab", b"", b"a\x00"), packed(b"abab", b"", b"a\x00a\x00")),
        (packed(b"ab", b"c"), np.array([b"abab", b"cc"])),
    ],
    ids=["bytes", "text", "packed", "both"],
)
def test_a_model_of_strings_is_proven_by_its_self_test(tmp_path: Path, given: Any, expected: Any) -> None:
    prove(text_model(tmp_path / "m", given, expected))


def test_a_model_of_strings_that_answers_another_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        prove(text_model(tmp_path / "m", packed(b"a", b"b"), packed(b"aa", b"bb\x00")))
    assert refused.value.reason == "SELF_TEST_FAILED"


def test_packed_bytes_take_the_shape_beside_them(tmp_path: Path) -> None:
    spec = TensorSpec(name="x", dtype="bytes", shape=(-1, 2))
    np.savez(tmp_path / "test.npz", **{"input.x": packed(b"a", b"b\x00", b"", b"d"), "shape.input.x": np.int64([2, 2])})
    with np.load(tmp_path / "test.npz") as arrays:
        assert artifacts._member(arrays, "input.x", spec).tolist() == [[b"a", b"b\x00"], [b"", b"d"]]


def test_a_bfloat16_self_test_is_read_as_such(tmp_path: Path) -> None:
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    np.savez(tmp_path / "test.npz", **{"input.x": array})
    with np.load(tmp_path / "test.npz") as arrays:
        found = artifacts._member(arrays, "input.x", TensorSpec(name="x", dtype="bfloat16", shape=(-1,)))
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == array.tolist()


def test_no_input_is_made_up_that_would_take_all_memory(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="publish a self test"):
        artifacts._made_up(TensorSpec(name="x", dtype="float32", shape=(-1, 1 << 40)))


def test_bytes_are_made_up_as_bytes() -> None:
    made = artifacts._made_up(TensorSpec(name="x", dtype="bytes", shape=(-1,)))
    assert made.tolist() == [b"", b"", b"", b""]
