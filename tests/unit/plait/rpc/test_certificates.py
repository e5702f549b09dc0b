"""Certificates replaced while a process runs: on disk, on both kinds of server, and on channels."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from tests.fakes.authority import Authority

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.errors import FailedPrecondition
from plait.rpc.certificates import Certificates
from plait.rpc.channel import open_channel
from plait.rpc.credentials import Authenticator
from plait.rpc.renewed_channel import RenewedChannel
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings

SERVICE = "plait.api.router.v1.RouterService"


class Router(pb_grpc.RouterServiceServicer):
    async def Rank(self, request: Any, context: Any) -> Any:
        return pb.RankResponse(model=context.auth_context().get("x509_common_name", [b""])[0].decode())


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[RpcServer]:
    server = RpcServer(RpcSettings(grace_s=5, **settings), authenticator=Authenticator(lambda _: None, required=False))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, Router(), SERVICE, scope="rank")  # type: ignore[abstract]
    await server.start()
    tending = asyncio.create_task(server.tend())
    try:
        yield server
    finally:
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
        await server.drain()


def shown(address: str, authority: Authority) -> int:
    """Return the serial number of the certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=authority.cert.decode())
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


@pytest.mark.parametrize("kind", ["core", "aio"])
async def test_a_replaced_certificate_is_served_and_no_call_fails(tmp_path: Path, kind: str) -> None:
    authority = Authority()
    first, second = authority.issue(), authority.issue(days=2)
    ca = authority.write(tmp_path)
    cert, key = first.write(tmp_path)
    async with serving(server=kind, tls_cert=cert, tls_key=key) as server:
        assert await asyncio.to_thread(shown, server.address, authority) == first.serial
        expiry = "plait_certificate_expiry_seconds"
        assert server.metrics.registry.get_sample_value(expiry) == first.ends_s
        done = asyncio.Event()

        async def call() -> int:
            answered = 0
            async with open_channel(server.address, ChannelSettings(tls=True, tls_ca=ca)) as channel:
                stub: Any = pb_grpc.RouterServiceStub(channel)
                while not done.is_set():
                    await stub.Rank(pb.RankRequest())
                    answered += 1
                    await asyncio.sleep(0.005)
            return answered

        callers = [asyncio.create_task(call()) for _ in range(4)]
        second.write(tmp_path)
        async with asyncio.timeout(20):
            while await asyncio.to_thread(shown, server.address, authority) != second.serial:
                await asyncio.sleep(0.05)
        done.set()
        assert all(answered > 0 for answered in await asyncio.gather(*callers))
        assert server.metrics.registry.get_sample_value(expiry) == second.ends_s


def test_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    authority = Authority()
    first, second = authority.issue(), authority.issue()
    cert, key = first.write(tmp_path)
    certificates = Certificates(cert, key, None)
    assert certificates.material.cert == first.cert
    assert not certificates.renew()
    for broken in (b"", second.cert[: len(second.cert) // 2], b"no PEM", second.cert):  # the last is whole, but the key is not its
        cert.write_bytes(broken)
        assert not certificates.renew()
        assert certificates.material.cert == first.cert
    cert.unlink()
    assert not certificates.renew()
    second.write(tmp_path)
    assert certificates.renew()
    assert (certificates.material.cert, certificates.material.key) == (second.cert, second.key)
    os.utime(cert)
    assert not certificates.renew()  # touched, but the same


def test_a_folder_swapped_by_a_symlink_is_seen(tmp_path: Path) -> None:
    """As Kubernetes swaps what it mounts: the files' own paths never change."""
    authority = Authority()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = authority.issue(), authority.issue()
    first.write(tmp_path / "one")
    second.write(tmp_path / "two")
    data = tmp_path / "data"
    data.symlink_to("one")
    certificates = Certificates(data / "tls.crt", data / "tls.key", None)
    draft = tmp_path / "draft"
    draft.symlink_to("two")
    draft.replace(data)
    assert certificates.renew()
    assert certificates.material.cert == second.cert


@pytest.mark.parametrize("what", ["missing", "no PEM", "another's key", "no roots"])
def test_a_process_does_not_start_with_what_cannot_be_used(tmp_path: Path, what: str) -> None:
    authority = Authority()
    cert, key = authority.issue().write(tmp_path)
    ca = authority.write(tmp_path)
    match what:
        case "missing":
            key.unlink()
        case "no PEM":
            cert.write_bytes(b"no PEM")
        case "another's key":
            key.write_bytes(authority.issue().key)
        case "no roots":
            ca.write_bytes(b"")
    with pytest.raises(FailedPrecondition, match=str(tmp_path)) as caught:
        Certificates(cert, key, ca)
    assert caught.value.reason == "CERTIFICATE_UNUSABLE"


async def test_calls_over_a_channel_show_the_new_certificate_while_older_ones_end_as_they_began(tmp_path: Path) -> None:
    authority = Authority()
    server_cert, server_key = authority.issue().write(tmp_path, "server")
    cert, key = authority.issue("one").write(tmp_path, "client")
    ca = authority.write(tmp_path)
    async with serving(tls_cert=server_cert, tls_key=server_key, tls_client_ca=ca) as server:
        with pytest.raises(grpc.aio.AioRpcError):  # without a certificate of its own no caller gets in
            async with open_channel(server.address, ChannelSettings(tls=True, tls_ca=ca)) as channel:
                await pb_grpc.RouterServiceStub(channel).Rank(pb.RankRequest())
        settings = ChannelSettings(tls=True, tls_ca=ca, tls_cert=cert, tls_key=key)
        async with open_channel(server.address, settings) as channel:
            assert isinstance(channel, RenewedChannel)
            stub: Any = pb_grpc.RouterServiceStub(channel)
            assert (await stub.Rank(pb.RankRequest())).model == "one"
            watching: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            assert await watching.read() == b"\x08\x01"
            authority.issue("two").write(tmp_path, "client")
            async with asyncio.timeout(20):
                while (await stub.Rank(pb.RankRequest())).model != "two":
                    await asyncio.sleep(0.05)
            assert repr(channel).startswith("<RenewedChannel under_way=0 old=1 ")
            assert not watching.done()
            watching.cancel()
            async with asyncio.timeout(20):
                while " old=0 " not in repr(channel):
                    await asyncio.sleep(0.01)
            assert (await stub.Rank(pb.RankRequest())).model == "two"
