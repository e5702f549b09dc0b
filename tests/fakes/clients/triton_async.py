"""What the stock tritonclient's asyncio client sees of a worker; run with the worker's address, it prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

HEADERS = {"x-plait-service-token": "the-token"}
CALLS = 32


def ranking(n: float, width: int = 3) -> list[InferInput]:
    """Return what a DotRanker takes: its answer is [n, 2n]. Any other `width` is wrong."""
    arrays = {"user": np.array([[n, 0, 0]], np.float32), "item": np.array([[1] * width, [2] * width], np.float32)}
    inputs = []
    for name, array in arrays.items():
        made = InferInput(name, list(array.shape), "FP32")
        made.set_data_from_numpy(array)
        inputs.append(made)
    return inputs


async def requests() -> AsyncIterator[dict[str, Any]]:
    """Yield a stream's requests, of which one in four is wrong."""
    for n in range(CALLS):
        yield {"model_name": "ranker", "inputs": ranking(n, 4 if n % 4 == 3 else 3), "request_id": f"r{n}"}


async def main() -> None:
    """Call at once, then stream, and print what was seen."""
    async with InferenceServerClient(sys.argv[1]) as client:
        answers = await asyncio.gather(*(client.infer("ranker", ranking(n), headers=HEADERS) for n in range(CALLS)))
        seen: dict[str, Any] = {
            "live": await client.is_server_live(headers=HEADERS),
            "scores": [answer.as_numpy("score").tolist() for answer in answers],
        }
        try:
            await client.infer("nobody", ranking(1), headers=HEADERS)
        except InferenceServerException as error:
            seen["unknown"] = str(error.status())
        seen["streamed"] = []
        async for result, error in client.stream_infer(requests(), headers=HEADERS):
            if error is None:
                seen["streamed"].append([result.get_response().id, result.as_numpy("score").tolist()])
            else:
                seen["streamed"].append([str(error)[:80]])
        statistics = await client.get_inference_statistics("ranker", headers=HEADERS, as_json=True)
        seen["inference_count"] = statistics["model_stats"][0]["inference_count"]
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
