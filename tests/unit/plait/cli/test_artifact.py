"""`plait artifact`, from a folder of files to a signed artifact in a bucket, against a store that obstore really speaks to."""

from __future__ import annotations

import json
import os
import pickle
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.fakes.object_store import ObjectStore
from typer.testing import Result

from plait.registry import artifact, signing

Plait = Callable[..., Result]
PACK = ("artifact", "pack", "m", "--name", "ranker", "--format", "onnx", "--entry", "model.onnx")
TENSORS = ("--input", "x:float32:-1,80", "--output", "score:float32:-1")


@pytest.fixture
def plait(plait: Plait) -> Plait:
    """The command line, with the files of a model in the folder m."""
    Path("m").mkdir()
    Path("m/model.onnx").write_bytes(b"weights")
    Path("m/labels.txt").write_bytes(b"no\nyes\n")
    return plait


def good(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_from_a_folder_to_a_signed_artifact_in_a_bucket(plait: Plait, object_store: ObjectStore) -> None:
    assert "m/model.yaml written: 2 file(s)" in good(plait(*PACK, *TENSORS, "--labels", "score=labels.txt"))
    made = json.loads(good(plait("artifact", "keygen", "--json")))
    assert stat.S_IMODE(Path(made["private_key_file"]).stat().st_mode) == 0o600
    assert Path(made["public_key_file"]).read_text() == made["public_key"] + "\n"
    signed = json.loads(good(plait("artifact", "sign", "m", "--key", "signing.pem", "--json")))
    assert signed == {"file": "m/model.yaml.sig", "digest": artifact.digest("m"), "key_id": made["key_id"]}
    pushed = json.loads(good(plait("artifact", "push", "m", "s3://models/ranker/7", "--allow-http", "--json")))
    assert (pushed["location"], pushed["digest"], pushed["signed_by"]) == ("s3://models/ranker/7", signed["digest"], made["key_id"])
    for key in ("signing.pub", made["public_key"]):
        verified = good(plait("artifact", "verify", "s3://models/ranker/7", "--public-key", key, env={"PLAIT_ALLOW_HTTP": "1"}))
        assert "s3://models/ranker/7 is whole: 2 file(s), 14 bytes" in verified
        assert f"signed by trusted key {made['key_id']}" in verified
    described = good(plait("artifact", "describe", "s3://models/ranker/7", "--allow-http"))
    for part in ("ranker (onnx)", "[any, 80]", "labels of score", "(not checked: give --public-key to verify)", signed["digest"]):
        assert part in described
    assert "holds ranker" in good(plait("artifact", "push", "m", "s3://models/ranker/7", "--allow-http"))


def test_everything_that_is_missing_is_said_at_once(plait: Plait) -> None:
    result = plait("artifact", "pack", "m", "--input", "x", "--input", "x:float32:n", "--config", "depth")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[ARTIFACT_INCOMPLETE]" in result.stderr
    for part in (
        "--name: ",
        "--format: ",
        "pickle is never loaded",
        "--entry: which file is loaded? here are labels.txt, model.onnx",
        "--output: ",
    ):
        assert part in result.stderr
    assert "--input: expected NAME:DTYPE:SHAPE[:request], found 'x'" in result.stderr
    assert "--input: expected sizes with commas between them, found 'n'" in result.stderr
    assert "--config: expected NAME=VALUE, found 'depth'" in result.stderr
    assert not Path("m/model.yaml").exists()


def test_what_model_yaml_may_not_say_is_told_by_field(plait: Plait) -> None:
    result = plait(*PACK, "--format", "safetensors", "--name", "a\x1b[31m", "--instances", "99", *TENSORS)
    assert result.exit_code == 1
    for part in ("architecture: is required", "name: expected 1 to 255 characters", "execution.instances: expected 1 to 64"):
        assert part in result.stderr
    assert not Path("m/model.yaml").exists()


def test_every_flag_reaches_model_yaml(plait: Plait) -> None:
    arrays = {"input.user": np.ones((1, 41)), "input.item": np.ones((2, 64)), "output.score": np.ones(2)}
    np.savez("m/test.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    flags = (
        *(
            "--format",
            "safetensors",
            "--architecture",
            "mlp",
            "--config",
            "hidden=[256, 128]",
            "--config",
            "act=relu",
            "--config",
            "rate=0.5",
        ),
        *(
            "--input",
            "user:float32:1,41:request",
            "--input",
            "item:float32:-1,64",
            "--output",
            "score:float32:-1",
            "--row-splits",
            "splits",
        ),
        *("--feature-set", "home", "--max-rows", "64000", "--max-queue-delay-ms", "5", "--bucket", "64", "--bucket", "8"),
        *("--instances", "2", "--instance-kind", "process", "--self-test", "test.npz", "--tolerance", "0.01"),
    )
    good(plait(*PACK, *flags))
    found = artifact.read("m")
    assert found.architecture is not None
    assert dict(found.architecture.config) == {"hidden": (256, 128), "act": "relu", "rate": 0.5}
    assert [(t.name, t.per, t.shape) for t in found.inputs] == [("user", "request", (1, 41)), ("item", "row", (-1, 64))]
    batching = found.batching
    assert (batching.row_splits, batching.max_rows, batching.max_queue_rows, batching.buckets) == ("splits", 64000, 64000, (8, 64))
    assert (found.feature_set, batching.max_queue_delay_ms, found.execution.instances, found.execution.kind) == ("home", 5.0, 2, "process")
    assert found.self_test == artifact.SelfTest(file="test.npz", tolerance=0.01)


def test_files_that_are_not_there_are_told_with_those_that_are(plait: Plait) -> None:
    Path("m/.hidden").write_bytes(b"")
    flags = ("--entry", "../m/model.onnx", "--self-test", "gone.npz", "--labels", "score=.hidden")
    result = plait(*PACK, *TENSORS, *flags)
    assert "[ARTIFACT_INCOMPLETE]" in result.stderr
    for flag, name in (("--entry", "../m/model.onnx"), ("--self-test", "gone.npz"), ("--labels", ".hidden")):
        assert f"{flag}: there is no file '{name}' that can be published; here are labels.txt, model.onnx" in result.stderr


PICKLES: dict[str, bytes] = {
    "model.pkl": b"anything",
    "weights": pickle.dumps([1], protocol=2),
    "model.pt": pickle.dumps({"w": [1]}),
    "half.JobLib": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_before_anything_else_is_asked_for(plait: Plait, name: str) -> None:
    Path("m", name).write_bytes(PICKLES[name])
    result = plait("artifact", "pack", "m", "--entry", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{name} is a pickle: pickle is never loaded" in result.stderr
    for part in ("[ARTIFACT_PICKLE]", "torch.export.save", "safetensors.torch.save_file"):
        assert part in result.stderr
    assert "--input" not in result.stderr


@pytest.mark.parametrize("format_", ["pickle", "pkl", "joblib", "Pickle"])
def test_pickle_is_no_format(plait: Plait, format_: str) -> None:
    result = plait("artifact", "pack", "m", "--format", format_)
    assert "[ARTIFACT_PICKLE]" in result.stderr
    assert "--input" not in result.stderr


def test_a_folder_of_pickles_needs_no_entry_to_be_refused(plait: Plait) -> None:
    Path("p").mkdir()
    Path("p/a.pkl").write_bytes(b"")
    assert "nothing but pickle in p (a.pkl)" in plait("artifact", "pack", "p").stderr
    Path("p/model.onnx").write_bytes(b"weights")
    assert "here are a.pkl, model.onnx" in plait("artifact", "pack", "p").stderr


def test_what_cannot_be_published_is_named_and_nothing_is_left_out_in_silence(plait: Plait) -> None:
    Path("outside").write_bytes(b"secret")
    for name, target in {"out": "../outside", "nothing": "gone", "around": "around", "folder": "."}.items():
        Path("m", name).symlink_to(target)
    Path("m/inside").symlink_to("labels.txt")
    Path(os.fsdecode(b"m/caf\xe9.txt")).write_bytes(b"")
    os.mkfifo("m/fifo")
    result = plait(*PACK, *TENSORS)
    assert (result.exit_code, result.stdout) == (1, "")
    for part in (
        "out: is a link that is not followed",
        "folder: is a link that is not followed",
        "nothing: is a link to nothing",
        "around: is a link to nothing",
        "caf\\udce9.txt: its name is not UTF-8",
        "fifo: is neither a file nor a folder",
    ):
        assert part in result.stderr
    assert "inside" not in result.stderr
    assert not Path("m/model.yaml").exists()


def test_a_self_test_no_worker_could_run_is_refused_when_it_is_packed(plait: Plait) -> None:
    np.savez("m/test.npz", **{"input.x": np.ones((2, 80))})
    result = plait(*PACK, *TENSORS, "--self-test", "test.npz")
    assert "[SELF_TEST_UNUSABLE]" in result.stderr
    assert "input.x is <f8 [2, 80], the signature says float32 [-1, 80]" in result.stderr
    assert "it lacks 'output.score'" in result.stderr
    assert not Path("m/model.yaml").exists()


def test_a_model_of_strings_is_packed_verified_and_described(plait: Plait) -> None:
    text = np.frombuffer(b"".join(len(e).to_bytes(4, "little") + e for e in (b"a", b"bc\x00")), np.uint8)
    np.savez("m/test.npz", **{"input.text": text, "output.score": np.ones(2, np.float32)})
    flags = ("--input", "text:bytes:-1", "--output", "score:float32:-1", "--self-test", "test.npz")
    good(plait(*PACK, *flags))
    assert "is whole: 3 file(s)" in good(plait("artifact", "verify", "m"))
    assert "self test, tolerance 0.0001" in good(plait("artifact", "describe", "m"))
    np.savez("m/test.npz", **{"input.text": text[:-1], "output.score": np.ones(2, np.float32)})
    artifact.write("m", artifact.read("m"))
    assert "[SELF_TEST_UNUSABLE]" in plait("artifact", "verify", "m").stderr


def test_every_file_that_differs_is_named(plait: Plait) -> None:
    good(plait(*PACK, *TENSORS))
    Path("m/model.onnx").write_bytes(b"weightz")
    Path("m/labels.txt").unlink()
    message = plait("artifact", "verify", "m").stderr
    assert "pack it again with --replace" in message
    assert "labels.txt: it is missing" in message
    assert "model.onnx: expected sha256" in message


def test_a_model_yaml_that_cannot_be_written_is_told(plait: Plait) -> None:
    with file_size_limit(10):
        result = plait(*PACK, *TENSORS)
    assert "[ARTIFACT_UNWRITABLE]" in result.stderr
    assert sorted(f.name for f in Path("m").iterdir()) == ["labels.txt", "model.onnx"]
    good(plait(*PACK, *TENSORS))
    good(plait("artifact", "keygen"))
    with file_size_limit(10):
        assert "[ARTIFACT_UNWRITABLE]" in plait("artifact", "sign", "m", "--key", "signing.pem").stderr
        assert "[KEY_UNWRITABLE]" in plait("artifact", "keygen", "--out", "half.pem").stderr
    assert sorted(f.name for f in Path("m").iterdir()) == ["labels.txt", "model.onnx", "model.yaml"]
    assert not Path("half.pem").exists()


@contextmanager
def file_size_limit(most_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond that; a write then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_yaml_is_written_over_only_when_asked_and_takes_its_signature_along(plait: Plait) -> None:
    made = json.loads(good(plait(*PACK, *TENSORS, "--json")))
    assert (made["digest"], made["files"]) == (artifact.digest("m"), ["labels.txt", "model.onnx"])
    good(plait("artifact", "keygen"))
    good(plait("artifact", "sign", "m", "--key", "signing.pem"))
    assert "[ARTIFACT_EXISTS]" in plait(*PACK, *TENSORS).stderr
    result = plait(*PACK, *TENSORS, "--replace", "--max-rows", "8")
    assert "sign again" in result.stderr
    assert not Path("m/model.yaml.sig").exists()
    assert artifact.digest("m") != made["digest"]


def test_verify_fails_where_it_must(plait: Plait) -> None:
    good(plait(*PACK, *TENSORS))
    good(plait("artifact", "keygen"))
    assert "[SIGNATURE_MISSING]" in plait("artifact", "verify", "m", "--public-key", "signing.pub").stderr
    good(plait("artifact", "sign", "m", "--key", "signing.pem"))
    other = str(signing.generate()[1])
    assert "[SIGNATURE_UNTRUSTED]" in plait("artifact", "verify", "m", "--public-key", other).stderr
    assert json.loads(good(plait("artifact", "verify", "m", "--json")))["signature_checked"] is False
    Path("m/model.onnx").write_bytes(b"weightz")
    result = plait("artifact", "verify", "m")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[ARTIFACT_CORRUPT]" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("push", "m", "n"), "[ARTIFACT_LOCATION]"),
        (("push", "m", "s3://models/m"), "[ARTIFACT_MISSING]"),
        (("verify", "nowhere"), "there is no artifact at"),
        (("verify", "m", "--public-key", "nowhere.pub"), "[PUBLIC_KEY_INVALID]"),
        (("describe", "s3://models/m"), "[ARTIFACT_STORE_MISCONFIGURED]"),
        (("describe", "s3://models/m", "--allow-http"), "[ARTIFACT_MISSING]"),
        (("keygen", "--out", "nowhere/key.pem"), "[KEY_UNWRITABLE]"),
        (("keygen", "--out", "key.pub"), "[KEY_NAME]"),
        (("verify", "m/model.onnx"), "m/model.onnx is a file: name the artifact's folder"),
        (("verify", "m", "--public-key", "private.pem"), "this is a private key"),
        (("verify", "m", "--public-key", "ed25519:AAAA"), "[PUBLIC_KEY_INVALID]"),
        (("describe", "a\0b"), "[ARTIFACT_LOCATION]"),
        (("describe", "around"), "[ARTIFACT_"),
    ],
)
def test_what_cannot_be_done_is_told(plait: Plait, object_store: ObjectStore, words: tuple[str, ...], says: str) -> None:
    Path("around").symlink_to("around")
    Path("private.pem").write_bytes(signing.generate()[0])
    result = plait("artifact", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr


def test_a_broken_signature_is_told_before_anything_is_printed_or_sent(plait: Plait, object_store: ObjectStore) -> None:
    good(plait(*PACK, *TENSORS))
    Path("m/model.yaml.sig").write_bytes(b"nonsense")
    for words in (("describe", "m"), ("describe", "m", "--json"), ("push", "m", "s3://models/m", "--allow-http")):
        result = plait("artifact", *words)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "[SIGNATURE_INVALID]" in result.stderr
    assert object_store.objects == {}


def test_a_key_is_never_written_over(plait: Plait) -> None:
    good(plait("artifact", "keygen"))
    before = Path("signing.pem").read_bytes()
    assert "[KEY_EXISTS]" in plait("artifact", "keygen").stderr
    Path("signing.pem").rename("other.pem")
    assert "[KEY_EXISTS]" in plait("artifact", "keygen").stderr
    assert not Path("signing.pem").exists()  # no private key without its public half
    Path("other.pem").rename("signing.pem")
    assert Path("signing.pem").read_bytes() == before


def test_only_an_artifact_is_signed(plait: Plait) -> None:
    good(plait("artifact", "keygen"))
    assert "[ARTIFACT_MISSING]" in plait("artifact", "sign", "m", "--key", "signing.pem").stderr
    good(plait(*PACK, *TENSORS))
    refused = plait("artifact", "sign", "m", "--key", "signing.pub").stderr
    assert "[PRIVATE_KEY_INVALID]" in refused
    assert "this is a public one" in refused


def test_the_group_explains_itself(plait: Plait) -> None:
    shown = good(plait("artifact", "--help"))
    for command in ("pack", "sign", "verify", "describe", "push", "keygen"):
        assert command in shown
        assert "Example:" in good(plait("artifact", command, "--help"))
