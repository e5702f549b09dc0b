"""The life of a service, as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = """
import asyncio
from pydantic_settings import SettingsConfigDict
from plait.rpc.credentials import Authenticator
from plait.rpc.process import run
from plait.rpc.server import RpcServer
from plait.settings import ServiceSettings

class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="PLAIT_T_")
    mode: str = "fine"

async def loop(mode):
    if mode == "crash":
        raise ValueError("boom")
    if mode == "fine":
        await asyncio.Event().wait()

async def open_service(settings, stack, tasks):
    stack.callback(print, "closed", flush=True)
    tasks.start(loop(settings.mode), "watch")
    return RpcServer(settings.rpc, authenticator=Authenticator(lambda _: None))

run("t", Settings, open_service)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "service.py"
    path.write_text(textwrap.dedent(SERVICE))
    return path


async def spawn(script: Path, *args: str, **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, str(script), *args, env={**os.environ, **environ}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def written(path: Path, process: asyncio.subprocess.Process) -> dict[str, str]:
    give_up = time.monotonic() + 30
    while not path.exists():
        assert process.returncode is None
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)
    answer: dict[str, str] = json.loads(path.read_text())
    return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serves_until_told_to_stop_and_closes(script: Path, tmp_path: Path, number: int) -> None:
    ports = tmp_path / "ports.json"
    process = await spawn(script, PLAIT_T_RPC__PORT_FILE=str(ports), PLAIT_T_TELEMETRY__METRICS_PORT="0")
    try:
        addresses = await written(ports, process)
        async with grpc.aio.insecure_channel(addresses["rpc"]) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        scrape = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{addresses['metrics']}/metrics", timeout=10).read())
        assert b"plait_rpc_server_seconds" in scrape
    finally:
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert out.strip() == b"closed"
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["serving", "draining", "drained"]


@pytest.mark.parametrize(("mode", "words"), [("crash", "boom"), ("return", "ended, which it never should")])
async def test_a_background_loop_that_ends_stops_the_process(script: Path, mode: str, words: str) -> None:
    process = await spawn(script, PLAIT_T_MODE=mode)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert out.strip() == b"closed"
    assert words in err.decode()


async def test_a_bad_setting_is_refused_by_name(script: Path) -> None:
    process = await spawn(script, PLAIT_T_RPC__PORT="http")
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 78
    assert "PLAIT_T_RPC__PORT='http'" in err.decode()
    assert "Traceback" not in err.decode()


async def test_settings_can_be_listed(script: Path) -> None:
    process = await spawn(script, "--settings")
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert "PLAIT_T_RPC__GRACE_S: time that held calls have to finish after SIGTERM, seconds (default: 10.0)" in out.decode()
