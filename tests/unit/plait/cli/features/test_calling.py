from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from plait.cli.features.calling import Target, run, stub, target
from plait.errors import FailedPrecondition, InvalidArgument, Unavailable
from plait.local.endpoints import Endpoints

STATE = Path("nowhere")


def test_a_key_does_not_travel_in_plain_text() -> None:
    for address in ("features.example:443", "10.0.0.1:1"):
        with pytest.raises(InvalidArgument) as caught:
            target(address, "hush", False, None, False, STATE)
        assert caught.value.reason == "API_KEY_EXPOSED"
        assert "hush" not in str(caught.value)
        assert target(address, "hush", True, None, False, STATE).tls
        assert not target(address, "hush", False, None, True, STATE).tls
        assert target(address, None, False, None, False, STATE).metadata == ()
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        assert target(address, "hush", False, None, False, STATE).metadata == (("authorization", "Bearer hush"),)
    assert "hush" not in repr(target("localhost:1", "hush", False, None, False, STATE))


def test_without_an_address_it_is_the_mesh_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="which feature-retrieval"):
        target(None, None, False, None, False, tmp_path)
    Endpoints(
        router="127.0.0.1:1",
        feature_retrieval="127.0.0.1:2",
        model_worker="127.0.0.1:3",
        postgres_dsn="",
        redis_url="",
        api_key="k",
        service_token="",
    ).write(tmp_path)
    assert target(None, None, False, None, False, tmp_path) == Target(address="127.0.0.1:2", api_key="k")
    assert target(None, "mine", False, None, False, tmp_path).api_key == "mine"


def test_a_call_that_fails_is_told_as_its_typed_error() -> None:
    async def call() -> None:
        from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb

        async with stub(Target(address="127.0.0.1:1")) as service:
            await service.EraseEntity(pb.EraseEntityRequest(), timeout=5)

    with pytest.raises(Unavailable) as caught:
        run(call())
    assert isinstance(caught.value.__cause__, grpc.RpcError)
