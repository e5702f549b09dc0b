"""What the commands print: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime


def write_json(document: object) -> None:
    """Print one JSON document to stdout."""
    json.dump(document, sys.stdout, indent=2, default=_plain, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their column names; cut to the terminal, whole when it goes into a pipe or file."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=500)
    console.print(table)


def write_line(text: str, style: str = "") -> None:
    """Print one line to stdout, in colour where that is seen."""
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    Console(soft_wrap=True).print(Text(text, style=style))


def write_note(text: str) -> None:
    """Print one line to stderr, for what is no part of the result."""
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    Console(stderr=True, soft_wrap=True).print(Text(text, style="dim"))


def when(moment: datetime | None) -> str:
    """Return a time as people read it, in UTC to the second."""
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")
