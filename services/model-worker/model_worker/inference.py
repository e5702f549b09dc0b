"""One inference call between its message and its answer, the same whether it came alone or on a stream."""

from __future__ import annotations

from model_worker.models import Models
from plait.api.inference.v2 import inference_pb2 as pb
from plait.rpc.call import current


class Inference:
    """Answers ModelInfer requests with the models at hand."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def infer(self, request: pb.ModelInferRequest, response: pb.ModelInferResponse) -> None:
        """Fill `response`. Raises what `Models.get`, `Codec.decode` and `Batcher.submit` raise."""
        served = self._models.get(request.model_name, request.model_version)
        query = served.codec.decode(request)
        answer = await served.batcher.submit(query.inputs, query.rows, current().deadline.at_s)
        response.model_name = served.model
        response.model_version = served.version
        response.id = request.id
        response.parameters["queue_us"].int64_param = int(answer.queue_s * 1e6)
        response.parameters["compute_us"].int64_param = int(answer.compute_s * 1e6)
        response.parameters["batch_rows"].int64_param = answer.batch_rows
        served.codec.encode(query, answer.outputs, response)
