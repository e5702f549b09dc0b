"""The embedded PostgreSQL, for real."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from plait.errors import Internal, Unavailable
from plait.local import postgres_software
from plait.local.accounts import Account
from plait.local.postgres import EmbeddedPostgres

PARENT = """
import asyncio
from pathlib import Path
from plait.local.postgres import EmbeddedPostgres
async def main():
    async with EmbeddedPostgres(Path({folder!r})) as server:
        print(server.child.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_what_was_written_is_there_the_next_time(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path / "pg") as server:
        dsn = server.create_database("shop")
        server.psql("create table t as select 42 as a", "shop")
        assert server.create_database("shop") == dsn
        assert server.psql("show fsync") == "on"
    async with EmbeddedPostgres(tmp_path / "pg") as server:
        connection = await asyncpg.connect(server.dsn_of("shop"))
        assert await connection.fetchval("select a from t") == 42
        await connection.close()
        home = Path(server.psql("show data_directory")).parent
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE((home / "password").stat().st_mode) == 0o600
    assert (home != tmp_path / "pg") == (os.geteuid() == 0), "pytest's folders are private, so as root the data is lent out"
    assert (tmp_path / "pg" / "pgdata" / "PG_VERSION").exists(), "and is home again"
    assert home == tmp_path / "pg" or not home.exists()


async def test_a_temporary_one_leaves_nothing(postgres_server: EmbeddedPostgres) -> None:
    async with EmbeddedPostgres() as server:
        home = Path(server.psql("show data_directory")).parent
        assert server.psql("show fsync") == "off"
        assert server.address != postgres_server.address
    assert not home.exists()
    assert not server.child.running


async def test_only_the_password_opens_it(postgres_server: EmbeddedPostgres) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://plait:guess@{postgres_server.address}/postgres")
    assert postgres_server.psql("select rolpassword like 'SCRAM%' from pg_authid where rolname = 'plait'") == "t"
    assert "://" not in repr(postgres_server)


async def test_a_killed_server_starts_again_at_its_address() -> None:
    async with EmbeddedPostgres() as server:
        dsn = server.create_database("shop")
        os.kill(server.child.pid, signal.SIGKILL)
        await server.child.wait()
        await server.start()
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("select 1") == 1
        await connection.close()


async def test_clients_do_not_keep_it_from_ending() -> None:
    async with EmbeddedPostgres() as server:
        connection = await asyncpg.connect(server.dsn)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    connection.terminate()


async def test_a_refused_statement_is_told(postgres_server: EmbeddedPostgres) -> None:
    with pytest.raises(Internal, match='relation "nothing" does not exist'):
        postgres_server.psql("select * from nothing")


async def test_a_data_folder_that_cannot_be_read_is_told_with_the_log(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path / "pg"):
        pass
    (tmp_path / "pg" / "pgdata" / "postgresql.conf").write_text("this is no setting\n")
    with pytest.raises(Unavailable, match=r"postgres ended with status 1 before it was ready; it said:\n(.|\n)*syntax error"):
        await EmbeddedPostgres(tmp_path / "pg").__aenter__()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux tells children of their parent's death")
async def test_it_ends_with_a_killed_parent_and_is_whole_afterwards(tmp_path: Path) -> None:
    script = PARENT.format(folder=str(tmp_path / "pg"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220 - it is waited for right here
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    async with EmbeddedPostgres(tmp_path / "pg") as server:
        assert not alive(pid)
        assert server.psql("select 1") == "1"


def test_programs_behind_a_private_folder_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = postgres_software.locate()
    us = Account(name="us", uid=os.getuid(), gid=os.getgid())
    monkeypatch.setattr(postgres_software, "reaches", lambda _account, _path: False)
    copied = postgres_software.for_account(installed, us, tmp_path)
    assert copied.bin.is_relative_to(tmp_path)
    assert postgres_software.for_account(installed, us, tmp_path) == copied
    assert postgres_software.for_account(installed, None, tmp_path) == installed
    for program in (copied.postgres, copied.initdb, copied.psql):
        assert b"18." in subprocess.run([str(program), "--version"], check=True, capture_output=True).stdout
