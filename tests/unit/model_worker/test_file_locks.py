"""A lock counts only while its file is the one its path names."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from model_worker import file_locks


def test_descriptors_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = file_locks.acquire(path, shared=True), file_locks.acquire(path, shared=True)
    assert file_locks.attempt(path) is None
    os.close(first)
    assert file_locks.attempt(path) is None
    os.close(second)
    third = file_locks.attempt(path)
    assert third is not None
    os.close(third)


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = file_locks.acquire(path, shared=False)
    waiting, got = threading.Event(), []

    def wait() -> None:
        waiting.set()
        got.append(file_locks.acquire(path, shared=True))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    path.unlink()
    os.close(holder)
    thread.join()
    assert os.path.samestat(path.stat(), os.fstat(got[0]))
    assert file_locks.attempt(path) is None
    os.close(got[0])


def test_held_gives_up_the_lock_whatever_happens(tmp_path: Path) -> None:
    try:
        with file_locks.held(tmp_path / "lock"):
            assert file_locks.attempt(tmp_path / "lock") is None
            raise KeyError
    except KeyError:
        pass
    found = file_locks.attempt(tmp_path / "lock")
    assert found is not None
    os.close(found)
