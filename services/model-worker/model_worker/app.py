"""The composition root: the only file that knows all parts and sees the settings."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Final

from model_worker import backends, memory
from model_worker.artifacts import Fetcher
from model_worker.controls import Controls
from model_worker.cpus import available_cpus
from model_worker.inference import Inference
from model_worker.instruments import Instruments
from model_worker.load_report import LoadReport, StreamLoad
from model_worker.models import Models
from model_worker.served import Loader
from model_worker.servicer import InferenceServicer, StreamServicer
from model_worker.settings import ModelWorkerSettings
from model_worker.triton_metrics import TritonMetrics
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.api.model_worker.v1 import model_worker_service_pb2 as stream_pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as stream_pb_grpc
from plait.registry.callers import authenticator
from plait.registry.watcher import Watcher
from plait.rpc.process import Tasks
from plait.rpc.server import RpcServer
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing

_PUBLIC: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_INTERNAL: Final = stream_pb.DESCRIPTOR.services_by_name["ModelWorkerService"].full_name


async def open_service(settings: ModelWorkerSettings, stack: AsyncExitStack, tasks: Tasks) -> RpcServer:
    """Build the service in dependency order; it is ready once a snapshot of the registry is here. Models load while it serves."""
    tracing = Tracing(settings.telemetry, "model-worker")
    metrics = Metrics()
    registry = settings.registry
    watcher = Watcher(registry.dsn.get_secret_value(), registry.last_known_good, registry.poll_s)
    tasks.start(watcher.run(), "registry")

    instruments = Instruments(metrics)
    metrics.registry.register(TritonMetrics(instruments.statistics))
    fetcher = await asyncio.to_thread(Fetcher, settings.artifacts, settings.models.artifact_root)
    stack.callback(fetcher.close)
    loader = Loader(settings.models, settings.batching, instruments, fetcher, tracing)
    models = Models(settings.models, loader, instruments, memory.ledger(settings.models, backends.device_memory))
    stack.push_async_callback(models.close)
    await watcher.first(registry.first_snapshot_timeout_s)
    watcher.subscribe(models.adopt)
    tasks.start(models.run(), "models")

    server = RpcServer(settings.rpc, authenticator=authenticator(settings.rpc, watcher), metrics=metrics, tracing=tracing, loop_polls=True)
    inference = Inference(models, instruments.statistics, instruments.failed)
    report = LoadReport(available_cpus(), lambda: instruments.statistics.busy_s, lambda: models.queued_rows)
    load = report if settings.protocol.trailers else None
    server.add(
        pb_grpc.add_GRPCInferenceServiceServicer_to_server,
        InferenceServicer(
            models,
            inference,
            instruments.statistics,
            Controls(settings.protocol, tracing),
            version=version("plait-model-worker"),
            max_in_flight=settings.rpc.max_in_flight,
            default_timeout_s=settings.rpc.default_timeout_s,
            tracing=tracing,
            load=load,
        ),
        _PUBLIC,
        scope="infer",
    )
    server.add(
        stream_pb_grpc.add_ModelWorkerServiceServicer_to_server,
        StreamServicer(
            inference,
            max_in_flight=settings.rpc.max_in_flight,
            tracing=tracing,
            stream_load=StreamLoad(lambda: models.queued_rows, lambda: server.draining),
            load=load,
        ),
        _INTERNAL,
        scope="infer",
    )
    watcher.subscribe(server.reexamine)
    tasks.start(_tell_health(models, server), "health")
    return server


async def _tell_health(models: Models, server: RpcServer) -> None:
    """Have health checks that name one of the services say what ServerReady says: Kubernetes has no other probe for gRPC."""
    async for ready in models.readiness():
        for service in (_PUBLIC, _INTERNAL):
            await server.set_ready(service, ready)
