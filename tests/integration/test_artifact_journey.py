"""What an ML engineer hands over, from a folder through a bucket to an answer: packed, signed and pushed by the command line, served by a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from tests.fakes.distribution import install
from tests.fakes.object_store import ObjectStore
from tests.fakes.worker_world import GatedLoader, infer_request, model, outputs, snapshot, worker_world
from typer.testing import CliRunner

from model_worker.artifacts import Fetcher
from model_worker.backends.architectures import BUILDERS, Config
from model_worker.served import Loader
from model_worker.settings import ArtifactSettings
from plait.api.inference.v2 import inference_pb2 as pb
from plait.cli.main import app
from plait.registry import artifact
from plait.registry.records import ModelVersion


def plait(*words: str) -> Any:
    """Run `plait artifact … --json` and return what it prints."""
    result = CliRunner().invoke(app, ["artifact", *words, "--json"], env={"TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fetching(fetcher: Fetcher) -> type[GatedLoader]:
    """Return a loader that fetches as a worker with these settings does."""

    class FetchingLoader(GatedLoader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            Loader.__init__(self, *args, fetcher)

    return FetchingLoader


def packed(*texts: bytes) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


async def test_a_signed_model_of_strings_goes_from_a_folder_through_a_bucket_to_an_answer(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    x, y = (helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("StringConcat", ["x", "x"], ["y"])], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    Path("m/model.onnx").write_bytes(made.SerializeToString())
    arrays = {"input.x": packed(b"a", b"", b"\x00"), "output.y": packed(b"aa", b"", b"\x00\x00")}
    np.savez("m/test.npz", **{name: np.frombuffer(array, np.uint8) for name, array in arrays.items()})
    plait("pack", "m", "--name", "echo", "--format", "onnx", "--entry", "model.onnx", "--input", "x:bytes:-1", "--output", "y:bytes:-1",
          "--self-test", "test.npz")  # fmt: skip
    key = plait("keygen")["public_key"]
    plait("sign", "m", "--key", "signing.pem")
    pushed = plait("push", "m", "s3://models/echo/1", "--allow-http")
    settings = ArtifactSettings(cache=tmp_path / "cache", allow_http=True, require_signature=True, trusted_keys=(key,))
    version = ModelVersion(version="1", artifact=pushed["location"], digest=pushed["digest"])
    async with worker_world(snapshot(model("echo", version)), loader_type=fetching(Fetcher(settings, None))) as w:
        request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[packed(b"ab", "é".encode())])
        request.inputs.add(name="x", datatype="BYTES", shape=[2])
        assert (await w.infer(request)).raw_output_contents[0] == packed(b"abab", "éé".encode())


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_weights_are_served_by_an_architecture_of_another_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = """
        from model_worker.backends.architectures import MLP, Config

        class Twice(MLP):
            def __init__(self, config: Config) -> None:
                super().__init__((config.size("in"), 1), config.activation())

            def forward(self, x):
                return super().forward(x) * 2
    """
    install(tmp_path / "site", "acme-models", "plait.architectures", {"twice": "acme_twice:Twice"}, acme_twice=source)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")  # what the instance's own process finds it by
    (tmp_path / "m").mkdir()
    save_file({"layers.0.weight": torch.ones(1, 3), "layers.0.bias": torch.zeros(1)}, tmp_path / "m" / "w.safetensors")
    np.savez(tmp_path / "m" / "test.npz", **{"input.x": np.ones((2, 3), np.float32), "output.y": np.full((2, 1), 6, np.float32)})
    plait("pack", str(tmp_path / "m"), "--name", "twice", "--format", "safetensors", "--entry", "w.safetensors", "--architecture", "twice",
          "--config", "in=3", "--instance-kind", kind, "--input", "x:float32:-1,3", "--output", "y:float32:-1,1",
          "--self-test", "test.npz")  # fmt: skip
    version = ModelVersion(version="1", artifact=str(tmp_path / "m"), digest=artifact.digest(tmp_path / "m"))
    async with worker_world(snapshot(model("twice", version))) as w:
        answer = await w.infer(infer_request("twice", {"x": np.array([[1, 2, 3]], np.float32)}))
        assert outputs(answer) == {"y": [[12.0]]}


async def test_dlrm_is_served_from_weights_alone_and_a_wrong_self_test_keeps_it_out(tmp_path: Path) -> None:
    config = {"dense": 3, "tables": (50, 20), "dim": 4, "bottom": (8,), "top": (8,)}
    module = BUILDERS["dlrm"](Config(config)).eval()
    dense, sparse = torch.randn(6, 3), torch.randint(20, (6, 2))
    with torch.inference_mode():
        expected = module(dense, sparse).numpy()
    versions = []
    for name, wrong in (("right", 0.0), ("wrong", 0.1)):
        folder = tmp_path / name
        folder.mkdir()
        save_file(module.state_dict(), folder / "w.safetensors")
        np.savez(folder / "test.npz", **{"input.d": dense.numpy(), "input.s": sparse.numpy(), "output.score": expected + np.float32(wrong)})
        arguments = [f"--config={key}={list(value) if isinstance(value, tuple) else value}" for key, value in config.items()]
        made = plait("pack", str(folder), "--name", "dlrm", "--format", "safetensors", "--entry", "w.safetensors", "--architecture", "dlrm",
                     *arguments, "--input", "d:float32:-1,3", "--input", "s:int64:-1,2", "--output", "score:float32:-1",
                     "--self-test", "test.npz")  # fmt: skip
        versions.append(ModelVersion(version="1", artifact=str(folder), digest=made["digest"]))
    right, wrong_one = (model(name, version) for name, version in zip(("right", "wrong"), versions, strict=True))
    async with worker_world(snapshot(right, wrong_one)) as w:
        assert w.states() == {"right/1": "READY", "wrong/1": "FAILED"}
        answer = await w.infer(infer_request("right", {"d": dense.numpy()[:2], "s": sparse.numpy()[:2]}))
        np.testing.assert_allclose(outputs(answer)["score"], expected[:2], rtol=1e-5)
