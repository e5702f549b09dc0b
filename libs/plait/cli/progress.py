"""How far a long piece of work has come, on a terminal; silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def transfer(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr for the length of a `with`; call what it gives with the number of bytes done since the last call."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(columns) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda more: bar.update(task, advance=more)


@contextmanager
def rows(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr for the length of a `with`, with rows a second and the time left; call what it gives with the number of rows done
    and the total, which may have changed. `done` of them were done before, and do not count for the rate."""
    if not sys.stderr.isatty():
        yield lambda _, __: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    class Rate(ProgressColumn):
        """Rows a second, lately."""

        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("left:"), TimeRemainingColumn())
    with _bar(columns) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda now, of: bar.update(task, completed=now, total=of)


@contextmanager
def _bar(columns: Any) -> Iterator[Any]:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar
