"""What the stock tritonclient is told of requests that are wrong; run with the worker's address, it prints JSON: [status, message] by name.

tritonclient checks some of it itself, so those requests are made with its stubs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2
from tritonclient.utils import InferenceServerException

HEADERS = {"x-plait-service-token": "the-token"}
RAW = np.arange(4, dtype=np.float32).tobytes()
HUGE = 2**62
Change = Callable[[Any], object]


def doubling(rows: Any = ((1, 2), (3, 4))) -> list[InferInput]:
    """Return what a Doubler takes."""
    array = np.array(rows, np.float32)
    made = InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return [made]


def message(change: Change, model: str = "cats", datatype: str = "FP32", raw: bytes = RAW) -> Any:
    """Return a request that is right but for what `change` does to it."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[2, 2])
    change(request)
    return request


def shaped(*shape: int) -> Change:
    """Return a change of the input's shape."""

    def change(request: Any) -> None:
        request.inputs[0].shape[:] = shape

    return change


def parameter(name: str, kind: str, value: Any, where: Callable[[Any], Any] = lambda request: request) -> Change:
    """Return a change that sets a parameter of the request, or of what `where` finds in it."""

    def change(request: Any) -> None:
        setattr(where(request).parameters[name], kind, value)

    return change


def output(**parameters: tuple[str, Any]) -> Change:
    """Return a change that asks for the output with these parameters."""

    def change(request: Any) -> None:
        asked = request.outputs.add(name="y")
        for name, (kind, value) in parameters.items():
            setattr(asked.parameters[name], kind, value)

    return change


WRONG: dict[str, Any] = {
    "dtype": lambda: message(lambda r: setattr(r.inputs[0], "datatype", "FP64")),
    "dtype that is none": lambda: message(lambda r: setattr(r.inputs[0], "datatype", "float32")),
    "dtype left out": lambda: message(lambda r: r.inputs[0].ClearField("datatype")),
    "shape": lambda: message(shaped(2, 3)),
    "dimensions": lambda: message(shaped(4)),
    "no shape": lambda: message(shaped()),
    "negative": lambda: message(shaped(-2, -2)),
    "variable": lambda: message(shaped(-1, 2)),
    "no rows": lambda: message(shaped(0, 2), raw=b""),
    "overflow": lambda: message(shaped(HUGE, 2)),
    "overflow to the right size": lambda: message(shaped(2**61 + 2, 2)),
    "raw too short": lambda: message(lambda r: None, raw=RAW[:-1]),
    "raw missing": lambda: message(lambda r: r.ClearField("raw_input_contents")),
    "raw twice": lambda: message(lambda r: r.raw_input_contents.append(RAW)),
    "raw and typed": lambda: message(lambda r: r.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])),
    "input twice": lambda: message(lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(RAW))),
    "input unknown": lambda: message(lambda r: setattr(r.inputs[0], "name", "z")),
    "no input": lambda: message(lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents"))),
    "output unknown": lambda: message(lambda r: r.outputs.add(name="none")),
    "output twice": lambda: message(lambda r: (r.outputs.add(name="y"), r.outputs.add(name="y"))),
    "no classes": lambda: message(output(classification=("int64_param", 0))),
    "classes by name": lambda: message(output(classification=("string_param", "two"))),
    "classes of bytes": lambda: message(output(classification=("int64_param", 1)), "echo-bytes", "BYTES", b"\x01\0\0\0a" * 4),
    "classes of bool": lambda: message(output(classification=("int64_param", 1)), "echo-bool", "BOOL", b"\0\1\0\1"),
    "bytes cut off": lambda: message(lambda r: None, "echo-bytes", "BYTES", b"\x01\0\0\0a" * 3 + b"\x09\0\0\0a"),
    "bytes too few": lambda: message(lambda r: None, "echo-bytes", "BYTES", b"\x01\0\0\0a" * 3),
    "bytes of 4 GiB": lambda: message(lambda r: None, "echo-bytes", "BYTES", b"\xff\xff\xff\xff" * 4),
    "bool of 2": lambda: message(lambda r: None, "echo-bool", "BOOL", b"\0\1\0\2"),
    "input in shared memory": lambda: message(
        lambda r: (
            parameter("shared_memory_region", "string_param", "r", lambda r: r.inputs[0])(r),
            parameter("shared_memory_byte_size", "int64_param", 16, lambda r: r.inputs[0])(r),
            r.ClearField("raw_input_contents"),
        )
    ),
    "output in shared memory": lambda: message(output(shared_memory_region=("string_param", "r"))),
    "sequence_start of another type": lambda: message(parameter("sequence_start", "int64_param", 1)),
    "sequence_id of another type": lambda: message(parameter("sequence_id", "bool_param", value=True)),
    "timeout below 0": lambda: message(parameter("timeout", "int64_param", -1)),
    "timeout as text": lambda: message(parameter("timeout", "string_param", "1s")),
    "priority below 0": lambda: message(parameter("priority", "int64_param", -1)),
    "priority without a value": lambda: message(lambda r: r.parameters["priority"]),
    "no model": lambda: message(lambda r: None, ""),
    "model unknown": lambda: message(lambda r: None, "n" * 3000),
    "version unknown": lambda: message(lambda r: setattr(r, "model_version", "9")),
    "version that is no number": lambda: message(lambda r: setattr(r, "model_version", "newest")),
}
RIGHT: dict[str, Any] = {
    "version -1": lambda: message(lambda r: setattr(r, "model_version", "-1")),
    "id of 100 kB": lambda: message(lambda r: setattr(r, "id", "i" * 100_000)),
    "unknown parameters": lambda: message(parameter("mine", "double_param", 0.5)),
    "sequence": lambda: message(parameter("sequence_id", "string_param", "s")),
    "priority": lambda: message(parameter("priority", "uint64_param", 2**64 - 1)),
    "timeout": lambda: message(parameter("timeout", "uint64_param", 2**64 - 1)),
    "more classes than there are": lambda: message(output(classification=("int64_param", 2**62))),
    "classes of integers": lambda: message(output(classification=("int64_param", 1)), "echo-int32", "INT32"),
}


def told(call: Callable[..., Any], *args: Any, **more: Any) -> list[str]:
    """Return status and message of a call, OK and its answer where it goes well."""
    try:
        return ["OK", str(call(*args, **more))]
    except InferenceServerException as error:
        return [str(error.status()).removeprefix("StatusCode."), str(error.message())]


def by_stub(client: InferenceServerClient, request: Any) -> list[str]:
    """Send a message as it is."""
    import grpc

    try:
        answer = client._client_stub.ModelInfer(request, metadata=tuple(HEADERS.items()), timeout=30)
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return ["OK", f"{answer.model_version} {answer.id[:10]} {list(answer.outputs[0].shape)} {answer.raw_output_contents[0]!r}"]


def main() -> None:
    """Do everything in order and print what was said."""
    with InferenceServerClient(sys.argv[1]) as client:
        seen: dict[str, Any] = {name: by_stub(client, make()) for name, make in {**WRONG, **RIGHT}.items()}
        calls: dict[str, tuple[Any, ...]] = {
            "metadata of none": (client.get_model_metadata, ""),
            "metadata of a version unknown": (client.get_model_metadata, "cats", "9"),
            "metadata": (client.get_model_metadata, "cats", "-1"),
            "config": (client.get_model_config, "cats", "-1"),
            "config of none": (client.get_model_config, ""),
            "ready of none": (client.is_model_ready, ""),
            "ready of a version unknown": (client.is_model_ready, "cats", "9"),
            "ready": (client.is_model_ready, "cats", "-1"),
            "statistics": (client.get_inference_statistics, "cats", "-1"),
            "statistics of a version alone": (client.get_inference_statistics, "", "1"),
            "statistics of a version unknown": (client.get_inference_statistics, "cats", "9"),
            "load of none": (client.load_model, ""),
            "unload of none": (client.unload_model, ""),
            "load with another config": (client.load_model, "cats"),
            "trace settings of none": (client.get_trace_settings, "nobody"),
            "shared memory": (client.get_system_shared_memory_status,),
        }
        for name, (call, *args) in calls.items():
            more = {"config": "{}"} if name == "load with another config" else {}
            seen[name] = told(call, *args, headers=HEADERS, **more)
        seen["no time"] = told(client.infer, "cats", doubling(), timeout=1, headers=HEADERS)
        seen["no classes of it"] = told(
            client.infer, "cats", doubling(), outputs=[InferRequestedOutput("none", class_count=1)], headers=HEADERS
        )
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main()
