"""Ten thousand broken requests against a running worker: each gets an answer that blames the request, and the next good one is served.

Messages are made from good ones by a seeded generator: fields dropped, doubled and filled with nonsense, shapes that are negative, huge or
overflow when multiplied, contents of the wrong size, parameters of the wrong type; and bytes of good messages cut, flipped and shuffled,
sent as they are.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.fakes.echo_model import EchoLoader, echo_models
from tests.fakes.worker_world import (
    TOKEN,
    WorkerWorld,
    infer_request,
    model,
    outputs,
    publish_doubler,
    publish_ranker,
    ranking,
    snapshot,
    worker_world,
)

from plait.api.inference.v2 import inference_pb2 as pb
from plait.dtypes import BY_NAME
from plait.rpc.channel import open_channel
from plait.settings import ChannelSettings

MESSAGES = 10_000
AT_ONCE = 32
SEED = 20260
# None of these blames the request. (RESOURCE_EXHAUSTED: a queue that so few callers cannot fill, or an answer too large for its header.)
BLAMELESS = {"INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "DATA_LOSS", "UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"}
TIMED_OUT = "Deadline Exceeded"  # gRPC's words where the server was silent; the server itself says which time was too short
MAX_BYTES = 4 * 1024 * 1024
METHOD = "/inference.GRPCInferenceService/ModelInfer"

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, -(2**63), 2**63 - 1, 2**62, 2**32, 2**31, 65536, 4294967291, 10**12)
ODD_TEXTS = (
    "",
    "x",
    "item",
    "user",
    "ranker",
    "echo-bytes",
    "ü" * 50,
    "\x00",
    "n" * 5000,
    "%s%n",
    "../../etc/passwd",
    "FP32",
    "BYTES",
    "🦊",
)
ODD_BYTES = (b"", b"\x00", b"\xff" * 4, b"\x05\x00\x00\x00ab", b"\xff\xff\xff\x7f", b"\x00" * 4096, np.full(6, np.nan, "<f4").tobytes())
TYPED = [field.name for field in pb.InferTensorContents.DESCRIPTOR.fields]
PARAMETERS = ("priority", "timeout", "sequence_id", "sequence_start", "classification", "shared_memory_region", "binary_data", "x" * 300)

Change = Callable[[random.Random, pb.ModelInferRequest], None]


def good_requests() -> list[pb.ModelInferRequest]:
    """Return a request that succeeds for every model: raw and typed, of every element type."""
    user, item = [1.0, 2.0, 3.0], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    found = [ranking(user, item), ranking(user, item, typed=True), infer_request("doubler", {"x": np.ones((3, 2), np.float32)})]
    for dtype, known in BY_NAME.items():
        request = pb.ModelInferRequest(model_name=f"echo-{dtype}", id="e")
        request.inputs.add(name="x", datatype=known.oip, shape=[2, 2])
        size = known.size_bytes or 5
        request.raw_input_contents.append(b"\x01\x00\x00\x00a" * 4 if dtype == "bytes" else b"\x01" * (4 * size))
        found.append(request)
    return found


def _tensor(chance: random.Random, request: pb.ModelInferRequest) -> pb.ModelInferRequest.InferInputTensor:
    return chance.choice(request.inputs) if request.inputs else request.inputs.add(name="x", datatype="FP32", shape=[1])


def _shape(chance: random.Random, request: pb.ModelInferRequest) -> None:
    shape = _tensor(chance, request).shape
    if shape and chance.random() < 0.6:
        shape[chance.randrange(len(shape))] = chance.choice(ODD_NUMBERS)
    else:
        shape[:] = [chance.choice(ODD_NUMBERS) for _ in range(chance.choice((0, 1, 2, 3, 9, 400)))]


def _names(chance: random.Random, request: pb.ModelInferRequest) -> None:
    tensor = _tensor(chance, request)
    field = chance.choice(("name", "datatype"))
    setattr(tensor, field, chance.choice(ODD_TEXTS))


def _head(chance: random.Random, request: pb.ModelInferRequest) -> None:
    setattr(request, chance.choice(("model_name", "model_version", "id")), chance.choice(ODD_TEXTS))


def _other_model(chance: random.Random, request: pb.ModelInferRequest) -> None:
    request.model_name = chance.choice(("ranker", "doubler", *(f"echo-{dtype}" for dtype in BY_NAME)))


def _contents(chance: random.Random, request: pb.ModelInferRequest) -> None:
    if request.raw_input_contents and chance.random() < 0.8:
        at = chance.randrange(len(request.raw_input_contents))
        old = request.raw_input_contents[at]
        request.raw_input_contents[at] = chance.choice((*ODD_BYTES, old[:-1], old + b"\x00", old * 2, chance.randbytes(len(old))))
    elif chance.random() < 0.5:
        request.raw_input_contents.append(chance.choice(ODD_BYTES))
    else:
        del request.raw_input_contents[:]


def _typed(chance: random.Random, request: pb.ModelInferRequest) -> None:
    name = chance.choice(TYPED)
    values: Any = {
        "bool_contents": [True], "int_contents": [-(2**31), 300], "int64_contents": [-(2**63)], "uint_contents": [2**32 - 1],
        "uint64_contents": [2**64 - 1], "fp32_contents": [float("nan"), float("inf")], "fp64_contents": [1e308], "bytes_contents": [b"\xff"],
    }[name]  # fmt: skip
    if chance.random() < 0.5:
        del request.raw_input_contents[:]
    getattr(_tensor(chance, request).contents, name).extend(values * chance.choice((1, 2, 4, 1000)))


def _parameter(chance: random.Random, request: pb.ModelInferRequest) -> None:
    places: list[Any] = [request.parameters, *(t.parameters for t in request.inputs), *(o.parameters for o in request.outputs)]
    value = chance.choice(places)[chance.choice(PARAMETERS)]
    kind, odd = chance.choice(
        [
            ("bool_param", True), ("int64_param", chance.choice(ODD_NUMBERS)), ("string_param", chance.choice(ODD_TEXTS)),
            ("double_param", float("nan")), ("double_param", 1e308), ("uint64_param", 2**64 - 1), ("", None),
        ]
    )  # fmt: skip
    if kind:
        setattr(value, kind, odd)


def _outputs(chance: random.Random, request: pb.ModelInferRequest) -> None:
    for _ in range(chance.choice((1, 1, 2, 50))):
        output = request.outputs.add(name=chance.choice(("y", "score", "rank", *ODD_TEXTS)))
        if chance.random() < 0.5:
            output.parameters["classification"].int64_param = chance.choice(ODD_NUMBERS)


def _count(chance: random.Random, request: pb.ModelInferRequest) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor()
    tensor.CopyFrom(_tensor(chance, request))
    how_many = chance.choice((1, 2, 90, 2000))
    request.inputs.extend([tensor] * how_many)
    if chance.random() < 0.5:
        request.raw_input_contents.extend([b""] * how_many)


def _drop(chance: random.Random, request: pb.ModelInferRequest) -> None:
    fields = [field.name for field, _ in request.ListFields()]
    if fields:
        request.ClearField(chance.choice(fields))


CHANGES: tuple[Change, ...] = (_shape, _names, _head, _other_model, _contents, _typed, _parameter, _outputs, _count, _drop)


def _broken_bytes(chance: random.Random, wire: bytes) -> bytes:
    match chance.randrange(5):
        case 0:
            return wire[: chance.randrange(len(wire) + 1)]
        case 1:
            at = chance.randrange(len(wire))
            return wire[:at] + bytes([wire[at] ^ 1 << chance.randrange(8)]) + wire[at + 1 :]
        case 2:
            at = chance.randrange(len(wire))
            return wire[:at] + chance.randbytes(chance.randrange(1, 9)) + wire[at:]
        case 3:
            return chance.randbytes(chance.randrange(200))
        case _:
            # a name that is not UTF-8, a map entry without a key, a group, a length of 2**63
            return wire + chance.choice((b"\x0a\x02\xff\xfe", b"\x22\x02\x12\x00", b"\x2b", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"))


def fuzzed(chance: random.Random, good: list[pb.ModelInferRequest]) -> bytes:
    """Return a message made from a good one."""
    request = pb.ModelInferRequest()
    request.CopyFrom(chance.choice(good))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if request.ByteSize() < MAX_BYTES // 2000:
            chance.choice(CHANGES)(chance, request)
    wire = request.SerializeToString()
    return _broken_bytes(chance, wire) if wire and chance.random() < 0.3 else wire


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


async def test_no_message_is_a_fault_of_ours(folder: Path) -> None:
    chance, good = random.Random(SEED), good_requests()  # noqa: S311 - chance, not secrets
    world = snapshot(
        model("ranker", publish_ranker(folder / "ranker")), model("doubler", publish_doubler(folder / "doubler")), *echo_models()
    )
    messages = iter([fuzzed(chance, good) for _ in range(MESSAGES)])
    codes: Counter[str] = Counter()
    faults: list[tuple[str, str, bytes]] = []
    async with worker_world(world, loader_type=EchoLoader) as w, open_channel(w.server.address, ChannelSettings()) as channel:
        call = channel.unary_unary(METHOD)

        async def caller() -> None:
            for message in messages:
                code, details = await _code_of(call(message, metadata=TOKEN, timeout=60))
                codes[code] += 1
                if code in BLAMELESS or details == TIMED_OUT:
                    faults.append((code, details, message[:400]))

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        assert faults == []
        assert sum(codes.values()) == MESSAGES
        assert codes["INVALID_ARGUMENT"] > MESSAGES // 3
        assert codes["OK"] > MESSAGES // 50  # some changes do no harm, or every message would fail at the first check
        await _still_answers(w, good)


async def _code_of(call: Any) -> tuple[str, str]:
    try:
        pb.ModelInferResponse.FromString(await call)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


async def _still_answers(w: WorkerWorld, good: list[pb.ModelInferRequest]) -> None:
    for request in good:
        await w.infer(request)
    assert outputs(await w.infer(ranking([1.0, 2.0, 3.0], [[1.0, 0.0, 0.0]])))["score"] == [1]
