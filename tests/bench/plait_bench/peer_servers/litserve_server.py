"""LitServe with its batching. It takes JSON or forms and no raw bytes, so tensors travel as base64. Runs in LitServe's environment."""

from __future__ import annotations

import base64
import os

import litserve
import numpy as np
import torch

MAX_BATCH = int(os.environ["BENCH_MAX_BATCH"])


class Scores(litserve.LitAPI):
    """Scores rows of float32."""

    def setup(self, device):
        torch.set_num_threads(1)
        self.width = int(os.environ["BENCH_WIDTH"])
        self.model = torch.jit.load(os.environ["BENCH_MODEL"]).eval()

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["rows"]), np.float32).reshape(-1, self.width)

    def batch(self, inputs):
        self.splits = np.cumsum([len(rows) for rows in inputs])[:-1]
        return np.concatenate(inputs)

    def predict(self, rows):
        with torch.inference_mode():
            return self.model(torch.from_numpy(rows)).numpy()

    def unbatch(self, output):
        return np.split(output, self.splits)

    def encode_response(self, output):
        return {"scores": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    api = Scores(max_batch_size=MAX_BATCH, batch_timeout=float(os.environ["BENCH_WAIT_MS"]) / 1e3)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=os.environ["BENCH_FAST_QUEUE"] == "1")
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="warning", access_log=False)
