"""What the stock tritonclient sees of a worker, asked one call after the other; run with the worker's address, it prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

HEADERS = {"x-plait-service-token": "the-token"}
TYPES = {
    "bool": ("BOOL", np.bool_), "int8": ("INT8", np.int8), "int16": ("INT16", np.int16), "int32": ("INT32", np.int32),
    "int64": ("INT64", np.int64), "uint8": ("UINT8", np.uint8), "uint16": ("UINT16", np.uint16), "uint32": ("UINT32", np.uint32),
    "uint64": ("UINT64", np.uint64), "float16": ("FP16", np.float16), "bfloat16": ("BF16", ml_dtypes.bfloat16), "float32": ("FP32", np.float32),
    "float64": ("FP64", np.float64), "bytes": ("BYTES", np.object_),
}  # fmt: skip


def tensor(name: str, datatype: str, array: Any) -> InferInput:
    """Return an input that holds the array."""
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def ranking() -> list[InferInput]:
    """Return what a DotRanker takes."""
    return [tensor("user", "FP32", np.array([[1, 2, 3]], np.float32)), tensor("item", "FP32", np.array([[1, 0, 0], [0, 1, 1]], np.float32))]


def refused(call: Callable[..., Any], *args: Any, **more: Any) -> list[str]:
    """Return status and message of a call that fails."""
    try:
        call(*args, headers=HEADERS, **more)
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def echoed(client: InferenceServerClient, dtype: str) -> bool:
    """Say whether every value of an element type comes back as it was sent, raw."""
    datatype, kind = TYPES[dtype]
    values = [[b"", b"\x00a"], ["ü".encode(), b"x" * 300]] if dtype == "bytes" else [[0, 1], [1, 0 if dtype == "bool" else 100]]
    array = np.array(values, kind)
    result = client.infer(f"echo-{dtype}", [tensor("x", datatype, array)], headers=HEADERS)
    found = result.as_numpy("y")
    return bool(found is not None and found.shape == array.shape and found.tolist() == array.tolist())


def look(client: InferenceServerClient) -> dict[str, Any]:
    """Ask about the server and its models."""
    return {
        "health": [
            client.is_server_live(headers=HEADERS),
            client.is_server_ready(headers=HEADERS),
            client.is_model_ready("ranker", headers=HEADERS),
            client.is_model_ready("ranker", "1", headers=HEADERS),
        ],
        "server": client.get_server_metadata(HEADERS, as_json=True),
        "ranker": client.get_model_metadata("ranker", headers=HEADERS, as_json=True),
        "ranker config": client.get_model_config("ranker", headers=HEADERS, as_json=True)["config"],
        "cats config": client.get_model_config("cats", headers=HEADERS, as_json=True)["config"],
        "log settings": client.get_log_settings(HEADERS, as_json=True)["settings"],
        "trace settings": client.get_trace_settings(headers=HEADERS, as_json=True)["settings"],
    }


def infer(client: InferenceServerClient) -> dict[str, Any]:
    """Ask for what models compute."""
    answer = client.infer(
        "ranker", ranking(), request_id="r-7", sequence_id=5, sequence_start=True, parameters={"mine": 1}, headers=HEADERS
    )
    chosen = client.infer("ranker", ranking(), outputs=[InferRequestedOutput("rank")], priority=1, timeout=20_000_000, headers=HEADERS)
    pixels = [tensor("x", "FP32", np.array([[1, 2], [4, 3]], np.float32))]
    classes = client.infer("cats", pixels, outputs=[InferRequestedOutput("y", class_count=1)], headers=HEADERS)
    return {
        "answer": [answer.get_response().id, answer.as_numpy("score").tolist(), answer.as_numpy("rank").tolist()],
        "chosen": [chosen.as_numpy("score") is None, chosen.as_numpy("rank").tolist()],
        "classes": [text.decode() for text in classes.as_numpy("y").ravel()],
        "echoed": {dtype: echoed(client, dtype) for dtype in TYPES},
    }


def errors(client: InferenceServerClient) -> dict[str, Any]:
    """Ask for what cannot be had."""
    wrong = [ranking()[0], tensor("item", "FP32", np.zeros((2, 4), np.float32))]
    return {
        "unknown model": refused(client.infer, "nobody", ranking()),
        "unknown version": refused(client.infer, "ranker", ranking(), model_version="9"),
        "wrong shape": refused(client.infer, "ranker", wrong),
        "missing input": refused(client.infer, "ranker", ranking()[:1]),
        "unknown output": refused(client.infer, "ranker", ranking(), outputs=[InferRequestedOutput("none")]),
        "no time": refused(client.infer, "ranker", ranking(), timeout=1),
        "config": refused(client.get_model_config, "nobody"),
        "statistics": refused(client.get_inference_statistics, "nobody"),
        "shared memory": refused(client.get_system_shared_memory_status),
        "cuda memory": refused(client.register_cuda_shared_memory, "r", b"aGFuZGxl", 0, 64),
        "log control": refused(client.update_log_settings, {"log_verbose_level": 1}),
        "trace control": refused(client.update_trace_settings, settings={"trace_rate": "1"}),
        "load": refused(client.load_model, "nobody"),
    }


def repository(client: InferenceServerClient) -> dict[str, Any]:
    """Unload a model and load it again."""
    before = client.get_model_repository_index(HEADERS, as_json=True)["models"]
    client.unload_model("ranker", headers=HEADERS)
    while client.get_model_repository_index(HEADERS, as_json=True)["models"] == before:
        pass
    gone = refused(client.infer, "ranker", ranking())
    client.load_model("ranker", headers=HEADERS)
    while not ready(client, "ranker"):
        pass
    return {
        "index": [m for m in before if m["name"] == "ranker"],
        "unloaded": gone,
        "loaded": client.infer("ranker", ranking(), headers=HEADERS).as_numpy("score").tolist(),
    }


def ready(client: InferenceServerClient, model: str) -> bool:
    """Say whether a model is ready; one that is not there is not."""
    try:
        return bool(client.is_model_ready(model, headers=HEADERS))
    except InferenceServerException:
        return False


def main() -> None:
    """Do everything in order and print what was seen."""
    with InferenceServerClient(sys.argv[1]) as client:
        seen: dict[str, Any] = {"look": look(client), "infer": infer(client), "errors": errors(client), "repository": repository(client)}
        seen["statistics"] = client.get_inference_statistics("ranker", headers=HEADERS, as_json=True)["model_stats"]
        seen["all statistics"] = [s["name"] for s in client.get_inference_statistics(headers=HEADERS, as_json=True)["model_stats"]]
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main()
