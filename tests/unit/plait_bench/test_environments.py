"""Other people's software in environments of its own: named by its pins, made once, and told about when it cannot be made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from plait.errors import Unavailable
from plait_bench import peer_feast
from plait_bench.environments import Environment, cache_folder, foreign_environ


def test_other_pins_are_another_folder(tmp_path: Path) -> None:
    one = Environment(name="x", steps=(("a", ("a==1",)), ("b", ("b==1",))))
    same = Environment(name="x", steps=(("other words", ("a==1", "b==1")),))
    other = Environment(name="x", steps=(("a", ("a==2", "b==1")),))
    assert one.folder(tmp_path) == same.folder(tmp_path) != other.folder(tmp_path)
    assert one.folder(tmp_path).parent == tmp_path / "bench-peers"
    assert all("==" in package for _, packages in peer_feast.ENVIRONMENT.steps for package in packages)


def test_what_is_complete_is_not_made_again(tmp_path: Path) -> None:
    environment = Environment(name="x", steps=(("nothing", ("no-such-package==0",)),))
    folder = environment.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    said: list[str] = []
    assert environment.install(tmp_path, said.append) == folder / "bin" / "python"
    assert said == []


def test_what_cannot_be_installed_is_told_with_the_end_of_pips_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    environment = Environment(name="x", steps=(("it", ("plait-no-such-package==0",)),))
    said: list[str] = []
    with pytest.raises(Unavailable, match="plait-no-such-package") as caught:
        environment.install(tmp_path, said.append)
    assert caught.value.reason == "BENCH_PEER_NOT_INSTALLED"
    assert not (environment.folder(tmp_path) / "complete").exists()
    assert len(said) == 2


def test_nothing_of_ours_reaches_a_process_of_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PLAIT_CACHE", "PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, str(tmp_path))
    assert cache_folder() == tmp_path
    env = foreign_environ(Path(sys.executable))
    assert not {name for name in env if name.startswith("PLAIT_")} | ({"PYTHONPATH", "VIRTUAL_ENV"} & set(env))
    assert env["PATH"].startswith(str(Path(sys.executable).parent))
