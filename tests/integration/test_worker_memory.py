"""What the ledger lets in can be loaded: the real peak of loading each format, in a process of its own, is within what is claimed for it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from tests.fakes.worker_world import scripted
from torch import nn

from model_worker import memory
from model_worker.backends import architectures
from plait.registry import artifact
from plait.registry.artifact import Architecture, ArtifactManifest, Format
from plait.registry.records import TensorSpec

WIDTH = 2048
LAYERS = 5  # 84 MB: what does not grow with a model is small beside that
LOAD = """
import json, sys
from pathlib import Path
from model_worker import artifacts, backends
from plait.registry.records import ModelVersion

def figure(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

library, folder, digest = sys.argv[1:]
__import__("model_worker.backends." + library)
artifact = artifacts.fetch(ModelVersion(version="1", artifact=folder, digest=digest), None)
before = figure("VmRSS")
model = backends.load(artifact, backends.LoadOptions())
model.prepare_thread()
model(artifact.sample.inputs)
print(json.dumps([figure("VmHWM") - before, model.memory_bytes]))
"""


def described(folder: Path, format_: Format, entry: str, architecture: Architecture | None = None) -> None:
    x, y = (TensorSpec(name=name, dtype="float32", shape=(-1, WIDTH)) for name in "xy")
    artifact.write(folder, ArtifactManifest(name="m", format=format_, entry=entry, architecture=architecture, inputs=(x,), outputs=(y,)))


def torchscript(folder: Path) -> None:
    """Publish linear layers as TorchScript."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    scripted(nn.Sequential(*layers)).save(str(folder / "model.pt"))
    described(folder, "torchscript", "model.pt")


def safetensors(folder: Path) -> None:
    """Publish them as the weights of an architecture."""
    architecture = Architecture(name="mlp", config={"in": WIDTH, "hidden": (WIDTH,) * (LAYERS - 1), "out": WIDTH})
    module = architectures.BUILDERS["mlp"](architectures.Config(architecture.config))
    save_file(module.state_dict(), str(folder / "model.safetensors"))
    described(folder, "safetensors", "model.safetensors", architecture)


def onnx_transposed(folder: Path) -> None:
    """Publish them as an ONNX graph that transposes its weights, which onnxruntime does once, while it loads: both copies are in memory."""
    weights = [numpy_helper.from_array(np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32), f"w{n}") for n in range(LAYERS)]
    names = ["x", *(f"h{n}" for n in range(1, LAYERS)), "y"]
    nodes = []
    for n, (source, result) in enumerate(itertools.pairwise(names)):
        nodes.append(helper.make_node("Transpose", [f"w{n}"], [f"t{n}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [source, f"t{n}"], [result]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "m", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx"))
    described(folder, "onnx", "model.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
@pytest.mark.parametrize(("publish", "library"), [(torchscript, "torch"), (safetensors, "torch"), (onnx_transposed, "onnx")])
def test_loading_takes_no_more_than_is_claimed(publish: Callable[[Path], None], library: str, tmp_path: Path) -> None:
    publish(tmp_path)
    command = [sys.executable, "-c", LOAD, library, str(tmp_path), artifact.digest(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    peak, weights = json.loads(done.stdout)
    assert weights <= peak <= memory.estimate(artifact.read(tmp_path), "cpu", 1).size_bytes
