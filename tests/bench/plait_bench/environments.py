"""Where other people's software is installed to be measured: a virtual environment each, pinned, made once and kept in plait's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from plait.errors import Unavailable

_TAIL: Final = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """`steps`: pinned packages in groups, installed one after another (all that came before stays pinned), and what is said meanwhile."""

    name: str
    steps: tuple[tuple[str, tuple[str, ...]], ...]

    def folder(self, cache: Path) -> Path:
        """Where it is installed: a change of the pinned packages gives a new folder."""
        packages = [package for _, group in self.steps for package in group]
        pins = hashlib.sha256(" ".join((*packages, sys.version)).encode()).hexdigest()[:12]
        return cache / "bench-peers" / f"{self.name}-{pins}"

    def install(self, cache: Path, say: Callable[[str], None]) -> Path:
        """Return its Python, installing it first where it is not. Raises Unavailable (BENCH_PEER_NOT_INSTALLED)."""
        folder = self.folder(cache)
        python = folder / "bin" / "python"
        if (folder / "complete").exists():
            return python
        _run(f"{self.name}: making {folder}", [sys.executable, "-m", "venv", "--clear", str(folder)], say)
        before: tuple[str, ...] = ()
        for what, packages in self.steps:
            _run(f"{self.name}: installing {what}", [*_pip(python), *packages, *before], say)
            before += packages
        (folder / "complete").touch()
        return python

    def version(self, python: Path) -> str:
        """Return the installed version of the package with its name."""
        code = f"import importlib.metadata as m; print(m.version({self.name!r}))"
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def cache_folder() -> Path:
    """Where environments are kept: $PLAIT_CACHE, or plait's folder in the user's cache."""
    given = os.environ.get("PLAIT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait"


def foreign_environ(python: Path) -> dict[str, str]:
    """Return our environment variables without what is ours alone, for a process of theirs."""
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"} and not k.startswith("PLAIT_")}
    return env | {"PYTHONWARNINGS": "ignore", "PATH": f"{python.parent}:{env.get('PATH', '')}"}


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def _run(what: str, argv: list[str], say: Callable[[str], None]) -> None:
    say(what)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout)[-_TAIL:]
        message = f"{what} failed; leave it out of --peers, or mend this and run again:\n{tail}"
        raise Unavailable(message, reason="BENCH_PEER_NOT_INSTALLED")
