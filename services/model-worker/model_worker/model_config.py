"""A served version in the terms of Triton's ModelConfig, which load generators and generic clients read before they send anything.

https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
Triton's batch dimension exists only where every tensor begins with it; a model with tensors per request (see `ragged`) has none, and then
`max_batch_size` is 0 and dims are whole shapes.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from model_worker.served import Served
from model_worker.tensors import has_batch_dimension
from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME
from plait.registry.records import TensorSpec, VersionPolicy

_BACKENDS: Final = MappingProxyType({"torchscript": "pytorch", "torch_export": "pytorch", "aotinductor": "pytorch", "onnx": "onnxruntime"})
_MAX_INT32: Final = 2**31 - 1


def describe(served: Served, policy: VersionPolicy, config: pb.ModelConfig) -> None:
    """Fill the message."""
    manifest = served.manifest
    batched = has_batch_dimension(manifest.signature)
    config.name = served.model
    config.platform = served.platform
    config.backend = _BACKENDS.get(manifest.format, manifest.format)
    config.default_model_filename = manifest.entry
    config.max_batch_size = min(served.limits.max_rows, _MAX_INT32) if batched else 0
    config.model_transaction_policy.decoupled = False
    _describe_policy(policy, config.version_policy)
    config.instance_group.add(name=f"{served.model}_0", count=manifest.execution.instances, kind=pb.ModelInstanceGroup.KIND_AUTO)
    for spec in manifest.inputs:
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=_dims(spec, batched))
    for spec in manifest.outputs:
        output = config.output.add(name=spec.name, data_type=_data_type(spec), dims=_dims(spec, batched))
        output.label_filename = manifest.labels.get(spec.name, "")
    if served.limits.joins:
        config.dynamic_batching.preferred_batch_size.extend(manifest.batching.preferred_rows)
        config.dynamic_batching.max_queue_delay_microseconds = int(manifest.batching.max_queue_delay_ms * 1e3)
    config.parameters["max_rows"].string_value = str(served.limits.max_rows)
    if manifest.batching.row_splits:
        config.parameters["row_splits"].string_value = manifest.batching.row_splits


def _describe_policy(policy: VersionPolicy, message: Any) -> None:
    if policy.all:
        message.all.SetInParent()
    elif policy.specific:
        message.specific.versions.extend([int(v) for v in policy.specific if v.isdecimal()])  # the protocol has numbers only
    else:
        message.latest.num_versions = policy.latest


def _data_type(spec: TensorSpec) -> Any:
    name = "STRING" if spec.dtype == "bytes" else BY_NAME[spec.dtype].oip
    return pb.DataType.Value(f"TYPE_{name}")


def _dims(spec: TensorSpec, batched: bool) -> tuple[int, ...]:
    return spec.shape[1:] if batched else spec.shape
