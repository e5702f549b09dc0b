"""What the stock tritonclient sees of a router, where a route and a model are asked for alike; run with the router's address, it prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from triton_sync import HEADERS, TYPES, echoed, ranking, refused, tensor
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput


def look(client: InferenceServerClient) -> dict[str, Any]:
    """Ask about the server, a model and a route."""
    return {
        "health": [
            client.is_server_live(headers=HEADERS),
            client.is_server_ready(headers=HEADERS),
            *(client.is_model_ready(name, headers=HEADERS) for name in ("ranker", "home")),
            client.is_model_ready("ranker", "1", headers=HEADERS),
        ],
        "server": client.get_server_metadata(HEADERS, as_json=True),
        "metadata": [client.get_model_metadata(name, headers=HEADERS, as_json=True) for name in ("ranker", "home")],
        "config": client.get_model_config("cats", headers=HEADERS, as_json=True)["config"],
        "index": client.get_model_repository_index(HEADERS, as_json=True)["models"],
    }


def infer(client: InferenceServerClient) -> dict[str, Any]:
    """Ask a model and a route for what they compute."""
    answers = {
        name: client.infer(name, ranking(), request_id="r-7", parameters={"mine": 1}, headers=HEADERS) for name in ("ranker", "home")
    }
    old = client.infer("ranker", ranking(), model_version="1", headers=HEADERS)
    pixels = [tensor("x", "FP32", np.array([[1, 2], [4, 3]], np.float32))]
    classes = client.infer("cats", pixels, outputs=[InferRequestedOutput("y", class_count=1)], headers=HEADERS)
    return {
        "answers": {
            name: [answer.get_response().id, answer.get_response().model_version, answer.as_numpy("score").tolist()]
            for name, answer in answers.items()
        },
        "old": old.as_numpy("score").tolist(),
        "classes": [text.decode() for text in classes.as_numpy("y").ravel()],
        "echoed": {dtype: echoed(client, dtype) for dtype in TYPES},
        "large": large(client),
    }


def large(client: InferenceServerClient) -> bool:
    """Say whether 400 kB come back as they were sent."""
    array = np.array([[b"x" * 100_000, b""], [b"y" * 300_000, b"z"]], np.object_)
    result = client.infer("echo-bytes", [tensor("x", "BYTES", array)], headers=HEADERS)
    return bool((result.as_numpy("y") == array).all())


def errors(client: InferenceServerClient) -> dict[str, Any]:
    """Ask for what cannot be had."""
    wrong = [ranking()[0], tensor("item", "FP32", np.zeros((2, 4), np.float32))]
    return {
        "unknown model": refused(client.infer, "nobody", ranking()),
        "unknown version": refused(client.infer, "ranker", ranking(), model_version="9"),
        "unknown version of a route": refused(client.infer, "home", ranking(), model_version="1"),
        "wrong shape": refused(client.infer, "home", wrong),
        "missing input": refused(client.infer, "ranker", ranking()[:1]),
        "no time": refused(client.infer, "ranker", ranking(), timeout=1),
        "metadata": refused(client.get_model_metadata, "nobody"),
        "config": refused(client.get_model_config, "nobody"),
        "statistics": refused(client.get_inference_statistics, "nobody"),
        "ready": refused(client.is_model_ready, "nobody"),
        "shared memory": refused(client.get_system_shared_memory_status),
        "log settings": refused(client.get_log_settings),
        "load": refused(client.load_model, "ranker"),
        "unload": refused(client.unload_model, "ranker"),
    }


def main() -> None:
    """Do everything in order and print what was seen."""
    with InferenceServerClient(sys.argv[1]) as client:
        seen: dict[str, Any] = {"look": look(client), "infer": infer(client), "errors": errors(client)}
        seen["statistics"] = client.get_inference_statistics("ranker", headers=HEADERS, as_json=True)["model_stats"]
        seen["statistics of a route"] = client.get_inference_statistics("home", headers=HEADERS, as_json=True)["model_stats"]
        seen["all statistics"] = [s["name"] for s in client.get_inference_statistics(headers=HEADERS, as_json=True)["model_stats"]]
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main()
