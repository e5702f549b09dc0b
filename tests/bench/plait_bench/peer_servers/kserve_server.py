"""KServe's documented custom predictor over gRPC. Runs in KServe's environment."""

from __future__ import annotations

import os

import torch
from kserve import InferOutput, InferResponse, Model, ModelServer


class Scores(Model):
    """Scores rows of float32."""

    def __init__(self, name):
        super().__init__(name)
        self.load()

    def load(self):
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"]).eval()
        self.ready = True
        return True

    def predict(self, payload, headers=None, response_headers=None):
        rows = payload.inputs[0].as_numpy()
        with torch.inference_mode():
            scores = self.model(torch.from_numpy(rows)).numpy()
        output = InferOutput(name="score", shape=list(scores.shape), datatype="FP32")
        output.set_data_from_numpy(scores)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    ModelServer(
        http_port=int(os.environ["BENCH_HTTP_PORT"]), grpc_port=int(os.environ["BENCH_PORT"]), workers=1, access_log_format=None
    ).start([Scores("mlp")])
