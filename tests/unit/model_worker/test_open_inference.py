"""The Open Inference Protocol's messages as upstream publishes them: what clients in the field were compiled against.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/open_inference_grpc.proto
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from tests.fakes.describe_protos import describe

from plait.api.inference.v2 import inference_pb2 as pb

_TYPES = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}
_PARAMETERS = "map<string, InferParameter>"
_REPOSITORY_PARAMETERS = "map<string, ModelRepositoryParameter>"

CONTRACT: dict[str, dict[int, str]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {1: "bool live"},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {1: "bool ready"},
    "ModelReadyRequest": {1: "string name", 2: "string version"},
    "ModelReadyResponse": {1: "bool ready"},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {1: "string name", 2: "string version", 3: "repeated string extensions"},
    "ModelMetadataRequest": {1: "string name", 2: "string version"},
    "ModelMetadataResponse": {
        1: "string name",
        2: "repeated string versions",
        3: "string platform",
        4: "repeated ModelMetadataResponse.TensorMetadata inputs",
        5: "repeated ModelMetadataResponse.TensorMetadata outputs",
        6: "map<string, string> properties",
    },
    "ModelMetadataResponse.TensorMetadata": {1: "string name", 2: "string datatype", 3: "repeated int64 shape"},
    "ModelInferRequest": {
        1: "string model_name",
        2: "string model_version",
        3: "string id",
        4: f"{_PARAMETERS} parameters",
        5: "repeated ModelInferRequest.InferInputTensor inputs",
        6: "repeated ModelInferRequest.InferRequestedOutputTensor outputs",
        7: "repeated bytes raw_input_contents",
    },
    "ModelInferRequest.InferInputTensor": {
        1: "string name",
        2: "string datatype",
        3: "repeated int64 shape",
        4: f"{_PARAMETERS} parameters",
        5: "InferTensorContents contents",
    },
    "ModelInferRequest.InferRequestedOutputTensor": {1: "string name", 2: f"{_PARAMETERS} parameters"},
    "ModelInferResponse": {
        1: "string model_name",
        2: "string model_version",
        3: "string id",
        4: f"{_PARAMETERS} parameters",
        5: "repeated ModelInferResponse.InferOutputTensor outputs",
        6: "repeated bytes raw_output_contents",
    },
    "ModelInferResponse.InferOutputTensor": {
        1: "string name",
        2: "string datatype",
        3: "repeated int64 shape",
        4: f"{_PARAMETERS} parameters",
        5: "InferTensorContents contents",
    },
    "InferParameter": {
        1: "parameter_choice: bool bool_param",
        2: "parameter_choice: int64 int64_param",
        3: "parameter_choice: string string_param",
        4: "parameter_choice: double double_param",
        5: "parameter_choice: uint64 uint64_param",
    },
    "InferTensorContents": {
        1: "repeated bool bool_contents",
        2: "repeated int32 int_contents",
        3: "repeated int64 int64_contents",
        4: "repeated uint32 uint_contents",
        5: "repeated uint64 uint64_contents",
        6: "repeated float fp32_contents",
        7: "repeated double fp64_contents",
        8: "repeated bytes bytes_contents",
    },
    "ModelRepositoryParameter": {
        1: "parameter_choice: bool bool_param",
        2: "parameter_choice: int64 int64_param",
        3: "parameter_choice: string string_param",
        4: "parameter_choice: bytes bytes_param",
    },
    "RepositoryIndexRequest": {1: "string repository_name", 2: "bool ready"},
    "RepositoryIndexResponse": {1: "repeated RepositoryIndexResponse.ModelIndex models"},
    "RepositoryIndexResponse.ModelIndex": {1: "string name", 2: "string version", 3: "string state", 4: "string reason"},
    "RepositoryModelLoadRequest": {1: "string repository_name", 2: "string model_name", 3: f"{_REPOSITORY_PARAMETERS} parameters"},
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": {1: "string repository_name", 2: "string model_name", 3: f"{_REPOSITORY_PARAMETERS} parameters"},
    "RepositoryModelUnloadResponse": {},
}
SPECIFICATION_ONLY = ("inference.ModelMetadataResponse.properties", "inference.ModelMetadataResponse.PropertiesEntry")


def _type(field: Any) -> str:
    if field.message_type is None:
        return _TYPES[field.type]
    entry = field.message_type
    if entry.GetOptions().map_entry:
        return f"map<{_type(entry.fields_by_name['key'])}, {_type(entry.fields_by_name['value'])}>"
    return str(entry.full_name.removeprefix("inference."))


def _described(message: Any) -> dict[int, str]:
    found = {}
    for field in message.fields:
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        repeated = "repeated " if field.is_repeated and not is_map else ""
        choice = f"{field.containing_oneof.name}: " if field.containing_oneof is not None else ""
        found[field.number] = f"{choice}{repeated}{_type(field)} {field.name}"
    return found


def _messages(container: Any) -> dict[str, Any]:
    found = {}
    for message in container:
        if not message.GetOptions().map_entry:
            found[message.full_name.removeprefix("inference.")] = message
            found |= _messages(message.nested_types)
    return found


def test_the_package_is_upstreams() -> None:
    assert pb.DESCRIPTOR.package == "inference"


@pytest.mark.parametrize("name", CONTRACT)
def test_every_field_has_upstreams_number_type_and_name(name: str) -> None:
    assert _described(_messages(pb.DESCRIPTOR.message_types_by_name.values())[name]) == CONTRACT[name]


@pytest.fixture(scope="module")
def tritons() -> dict[str, Any]:
    """What the stock client was generated from, described by a process of its own: its messages have the names of ours."""
    script = Path(__file__).parents[2] / "fakes" / "describe_protos.py"
    modules = ("tritonclient.grpc.service_pb2", "tritonclient.grpc.model_config_pb2")
    done = subprocess.run([sys.executable, script, *modules], capture_output=True, text=True, check=True, timeout=100)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_message_and_field_is_tritons_too_by_number_type_and_label(tritons: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(describe(pb.DESCRIPTOR)))
    wrong = [
        f"{message}.{field}: {ours['messages'][message][field]} is not {tritons['messages'].get(message, {}).get(field)}"
        for message, fields in ours["messages"].items()
        for field in fields
        if not message.startswith(SPECIFICATION_ONLY) and f"{message}.{field}" not in SPECIFICATION_ONLY
        if ours["messages"][message][field] != tritons["messages"].get(message, {}).get(field)
    ]
    assert wrong == []
    assert set(ours["messages"]) >= {f"inference.{name}" for name in CONTRACT}
    assert {name: tritons["enums"].get(name) for name in ours["enums"]} == ours["enums"]


def test_every_method_is_tritons_and_none_is_missing(tritons: dict[str, Any]) -> None:
    assert json.loads(json.dumps(describe(pb.DESCRIPTOR)))["methods"] == tritons["methods"]
