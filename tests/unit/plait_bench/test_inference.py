"""Protocol messages, raw and typed."""

from __future__ import annotations

import numpy as np

from plait.api.inference.v2 import inference_pb2 as pb
from plait_bench.inference import METHOD, infer_call, scores_of

ROWS = np.array([[1, 2], [3, 4]], np.float32)


def test_a_call_holds_the_rows_and_the_token() -> None:
    call = infer_call("mlp", ROWS, token="secret", timeout_ms=7)
    request = pb.ModelInferRequest.FromString(call.message)
    assert (request.model_name, request.inputs[0].name, list(request.inputs[0].shape)) == ("mlp", "x", [2, 2])
    assert np.array_equal(np.frombuffer(request.raw_input_contents[0], np.float32).reshape(2, 2), ROWS)
    assert (call.method, call.metadata, call.timeout_ms) == (METHOD, (("x-plait-service-token", "secret"),), 7)
    assert infer_call("mlp", ROWS).metadata == ()


def test_scores_are_read_raw_and_typed() -> None:
    raw = pb.ModelInferResponse(raw_output_contents=[np.array([1, 2], np.float32).tobytes()])
    typed = pb.ModelInferResponse()
    typed.outputs.add(name="score").contents.fp32_contents.extend([1, 2])
    for response in (raw, typed):
        assert scores_of(response.SerializeToString()).tolist() == [1, 2]
