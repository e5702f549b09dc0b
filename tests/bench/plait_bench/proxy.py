"""What a pass-through is measured against, and the worker behind both: a plain grpc.aio proxy that hands bytes on, and canned answers.

`python -m plait_bench.proxy proxy PORT_FILE UPSTREAM` is the proxy: what a team writes in an afternoon, one unary call for another.
`python -m plait_bench.proxy worker PORT_FILE ANSWER_BYTES` answers every inference with the same bytes, on both of a model-worker's roads.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop

from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.model_worker.v1 import model_worker_service_pb2 as worker_pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as worker_grpc
from plait.rpc import multiplex
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings
from plait_bench.inference import METHOD

TOKEN: Final = "the-bench-token"
_SERVICE: Final = "inference.GRPCInferenceService"
_STREAMS: Final = worker_pb.DESCRIPTOR.services_by_name["ModelWorkerService"].full_name
_TIMEOUT_S: Final = 10.0


async def proxy(port_file: Path, upstream: str) -> None:
    """Hand ModelInfer on until killed."""
    async with grpc.aio.insecure_channel(upstream) as channel:
        call: Any = channel.unary_unary(METHOD)

        async def infer(request: bytes, context: Any) -> bytes:
            answer: bytes = await call(request, timeout=_TIMEOUT_S, metadata=(("x-plait-service-token", TOKEN),))
            return answer

        handler = grpc.method_handlers_generic_handler(_SERVICE, {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)})
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        _tell(port_file, f"127.0.0.1:{port}")
        await server.wait_for_termination()


class Canned(worker_grpc.ModelWorkerServiceServicer):
    """Answers alike over streams and unary calls."""

    def __init__(self, size_bytes: int) -> None:
        self._answer = pb.ModelInferResponse(model_name="mlp", model_version="1", raw_output_contents=[bytes(size_bytes)])
        self._answer.outputs.add(name="y", datatype="FP32", shape=[size_bytes // 4])
        self._bytes = self._answer.SerializeToString()

    async def StreamInfer(self, requests: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Over a stream, as the router asks."""
        await multiplex.serve(requests, context, self._fill, worker_pb.StreamInferResponse)

    async def infer(self, request: bytes, context: Any) -> bytes:
        """By a unary call, as the proxy asks."""
        return self._bytes

    async def _fill(self, request: Any, response: Any) -> None:
        response.CopyFrom(self._answer)


async def worker(port_file: Path, size_bytes: int) -> None:
    """Answer until killed."""
    server = RpcServer(RpcSettings(port=0), authenticator=Authenticator(lambda _: None, service_token=TOKEN), loop_polls=True)
    canned = Canned(size_bytes)

    def add_unary(servicer: Any, to: Any) -> None:
        to.add_registered_method_handlers(_SERVICE, {"ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.infer)})

    server.add(worker_grpc.add_ModelWorkerServiceServicer_to_server, canned, _STREAMS, scope="infer")
    server.add(add_unary, canned, _SERVICE, scope="infer")
    await server.start()
    _tell(port_file, server.address)
    await asyncio.Event().wait()


def _tell(port_file: Path, address: str) -> None:
    """As plait's services do, so that a reader never sees half of it."""
    made = port_file.with_suffix(".new")
    made.write_text(json.dumps({"rpc": address}), encoding="utf-8")
    made.rename(port_file)


def main() -> None:
    """Serve until killed."""
    what, port_file, argument = sys.argv[1:]
    serving = proxy(Path(port_file), argument) if what == "proxy" else worker(Path(port_file), int(argument))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serving)


if __name__ == "__main__":
    main()
