"""What KServe's gRPC client sees of a worker or a router; run by an interpreter that has kserve, with the address, it prints JSON.

With "control" behind the address it also unloads and loads the model. The client has no call for that, so those go through the stubs it was
generated with, which have the model's name in field 1.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

HEADERS = (("x-plait-service-token", "the-token"),)
ARRAYS = {"user": np.array([[1, 2, 3]], np.float32), "item": np.array([[1, 0, 0], [0, 1, 1]], np.float32)}


def ranking(model: str = "ranker", *, raw: bool) -> InferRequest:
    """Return what a DotRanker takes, in raw or typed contents."""
    inputs = []
    for name, array in ARRAYS.items():
        made = InferInput(name=name, shape=list(array.shape), datatype="FP32", data=None if raw else array.ravel().tolist())
        if raw:
            made.set_data_from_numpy(array, binary_data=True)
        inputs.append(made)
    return InferRequest(model_name=model, infer_inputs=inputs, request_id="r-7")


async def score(client: InferenceGRPCClient, *, raw: bool) -> Any:
    """Return the ranker's scores."""
    answer = await client.infer(ranking(raw=raw), headers=HEADERS)
    return next(output for output in answer.outputs if output.name == "score").as_numpy().tolist()


async def is_ready(client: InferenceGRPCClient) -> bool:
    """Say whether the ranker is; a model that is not there is not."""
    try:
        return bool(await client.is_model_ready("ranker", headers=HEADERS))
    except grpc.RpcError:
        return False


async def main() -> None:
    """Do everything in order and print what was seen."""
    async with InferenceGRPCClient(sys.argv[1]) as client:
        stub = client._client_stub
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="ranker"), metadata=HEADERS)
        seen: dict[str, Any] = {
            "health": [await client.is_server_live(headers=HEADERS), await client.is_server_ready(headers=HEADERS), await is_ready(client)],
            "metadata": [metadata.name, list(metadata.versions), [list(t.shape) for t in metadata.inputs]],
            "score": await score(client, raw=False),
            "score raw": await score(client, raw=True),
        }
        try:
            await client.infer(ranking("nobody", raw=True), headers=HEADERS)
        except grpc.RpcError as error:
            seen["unknown"] = error.code().name
        if sys.argv[2:] == ["control"]:
            await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="ranker"), metadata=HEADERS)
            while await is_ready(client):
                pass
            seen["unloaded"] = await is_ready(client)
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ranker"), metadata=HEADERS)
            while not await is_ready(client):
                pass
            seen["loaded"] = await score(client, raw=True)
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
