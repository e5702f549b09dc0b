"""Where a materialize was when it ended, beside its file, so that another run goes on there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from plait.cli.features.parquet import Position
from plait.errors import FailedPrecondition


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything before the position was acknowledged; `refused` rows of it by reason. `file` is the file's fingerprint."""

    file: dict[str, Any]
    tenant: str
    view: str
    version: int
    epoch: int
    row_group: int = 0
    row: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    @classmethod
    def path_of(cls, file: Path) -> Path:
        """Return where the progress of a file is kept."""
        return file.with_name(f"{file.name}.plait-progress")

    @classmethod
    def read(cls, of: Path, /, **expected: Any) -> Self:
        """Return a file's progress; `expected` fields must be as given.

        Raises FailedPrecondition (RESUME_MISMATCH) where there is none, or it is of another file, view or tenant.
        """
        path = cls.path_of(of)
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FailedPrecondition(f"there is nothing to resume: {path} does not exist", reason="RESUME_MISMATCH") from None
        except (OSError, ValueError, TypeError) as error:
            message = f"{path} cannot be read ({type(error).__name__}): delete it and begin anew"
            raise FailedPrecondition(message, reason="RESUME_MISMATCH") from error
        other = [name for name, value in expected.items() if getattr(found, name) != value]
        if other:
            message = f"{path} is about another {', '.join(other)}: give what it was begun with, or delete it and begin anew"
            raise FailedPrecondition(message, reason="RESUME_MISMATCH")
        return found

    @property
    def position(self) -> Position:
        """Where the file goes on."""
        return Position(self.row_group, self.row)

    def at(self, position: Position, refused: Mapping[str, int]) -> Self:
        """Return it at another position."""
        return dataclasses.replace(self, row_group=position.row_group, row=position.row, refused=dict(refused))

    def write(self, file: Path) -> None:
        """Replace what is kept of a file."""
        path = self.path_of(file)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        beside.replace(path)

    @classmethod
    def forget(cls, file: Path) -> None:
        """Keep nothing of a file."""
        with contextlib.suppress(FileNotFoundError):
            cls.path_of(file).unlink()
