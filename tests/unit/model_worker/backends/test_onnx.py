"""ONNX graphs on the real onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tests.fakes.artifacts import artifact_of, load

from model_worker import backends
from model_worker.backends import LoadOptions
from model_worker.backends import onnx as backend
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry.records import Batching, Signature, TensorSpec


def signature(dtype: Any = "float32", given: str = "x", answered: str = "y", size: int = -1) -> Signature:
    return Signature(
        inputs=(TensorSpec(name=given, dtype=dtype, shape=(size,)),), outputs=(TensorSpec(name=answered, dtype=dtype, shape=(size,)),)
    )


def graph(type_: int = TensorProto.FLOAT, size: int | str = "n", **more: Any) -> bytes:
    x, y = (helper.make_tensor_value_info(name, type_, [size]) for name in "xy")
    return model([helper.make_node("Identity", ["x"], ["y"])], [x], [y], **more)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], **more: Any) -> bytes:
    made = helper.make_graph(nodes, "g", inputs, outputs, **more)
    content: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    return content


TYPES = {
    "bool": TensorProto.BOOL, "int8": TensorProto.INT8, "int16": TensorProto.INT16, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64,
    "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_every_type_goes_through_unchanged(name: str, rows: int) -> None:
    given = (np.arange(rows) % 2 * 1.5).astype(BY_NAME[name].numpy)
    given.flags.writeable = False
    [found] = load(graph(TYPES[name]), "onnx", signature(name))([given])
    assert found.dtype == given.dtype
    np.testing.assert_array_equal(found, given)


def test_what_does_not_lie_in_one_piece_is_read_rightly() -> None:
    for name in ("float32", "bfloat16"):
        given = np.arange(6).astype(BY_NAME[name].numpy)[::2]
        [found] = load(graph(TYPES[name]), "onnx", signature(name))([given])
        np.testing.assert_array_equal(found, given)


def test_a_bfloat16_answer_outlives_the_model() -> None:
    loaded = load(graph(TensorProto.BFLOAT16), "onnx", signature("bfloat16"))
    [found] = loaded([np.full(1000, 3, ml_dtypes.bfloat16)])
    loaded.close()
    del loaded
    assert (found == 3).all()


def test_bytes_are_the_strings_of_the_graph() -> None:
    given = np.array([b"ab", "é".encode(), b"", b"a\x00b"], np.object_)
    [found] = load(graph(TensorProto.STRING), "onnx", signature("bytes"))([given])
    assert found.tolist() == given.tolist()


def test_bytes_that_are_no_text_are_refused() -> None:
    loaded = load(graph(TensorProto.STRING), "onnx", signature("bytes"))
    with pytest.raises(InvalidArgument) as refused:
        loaded([np.array([b"\xff\xfe"], np.object_)])
    assert refused.value.reason == "BYTES_NOT_UTF8"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (signature(given="z"), "no input 'z'"),
        (signature(answered="z"), "no output 'z'"),
        (signature("int64"), "tensor(float)"),
        (signature(size=4), None),
    ],
)
def test_the_signature_must_be_the_graphs(said: Signature, words: str | None) -> None:
    if words is None:  # a graph may take more than is promised
        assert load(graph(), "onnx", said).platform == "onnxruntime_onnx"
        return
    with pytest.raises(FailedPrecondition) as refused:
        load(graph(), "onnx", said)
    assert refused.value.reason == "ARTIFACT_INVALID"
    assert words in refused.value.message


def test_a_fixed_dimension_is_no_variable_one() -> None:
    with pytest.raises(FailedPrecondition, match="dynamic dimension"):
        load(graph(size=4), "onnx", signature())


def test_row_splits_are_passed_by_name(tmp_path: Path) -> None:
    infos = [
        helper.make_tensor_value_info("splits", TensorProto.INT64, ["k"]),  # in another order than the signature's
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT64, ["k"]), helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"])]
    nodes = [helper.make_node("Identity", ["splits"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    said = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1,), per="request"),),
        outputs=(TensorSpec(name="z", dtype="float32", shape=(-1,)), TensorSpec(name="y", dtype="int64", shape=(-1,))),
    )
    made = artifact_of(tmp_path, model(nodes, infos, outputs), "onnx", said, batching=Batching(row_splits="splits"))
    found = backends.load(made, LoadOptions())([np.float32([7]), np.int64([0, 2])])
    assert [o.tolist() for o in found] == [[7], [0, 2]]


def external(location: str) -> TensorProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    return weight


def weighted(location: str) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [x], [y], initializer=[external(location)])


@pytest.mark.parametrize("location", ["w.bin", "deep/w.bin"])
def test_external_data_inside_the_folder(tmp_path: Path, location: str) -> None:
    file = tmp_path / location
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    content = weighted(location)
    loaded = backends.load(artifact_of(tmp_path, content, "onnx", signature(size=4)), LoadOptions())
    assert loaded([np.ones(4, np.float32)])[0].tolist() == [1, 2, 3, 4]
    assert loaded.memory_bytes == len(content) + 16


@pytest.mark.parametrize("where", ["absolute", "above", "working directory", "hidden"])
def test_external_data_from_anywhere_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    folder, elsewhere = tmp_path / "artifact", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
    for file in (folder / ".w.bin", elsewhere / "w.bin"):
        file.write_bytes(bytes(16))
    monkeypatch.chdir(elsewhere)
    location = {"absolute": str(elsewhere / "w.bin"), "above": "../elsewhere/w.bin", "working directory": "w.bin", "hidden": ".w.bin"}
    made = artifact_of(folder, weighted(location[where]), "onnx", signature(size=4))
    with pytest.raises(FailedPrecondition, match="external data inside") as refused:
        backends.load(made, LoadOptions())
    assert refused.value.reason == "ARTIFACT_INVALID"


def test_external_data_of_a_branch_is_not_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    monkeypatch.chdir(tmp_path)
    o, x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "oxy")
    always = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    branch = helper.make_graph([helper.make_node("Add", ["x", "w"], ["o"])], "b", [], [o], initializer=[external("w.bin")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(FailedPrecondition, match="external data inside"):
        load(model([node], [x], [y], initializer=[always]), "onnx", signature(size=4))


def test_operators_of_other_libraries_are_refused() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    with pytest.raises(FailedPrecondition) as refused:
        load(model([helper.make_node("Mine", ["x"], ["y"], domain="my.ops")], [x], [y]), "onnx", signature())
    assert refused.value.reason == "ARTIFACT_INVALID"


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(content, "onnx", signature())
    assert refused.value.reason == "ARTIFACT_INVALID"


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(graph(), "onnx", signature(), device="cuda:0")
    assert refused.value.reason == "DEVICE_UNAVAILABLE"


def test_autocast_is_not_ignored_in_silence() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        load(graph(), "onnx", signature(), autocast="bfloat16")
    assert refused.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("Failed to allocate memory for requested buffer of size 9", True),
        ("Gather", False),
    ],
)
def test_errors_that_mean_too_little_memory(message: str, expected: bool) -> None:
    assert backend.is_out_of_memory(message) is expected


def test_a_worker_with_onnx_models_alone_never_loads_torch(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(graph())
    onnx.checker.check_model(str(tmp_path / "graph.onnx"))
    code = """
import sys
from pathlib import Path
import numpy as np
from model_worker import backends, proof, served
from model_worker.artifacts import Artifact, Sample
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import TensorSpec
folder = Path(sys.argv[1])
specs = [(TensorSpec(name=n, dtype="float32", shape=(-1,)),) for n in "xy"]
artifact.write(folder, ArtifactManifest(name="m", format="onnx", entry="graph.onnx", inputs=specs[0], outputs=specs[1]))
assert "onnxruntime" not in sys.modules
made = Artifact(manifest=artifact.read(folder), folder=folder, sample=Sample(inputs=(), outputs=None, tolerance=0.0))
assert backends.load(made, backends.LoadOptions())([np.ones(2, np.float32)])[0].tolist() == [1, 1]
assert "torch" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr


NEEDS_CUDA = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="needs a GPU and onnxruntime-gpu: this onnxruntime computes on the CPU only",
)


@NEEDS_CUDA
def test_a_gpu_answers_as_the_cpu_does() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], np.random.default_rng(1).normal(size=8).tolist())
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 4), ("y", 2)))
    content = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [x], [y], initializer=[weight])
    said = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 4)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 2)),)
    )
    there, here = load(content, "onnx", said, device="cuda:0"), load(content, "onnx", said)
    for rows in (1, 7, 1000):
        given = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
        np.testing.assert_allclose(there([given])[0], here([given])[0], rtol=1e-3, atol=1e-3)  # ONNX Runtime lets CUDA use TF32


@NEEDS_CUDA
def test_bfloat16_comes_back_from_a_gpu_too() -> None:
    [found] = load(graph(TensorProto.BFLOAT16), "onnx", signature("bfloat16"), device="cuda:0")([np.full(10, 3, ml_dtypes.bfloat16)])
    assert found.tolist() == [3] * 10
