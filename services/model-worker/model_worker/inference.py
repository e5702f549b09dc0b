"""One inference call between its message and its answer, the same whether it came alone or on a stream."""

from __future__ import annotations

import time
from collections.abc import Callable

from model_worker.batcher import Answer
from model_worker.models import Models
from model_worker.served import Served
from model_worker.statistics import ModelStatistics, Statistics
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import PlaitError
from plait.rpc.call import current


class Inference:
    """Answers ModelInfer requests with the models at hand, and counts them."""

    def __init__(self, models: Models, statistics: Statistics, failed: Callable[[str, str, str], None] = lambda *_: None) -> None:
        """`failed` is told model, version and reason of each request that ends in an error."""
        self._models = models
        self._failed = failed
        self._statistics = statistics

    async def infer(self, request: pb.ModelInferRequest, response: pb.ModelInferResponse, *, watched: bool = False) -> Answer:
        """Fill `response` and return what it was made of. With `watched` it ends at its deadline by itself, as on a stream, where gRPC ends
        the stream only. Raises what `Models.get`, `Codec.decode` and `Batcher.submit` raise."""
        began_s = time.monotonic()
        served = self._models.get(request.model_name, request.model_version)
        counters = self._statistics.of(served.model, served.version)
        try:
            return await self._answer(served, request, response, counters, began_s, watched)
        except BaseException as error:  # a caller that went away was not answered either
            counters.failed(time.monotonic() - began_s)
            self._failed(served.model, served.version, error.reason if isinstance(error, PlaitError) else type(error).__name__)
            raise

    async def _answer(
        self,
        served: Served,
        request: pb.ModelInferRequest,
        response: pb.ModelInferResponse,
        counters: ModelStatistics,
        began_s: float,
        watched: bool,
    ) -> Answer:
        query = served.codec.decode(request)
        read_s = time.monotonic()
        deadline_s = current().deadline.at_s
        if query.timeout_s is not None:
            deadline_s = min(deadline_s, began_s + query.timeout_s)
            watched = True
        answer = await served.batcher.submit(query.inputs, query.rows, deadline_s, query.priority, watched=watched)
        write_s = time.monotonic()
        response.model_name = served.model
        response.model_version = served.version
        response.id = request.id
        response.parameters["queue_us"].int64_param = int(answer.queue_s * 1e6)
        response.parameters["compute_us"].int64_param = int(answer.compute_s * 1e6)
        response.parameters["batch_rows"].int64_param = answer.batch_rows
        served.codec.encode(query, answer.outputs, response)
        ended_s = time.monotonic()
        counters.answered(
            query.rows,
            ended_s - began_s,
            queue_s=answer.queue_s,
            input_s=read_s - began_s,
            compute_s=answer.compute_s,
            output_s=ended_s - write_s,
        )
        return answer
