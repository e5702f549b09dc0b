"""mosec, the way its documentation serves numpy: bytes in, its own dynamic batching, bytes out. Runs in mosec's environment."""

from __future__ import annotations

import os

import numpy as np
import torch
from mosec import Server, Worker

ROWS_WIDTH = int(os.environ["BENCH_WIDTH"])


class Scores(Worker):
    """Scores rows of float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"]).eval()

    def deserialize(self, data):
        return np.frombuffer(data, np.float32).reshape(-1, ROWS_WIDTH)

    def serialize(self, data):
        return data.tobytes()

    def forward(self, data):
        if MAX_BATCH == 1:
            return self.scores(data)
        scores = self.scores(np.concatenate(data))
        return np.split(scores, np.cumsum([len(rows) for rows in data])[:-1])

    def scores(self, rows):
        with torch.inference_mode():
            return self.model(torch.from_numpy(rows)).numpy()


MAX_BATCH = int(os.environ["BENCH_MAX_BATCH"])
WAIT_MS = int(os.environ["BENCH_WAIT_MS"])

if __name__ == "__main__":
    server = Server()
    server.append_worker(Scores, num=1, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()
