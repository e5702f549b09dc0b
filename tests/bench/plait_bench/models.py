"""The networks that are served, made from fixed seeds, so that every server of a run computes the same and answers can be compared."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest, SelfTest
from plait.registry.records import Batching, Model, ModelVersion, TensorSpec

Rows = npt.NDArray[np.float32]
_TEST_ROWS: Final = 8


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them: [rows, first width] → [rows]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return one score per row."""
        scores: Tensor = self.layers(x).squeeze(1)
        return scores


@dataclass(frozen=True)
class Network:
    """One network by its layer widths, the last of which is 1."""

    name: str
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.widths[0]

    @cached_property
    def module(self) -> Mlp:
        """The same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(len(self.widths) * 1000 + self.width)
            return Mlp(self.widths).eval()

    def rows(self, count: int) -> Rows:
        """Return the same `count` rows every time."""
        return np.random.default_rng(count).standard_normal((count, self.width), dtype=np.float32)

    def scores(self, rows: Rows) -> Rows:
        """Return what a server must answer."""
        with torch.inference_mode():
            scores: Rows = self.module(torch.from_numpy(rows)).numpy()
        return scores

    def save_torchscript(self, path: Path) -> None:
        """Write it the way every server of the comparison can load."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script: torch.jit.ScriptModule = torch.jit.script(self.module)
            script.save(str(path))

    def save_onnx(self, path: Path) -> None:
        """Write the same weights as ONNX. Raises ImportError where `onnx` is not installed."""
        from onnx import TensorProto, helper, numpy_helper, save

        nodes, weights, at = [], [], "x"
        linear = [layer for layer in self.module.layers if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(linear):
            for what, tensor in (("w", layer.weight), ("b", layer.bias)):
                weights.append(numpy_helper.from_array(tensor.detach().numpy(), f"{what}{number}"))
            nodes.append(helper.make_node("Gemm", [at, f"w{number}", f"b{number}"], [f"y{number}"], transB=1))
            at = f"y{number}"
            if layer is not linear[-1]:
                nodes.append(helper.make_node("Relu", [at], [f"r{number}"]))
                at = f"r{number}"
        weights.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
        nodes.append(helper.make_node("Squeeze", [at, "axes"], ["score"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", self.width])
        score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["rows"])
        graph = helper.make_graph(nodes, self.name, [x], [score], weights)
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))


MLP: Final = Network("mlp", (80, 256, 128, 1))
HEAVY: Final = Network("heavy", (1024, 2048, 2048, 1))


def publish(network: Network, name: str, folder: Path, *, format_: Any = "torchscript", **batching: Any) -> Model:
    """Publish an artifact in `folder` and return the model as the registry would hold it."""
    folder.mkdir(parents=True)
    entry = "model.onnx" if format_ == "onnx" else "model.pt"
    (network.save_onnx if format_ == "onnx" else network.save_torchscript)(folder / entry)
    rows = network.rows(_TEST_ROWS)
    arrays: dict[str, Any] = {"input.x": rows, "output.score": network.scores(rows)}
    np.savez(folder / "self_test.npz", **arrays)
    manifest = ArtifactManifest(
        name=name,
        format=format_,
        entry=entry,
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, network.width)),),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
        batching=Batching(**batching),
        self_test=SelfTest(file="self_test.npz", tolerance=1e-3),
    )
    version = ModelVersion(version="1", artifact=str(folder), digest=artifact.write(folder, manifest))
    return Model(name=name, versions=(version,))
