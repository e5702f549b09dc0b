"""Where a server's data lies while it runs as another account: at home where that account can reach it, else lent out and brought back.

Root's own folders (/root, a `mktemp -d`) are closed to `nobody`. Nobody else's folder has its mode changed for it: the data moves to a
private folder under /var/tmp for as long as the server runs. A note at home says where, so that a crash loses nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from plait.local.accounts import Account, own, reaches

SHARED: Final = Path("/var/tmp")  # noqa: S108 - outlives a restart, unlike /tmp; what is made in it is private
_NOTE: Final = "location"
_PART: Final = ".part"
_OLD: Final = ".old"


class DataHome:
    """A private folder that `account` owns and reaches, at `path` between `move_in` and `move_out`.

    `given` keeps it; without one it is temporary and removed by `move_out`. Only one process may use it at a time.
    """

    def __init__(self, given: Path | None, account: Account | None, *, prefix: str, shared: Path = SHARED) -> None:
        self._account = account
        self._given = given
        if given is None:
            usual = Path(tempfile.gettempdir())
            self.path = _private_folder(usual if reaches(account, usual / "x") else shared, prefix)
        else:
            given.mkdir(parents=True, exist_ok=True)
            self.path = given if reaches(account, given) else self._lent(given, shared, prefix)

    def __repr__(self) -> str:
        return f"<DataHome {self._given or 'temporary'}{f' lent to {self.path}' if self._is_lent else ''}>"

    @property
    def _is_lent(self) -> bool:
        return self._given is not None and self._given != self.path

    def move_in(self) -> None:
        """Bring everything to `path` and hand it to the account."""
        if self._given is not None and self._is_lent:
            _move(self._given, self.path)
        self.path.chmod(0o700)
        if self._account is not None:
            for path in (self.path, *self.path.rglob("*")):
                if not path.is_symlink():
                    own(self._account, path)

    def move_out(self) -> None:
        """Bring everything home again, or remove it where it was temporary. The server must have ended."""
        if self._given is None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._is_lent and self.path.is_dir():
            _move(self.path, self._given)
            shutil.rmtree(self.path)
            (self._given / _NOTE).unlink(missing_ok=True)

    @staticmethod
    def _lent(given: Path, shared: Path, prefix: str) -> Path:
        """Return the folder of the last time if its server was cut off, else a new one, noted before it is used."""
        note = given / _NOTE
        if note.exists():
            known = Path(note.read_text(encoding="utf-8"))
            if known.is_dir():
                return known
        folder = _private_folder(shared, prefix)
        note.write_text(str(folder), encoding="utf-8")
        return folder


def _private_folder(parent: Path, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _move(source: Path, target: Path) -> None:
    """Move what is in one folder to another. Whatever bears its own name is whole, at whichever moment we are killed."""
    for folder in (source, target):
        for rest in (*folder.glob(f"*{_PART}"), *folder.glob(f"*{_OLD}")):
            _remove(rest)
    for path in [p for p in source.iterdir() if p.name != _NOTE]:
        if (target / path.name).exists():  # a move that was cut off before its last step
            _remove(path)
        else:
            _move_one(path, target / path.name)


def _move_one(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # another file system
        part, old = target.with_name(target.name + _PART), source.with_name(source.name + _OLD)
        if source.is_dir():
            shutil.copytree(source, part, symlinks=True)
        else:
            shutil.copy2(source, part)
        os.sync()
        part.rename(target)
        source.rename(old)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
