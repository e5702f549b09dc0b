"""A version in Triton's terms: the batch dimension is there or it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes.worker_world import ITEM, RANK, SCORE, USER

from model_worker import model_config
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME
from plait.registry.artifact import ArtifactManifest
from plait.registry.records import Batching, Execution, TensorSpec, VersionPolicy


def described(manifest: ArtifactManifest, policy: VersionPolicy | None = None, *, joins: bool = True) -> pb.ModelConfig:
    limits = SimpleNamespace(max_rows=manifest.batching.max_rows, joins=joins)
    served: Any = SimpleNamespace(model="m", version="1", platform="pytorch_torchscript", manifest=manifest, limits=limits)
    config = pb.ModelConfig()
    model_config.describe(served, policy or VersionPolicy(), config)
    return config


def batched(**more: Any) -> ArtifactManifest:
    tensors = [TensorSpec(name="x", dtype="float32", shape=(-1, 80)), TensorSpec(name="y", dtype="int64", shape=(-1,))]
    return ArtifactManifest(name="m", format="torchscript", entry="model.pt", inputs=(tensors[0],), outputs=(tensors[1],), **more)


def test_a_batched_models_dims_leave_the_batch_out() -> None:
    batching = Batching(max_rows=64, preferred_rows=(8, 32), max_queue_delay_ms=1.5)
    config = described(batched(batching=batching, execution=Execution(instances=2), labels={"y": "labels.txt"}))
    assert (config.name, config.platform, config.backend, config.max_batch_size) == ("m", "pytorch_torchscript", "pytorch", 64)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", pb.TYPE_FP32, [80])]
    assert [(t.name, t.data_type, list(t.dims), t.label_filename) for t in config.output] == [("y", pb.TYPE_INT64, [], "labels.txt")]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1500
    assert config.instance_group[0].count == 2
    assert (config.default_model_filename, config.parameters["max_rows"].string_value) == ("model.pt", "64")
    assert not config.model_transaction_policy.decoupled


def test_a_model_with_a_tensor_per_request_has_no_batch_dimension() -> None:
    config = described(
        ArtifactManifest(
            name="m", format="onnx", entry="m.onnx", inputs=(USER, ITEM), outputs=(SCORE, RANK), batching=Batching(row_splits="splits")
        )
    )
    assert (config.max_batch_size, config.backend) == (0, "onnxruntime")
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[1, 3], [-1, 3], [-1], [-1]]
    assert config.parameters["row_splits"].string_value == "splits"


def test_a_model_that_joins_no_requests_has_no_dynamic_batching() -> None:
    assert described(batched()).HasField("dynamic_batching")
    assert not described(batched(), joins=False).HasField("dynamic_batching")


@pytest.mark.parametrize("dtype", BY_NAME)
def test_every_type_has_its_number(dtype: Any) -> None:
    manifest = ArtifactManifest(
        name="m", format="onnx", entry="e", inputs=(TensorSpec(name="x", dtype=dtype, shape=(-1,)),), outputs=(SCORE,)
    )
    found = pb.DataType.Name(described(manifest).input[0].data_type)
    assert found == ("TYPE_STRING" if dtype == "bytes" else f"TYPE_{BY_NAME[dtype].oip}")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (VersionPolicy(latest=3), pb.ModelVersionPolicy(latest={"num_versions": 3})),  # type: ignore[arg-type]
        (VersionPolicy(all=True), pb.ModelVersionPolicy(all={})),  # type: ignore[arg-type]
        (VersionPolicy(specific=("1", "7", "v8")), pb.ModelVersionPolicy(specific={"versions": [1, 7]})),  # type: ignore[arg-type]
    ],
)
def test_the_version_policy_is_told(policy: VersionPolicy, expected: pb.ModelVersionPolicy) -> None:
    assert described(batched(), policy).version_policy == expected
