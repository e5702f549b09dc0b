"""As whom a server runs that refuses to be root, and what that account can reach."""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OVERFLOW_ID: Final = 65534  # nobody, where the account is not listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user and group of the system."""

    name: str
    uid: int
    gid: int


def unprivileged() -> Account | None:
    """Return `nobody` where we are root, else None: we are unprivileged already. No account is ever added."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        return Account(name="nobody", uid=_OVERFLOW_ID, gid=_OVERFLOW_ID)
    return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def reaches(account: Account | None, path: Path) -> bool:
    """Say whether `account` may enter every folder on the way to `path` (which need not exist yet); None is ourselves, who may."""
    if account is None:
        return True
    return all(_may_enter(account, folder) for folder in path.absolute().resolve().parents if folder.exists())


def own(account: Account | None, path: Path) -> None:
    """Hand one file or folder to `account`; nothing to do for None."""
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _may_enter(account: Account, folder: Path) -> bool:
    status = folder.stat()
    if status.st_uid == account.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == account.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)
