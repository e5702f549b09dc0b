"""Open Inference Protocol messages for the load generator, and the scores in the answers."""

from __future__ import annotations

from typing import Final

import numpy as np

from plait.api.inference.v2 import inference_pb2 as pb
from plait_bench.http2 import GrpcRequest
from plait_bench.models import Rows

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"


def infer_request(model: str, rows: Rows) -> pb.ModelInferRequest:
    """Return a request with one raw tensor "x"."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request


def infer_call(model: str, rows: Rows, *, token: str = "", timeout_ms: int = 0) -> GrpcRequest:
    """Return the same as a call; `token` is plait's service token."""
    metadata = (("x-plait-service-token", token),) if token else ()
    return GrpcRequest(method=METHOD, message=infer_request(model, rows).SerializeToString(), metadata=metadata, timeout_ms=timeout_ms)


def scores_of(message: bytes) -> Rows:
    """Return the first output of a ModelInferResponse."""
    response = pb.ModelInferResponse.FromString(message)
    if response.raw_output_contents:
        return np.frombuffer(response.raw_output_contents[0], np.float32)
    return np.array(response.outputs[0].contents.fp32_contents, np.float32)
