"""The load report is the message that gRPC's and Envoy's balancers parse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from model_worker.batcher import Answer
from model_worker.load_report import LoadReport, StreamLoad, encode
from plait.api.model_worker.v1 import model_worker_service_pb2 as pb

FIELDS = {
    "cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9,
}  # fmt: skip  # xds/data/orca/v3/orca_load_report.proto


def parsed(report: bytes) -> Any:
    """Read it with a descriptor of the published message."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="xds.data.orca.v3", syntax="proto3")
    message = file.message_type.add(name="OrcaLoadReport")
    for name, number in FIELDS.items():
        message.field.add(name=name, number=number, type=descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE, label=1)
    entry = message.nested_type.add(name="NamedMetricsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE, label=1)
    message.field.add(
        name="named_metrics",
        number=8,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
        label=3,
        type_name=".xds.data.orca.v3.OrcaLoadReport.NamedMetricsEntry",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))()
    assert found.ParseFromString(report) == len(report)
    assert not found.DiscardUnknownFields()
    return found


def test_every_field_is_where_the_proto_has_it() -> None:
    report = parsed(encode(cpu=0.25, rps=1000.5, eps=2.0, application=0.75, named={"queued_rows": 7.0, "x" * 60: -1.0}))
    assert (report.cpu_utilization, report.rps_fractional, report.eps, report.application_utilization) == (0.25, 1000.5, 2.0, 0.75)
    assert dict(report.named_metrics) == {"queued_rows": 7.0, "x" * 60: -1.0}


def test_rates_are_since_the_last_report_and_reports_are_kept_a_while() -> None:
    now = {"s": 10.0, "cpu": 1.0, "busy": 0.0}
    load = LoadReport(2, lambda: now["busy"], lambda: 5.0, clock=lambda: now["s"], cpu_clock=lambda: now["cpu"])
    for i in range(10):
        load.count(failed=i < 3)
    now.update(s=12.0, cpu=3.0, busy=1.0)
    first = load()
    report = parsed(first)
    assert (report.rps_fractional, report.eps, report.cpu_utilization, report.application_utilization) == (5.0, 1.5, 0.5, 0.5)
    assert report.named_metrics["queued_rows"] == 5.0
    now["s"] = 12.05
    load.count()
    assert load() is first
    now["s"] = 12.5
    assert parsed(load()).rps_fractional == pytest.approx(2.0)


async def test_calls_are_counted_by_how_they_end() -> None:
    now = {"s": 10.0}
    load = LoadReport(1, lambda: 0.0, lambda: 0.0, clock=lambda: now["s"], cpu_clock=lambda: 0.0)

    async def half(n: int) -> int:
        if n % 2:
            raise ValueError(n)
        return n // 2

    counted = load.counting(half)
    assert await counted(4) == 2
    with pytest.raises(ValueError, match="3"):
        await counted(3)
    now["s"] = 11.0
    report = parsed(load())
    assert (report.rps_fractional, report.eps) == (2.0, 1.0)


async def test_a_stream_is_told_of_load_at_most_every_ten_milliseconds() -> None:
    now = {"s": 10.0}
    load = StreamLoad(lambda: 5.0, lambda: now["s"] > 11.0, clock=lambda: now["s"])
    go = asyncio.Event()

    async def work() -> Answer:
        await go.wait()
        return Answer(outputs=(), queue_s=0.032, compute_s=0.0064, batch_rows=200, rows=2)

    counted, report = load.counting(work), load.reporter()
    calls = [asyncio.create_task(counted()) for _ in range(3)]
    await asyncio.sleep(0)
    first, second, third = (pb.StreamInferResponse() for _ in range(3))
    report(first)
    assert first.load == pb.LoadReport(in_flight=3, queued_rows=5)
    now["s"] = 10.009
    report(second)
    assert not second.HasField("load")
    go.set()
    await asyncio.gather(*calls)
    now["s"] = 11.5
    report(third)
    smoothed = 1 - (31 / 32) ** 3
    assert (third.load.in_flight, third.load.draining) == (0, True)
    assert third.load.queue_us == pytest.approx(32_000 * smoothed, rel=1e-3)
    assert third.load.row_ns == pytest.approx(3_200_000 * smoothed, rel=1e-3)


async def test_a_call_that_fails_is_no_longer_in_flight_and_says_nothing_of_speed() -> None:
    load = StreamLoad(lambda: 0.0, lambda: False)

    async def fail() -> Answer:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await load.counting(fail)()
    assert repr(load) == "<StreamLoad in_flight=0 queue_us=0 row_ns=0>"
