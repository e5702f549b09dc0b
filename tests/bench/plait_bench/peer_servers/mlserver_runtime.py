"""A custom MLServer runtime as its documentation writes them. Runs in MLServer's environment, started by `mlserver start`."""

from __future__ import annotations

import os

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Scores(MLModel):
    """Scores rows of float32."""

    async def load(self):
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"]).eval()
        return True

    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            scores = self.model(torch.from_numpy(rows)).numpy()
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[NumpyCodec.encode_output("score", scores)])
