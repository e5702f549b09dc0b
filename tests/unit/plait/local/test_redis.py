"""The embedded Redis, for real."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest
import redis as client
import redis.exceptions

from plait.errors import FailedPrecondition, Unavailable
from plait.local import redis as embedded
from plait.local.redis import EmbeddedRedis


def ask(url: str, *command: str) -> object:
    with client.Redis.from_url(url, decode_responses=True) as connection:
        return connection.execute_command(*command)


async def test_what_was_written_is_there_the_next_time(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server:
        ask(server.url, "SET", "a", "42")
    async with EmbeddedRedis(tmp_path / "r") as server:
        assert ask(server.url, "GET", "a") == "42"
        assert stat.S_IMODE((tmp_path / "r" / "valkey.conf").stat().st_mode) == 0o600
    assert not server.child.running


async def test_a_temporary_one_leaves_nothing() -> None:
    async with EmbeddedRedis() as server:
        (folder,) = [Path(f) for f in [ask(server.url, "CONFIG", "GET", "dir")["dir"]]]  # type: ignore[index]
        ask(server.url, "SET", "a", "42")
    assert not folder.exists()


async def test_only_the_password_opens_it(redis_server: EmbeddedRedis) -> None:
    with pytest.raises(redis.exceptions.AuthenticationError):
        ask(f"redis://{redis_server.address}", "PING")
    command_line = Path(f"/proc/{redis_server.child.pid}/cmdline")
    password = redis_server.url.split(":")[2].split("@")[0]
    assert not command_line.exists() or password not in command_line.read_text()
    assert password not in repr(redis_server)


async def test_a_killed_server_starts_again_at_its_address(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server:
        ask(server.url, "SET", "a", "42")
        os.kill(server.child.pid, signal.SIGKILL)
        await server.child.wait()
        await server.start()
        assert ask(server.url, "GET", "a") == "42"


async def test_a_folder_with_odd_letters_will_do(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "with space and ü") as server:
        assert ask(server.url, "PING") is True


async def test_data_that_cannot_be_read_is_told_with_the_log(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path) as server:
        ask(server.url, "SET", "a", "42")
    for file in (tmp_path / "appendonlydir").glob("*.incr.aof"):
        file.write_bytes(b"rubbish" * 100)
    with pytest.raises(Unavailable, match=r"redis ended with status 1 before it was ready; it said:\n(.|\n)*Bad file format"):
        await EmbeddedRedis(tmp_path).__aenter__()


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package")
    with pytest.raises(FailedPrecondition, match=r"pip install 'plait\[local\]'"):
        embedded.locate()
