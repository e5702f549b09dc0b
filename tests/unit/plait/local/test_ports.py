"""Ports stay ours while real servers come and go on them."""

from __future__ import annotations

import socket

import grpc
import pytest

from plait.local.ports import Port


@pytest.fixture
def port() -> Port:
    return Port()


def test_two_ports_differ_and_closing_gives_back(port: Port) -> None:
    other = Port()
    assert other.number != port.number
    assert port.address == f"127.0.0.1:{port.number}"
    port.close()
    other.close()
    with socket.create_server(("127.0.0.1", port.number)) as server:
        assert server.getsockname()[1] == port.number


async def test_a_grpc_server_listens_on_it_twice(port: Port) -> None:
    for _ in range(2):
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        assert server.add_insecure_port(port.address) == port.number
        await server.start()
        socket.create_connection(("127.0.0.1", port.number), timeout=5).close()
        await server.stop(0)
    port.close()
