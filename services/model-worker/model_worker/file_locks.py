"""Locks on files, between threads and processes alike: the kernel gives them up when their holder dies, so none is ever stale."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def acquire(path: Path, *, shared: bool) -> int:
    """Wait for the lock; return its descriptor, whose closing gives it up. Descriptors opened apart exclude each other in one process too."""
    found = _lock(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    assert found is not None  # noqa: S101 - only LOCK_NB comes back without
    return found


def attempt(path: Path) -> int | None:
    """Return the descriptor of the exclusive lock, or None where somebody holds it."""
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the exclusive lock."""
    descriptor = acquire(path, shared=False)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, operation: int) -> int | None:
    """Whoever holds a lock exclusively may delete its file, so a lock counts only while its file is the one that path names."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, operation)
            if _is(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
