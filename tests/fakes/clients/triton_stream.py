"""What the stock tritonclient's stream sees of a worker, callbacks and all; run with the worker's address, it prints JSON."""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

HEADERS = {"x-plait-service-token": "the-token"}
CALLS = 64
WRONG = (7, 20, 21)
COSTS = ("queue_us", "compute_us", "batch_rows")


def doubling(n: float, width: int) -> list[InferInput]:
    """Return what a Doubler takes; any width but 2 is wrong."""
    made = InferInput("x", [1, width], "FP32")
    made.set_data_from_numpy(np.full((1, width), n, np.float32))
    return [made]


def described(result: Any, error: Any) -> dict[str, Any]:
    """Return what a callback was given."""
    if error is not None:
        return {"error": str(error.message())[:80]}
    response = result.get_response()
    parameters = response.parameters
    return {
        "id": response.id,
        "version": response.model_version,
        "y": result.as_numpy("y").tolist(),
        "final": parameters["triton_final_response"].bool_param,
        "cost": {name: parameters[name].int64_param for name in COSTS if name in parameters},
    }


def main() -> None:
    """Send everything before the first answer is looked at, then read them all."""
    got: queue.Queue[Any] = queue.Queue()
    with InferenceServerClient(sys.argv[1]) as client:
        client.start_stream(callback=lambda result, error: got.put((result, error)), headers=HEADERS)
        for n in range(CALLS):
            client.async_stream_infer(
                "cats", doubling(n, 3 if n in WRONG else 2), request_id=f"r{n}", enable_empty_final_response=n % 2 == 0
            )
        seen: list[Any] = [described(*got.get(timeout=60)) for _ in range(CALLS)]
        client.async_stream_infer("nobody", doubling(1, 2))
        seen.append(described(*got.get(timeout=60)))
        client.stop_stream()
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main()
