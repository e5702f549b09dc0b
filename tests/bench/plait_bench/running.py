"""What every run of a benchmark has: a folder, a bar, the machine it ran on, and a file of figures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Say = Callable[[str, float], None]  # what was done, and the seconds it took off the plan


@contextmanager
def run_folder(given: Path | None, name: str) -> Iterator[Path]:
    """Artifacts, logs and settings of the servers: kept where a folder was given, fresh in either case."""
    path = Path(tempfile.mkdtemp(prefix="plait-bench-")) if given is None else given.absolute() / name
    if given is not None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        if given is None:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def progress(console: Console, total_s: float) -> Iterator[Say]:
    """A bar in seconds. It is drawn between the rounds only: a thread that draws would run beside the load generator."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=total_s)

        def say(what: str, seconds: float) -> None:
            bar.update(task, description=what, advance=seconds, refresh=True)
            if not console.is_terminal:
                console.print(f"{bar.tasks[0].completed:5.0f} of {total_s:.0f} s  {what}")

        yield say


def machine(server_core: int, load_core: int, packages: Sequence[str]) -> dict[str, Any]:
    """Return what figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "server_core": server_core,
        "load_core": load_core,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def write_json(console: Console, path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write the figures where a file was asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    console.print(f"the same figures are in {path}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
