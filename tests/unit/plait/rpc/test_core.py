"""The choice of gRPC's pollers: made in time, and never over the operator's head."""

from __future__ import annotations

import subprocess
import sys

import pytest

from plait.rpc import core


def test_the_pollers_are_chosen_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(core.VARIABLE, raising=False)
    core.use_pollers()
    assert core.os.environ[core.VARIABLE] == core.POLLERS


def test_what_the_operator_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(core.VARIABLE, "tcp_rcv_lowat")
    core.use_pollers()
    assert core.os.environ[core.VARIABLE] == "tcp_rcv_lowat"


@pytest.mark.parametrize("program", ["router", "feature_retrieval", "model_worker", "plait.cli"])
def test_a_program_has_not_imported_grpc_when_it_chooses(program: str) -> None:
    """gRPC reads the variable when it is imported; later is too late."""
    code = f"import sys, {program}.__main__; sys.exit('grpc is imported too early' if 'grpc' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
