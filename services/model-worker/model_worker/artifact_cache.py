"""Copies of artifacts on this machine, by the digest of their `model.yaml`: fetched once, whole or not at all, and bounded in bytes.

<root>/sha256-<hex>/    an artifact; it appears by one rename, after each of its files was hashed and synced
<root>/partial/         what is being fetched: <hex>.<bytes reserved>.<token>/
<root>/trash/           what is being deleted
<root>/locks/           <hex>.use is held shared by whoever uses the artifact, <hex>.fetch by the one who fetches or checks it

Threads and processes may share a root. Locks are taken in the order use, fetch, space; whoever holds a later one only tries for an earlier
one. What a killed process leaves is deleted by the next one that opens the cache or fetches the same artifact.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Self

from model_worker import file_locks
from plait.errors import FailedPrecondition, ResourceExhausted, Unavailable
from plait.registry import artifact, signing
from plait.registry.artifact import ArtifactManifest, FileDigest
from plait.registry.signing import Trust
from plait.registry.sources import FolderSource, Source, copy, read_manifest, read_signature
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_DIGEST_PREFIX: Final = "sha256:"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ROTTEN: Final = frozenset({"ARTIFACT_CORRUPT", "ARTIFACT_MISSING", "ARTIFACT_INVALID", "ARTIFACT_FORBIDDEN"})
_RETRY_AFTER_S: Final = 30.0


class Lease:
    """Keeps an artifact from being deleted until it is closed or forgotten, or its process dies. A context manager; closing twice is fine."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._release = weakref.finalize(self, os.close, descriptor)

    def __repr__(self) -> str:
        return f"<Lease {self.folder.name[:19]} {'held' if self._release.alive else 'closed'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the artifact; from now on it may be deleted when space is needed."""
        if self._release.alive:
            _touch(self.folder)
        self._release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An artifact in the cache: what its `model.yaml` says, and the lease that keeps it (its folder is `lease.folder`)."""

    manifest: ArtifactManifest
    lease: Lease


class ArtifactCache:
    """Give `acquire` a digest and where to fetch it from. Thread-safe; blocks.

    Raises FailedPrecondition (ARTIFACT_CACHE_UNUSABLE) where `root` cannot be written.
    """

    def __init__(self, root: Path, *, max_bytes: int, concurrency: int = 4, timeout_s: float = 600.0) -> None:
        self.root = root.absolute()
        self._max_bytes = max_bytes
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        with self._disk_errors():
            self._make_folders()
            self._sweep()

    def __repr__(self) -> str:
        kept = list(self._kept())
        size_bytes = sum(_size_bytes(folder) for folder in kept)
        return f"<ArtifactCache {self.root} artifacts={len(kept)} bytes={size_bytes}/{self._max_bytes}>"

    def acquire(self, digest: str, source: Source, trust: Trust) -> Held:
        """Return the artifact whose `model.yaml` has this digest, checked byte for byte; fetched from `source` where it is not here or rotten.

        Raises FailedPrecondition: what `Source`, `artifact` and `Trust` raise, ARTIFACT_TOO_LARGE, ARTIFACT_CACHE_UNUSABLE;
        ResourceExhausted: ARTIFACT_CACHE_FULL (all of it is in use), ARTIFACT_DISK_FULL; Unavailable: ARTIFACT_STORE_UNAVAILABLE,
        ARTIFACT_FETCH_TIMEOUT, ARTIFACT_FETCH_STOPPED.
        """
        key = _key(digest)
        with self._disk_errors():
            self._make_folders()  # who cleans up temporary folders may have taken them
            lease = Lease(self._folder(key), file_locks.acquire(self._use_lock(key), shared=True))
            try:
                with file_locks.held(self._fetch_lock(key)):
                    manifest = self._checked(key, digest, source, trust) or self._fetch(key, digest, source, trust)
            except BaseException:
                lease.close()
                raise
            _touch(lease.folder)
            return Held(manifest=manifest, lease=lease)

    def close(self) -> None:
        """End what is being fetched, in other threads too, with Unavailable (ARTIFACT_FETCH_STOPPED). Leases stay as they are."""
        self._closed.set()

    # --- what is here

    def _checked(self, key: str, digest: str, source: Source, trust: Trust) -> ArtifactManifest | None:
        """Return what is kept if it still is what was published; delete it otherwise."""
        folder = self._folder(key)
        if not folder.is_dir():
            return None
        kept = FolderSource(folder)
        try:
            content = read_manifest(kept)
            artifact.check_pinned(content, digest, source=str(folder))
            manifest = artifact.parse(content, source=str(folder / artifact.FILE_NAME))
            for name, expected in manifest.files.items():
                copy(kept, name, expected, _drop)
        except FailedPrecondition as error:
            if error.reason not in _ROTTEN:
                raise
            log.warning("a kept artifact changed on disk and is fetched again", digest=digest, reason=error.reason, error=error.message)
            self._discard(key)
            return None
        if trust.required:
            self._check_kept_signature(folder, content, source, trust)
        return manifest

    def _check_kept_signature(self, folder: Path, content: bytes, source: Source, trust: Trust) -> None:
        """An artifact may be signed, or signed anew, after it was fetched: what is kept decides only where it says yes."""
        kept = read_signature(FolderSource(folder))
        try:
            trust.check(content, kept)
        except FailedPrecondition:
            found = read_signature(source)
            trust.check(content, found)
            assert found is not None  # noqa: S101 - the check refuses None
            draft = folder / f".{signing.FILE_NAME}.{secrets.token_hex(4)}"
            try:
                _write(draft, found)
                draft.replace(folder / signing.FILE_NAME)
            finally:
                draft.unlink(missing_ok=True)

    # --- what is not

    def _fetch(self, key: str, digest: str, source: Source, trust: Trust) -> ArtifactManifest:
        began_s = time.monotonic()
        self._remove_partial(key)
        content = read_manifest(source)
        artifact.check_pinned(content, digest, source=str(source))
        small = {artifact.FILE_NAME: content}
        if trust.required:
            found = read_signature(source)
            trust.check(content, found)
            small[signing.FILE_NAME] = found or b""
        manifest = artifact.parse(content, source=str(source))
        size_bytes = sum(map(len, small.values())) + sum(file.size_bytes for file in manifest.files.values())
        with self._reserved(key, size_bytes) as partial:
            self._fetch_files(source, manifest, partial)
            for name, held in small.items():
                _write(partial / name, held)
            for folder in (*(f for f in partial.rglob("*") if f.is_dir()), partial):
                _sync_folder(folder)
            partial.rename(self._folder(key))
            _sync_folder(self.root)
        log.info(
            "an artifact was fetched", digest=digest, source=str(source), bytes=size_bytes, seconds=round(time.monotonic() - began_s, 3)
        )
        return manifest

    def _fetch_files(self, source: Source, manifest: ArtifactManifest, partial: Path) -> None:
        """Fetch all files at once, up to `concurrency` of them; the first failure ends the others."""
        for name in manifest.files:
            (partial / PurePosixPath(name)).parent.mkdir(parents=True, exist_ok=True)
        transfer = _Transfer(source, partial, time.monotonic() + self._timeout_s, self._closed)
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="fetch") as pool:
            tasks = [pool.submit(transfer.fetch, name, expected) for name, expected in manifest.files.items()]
            try:
                done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                transfer.failed = True
                pool.shutdown(wait=True, cancel_futures=True)
        for task in done:
            task.result()

    # --- space

    @contextlib.contextmanager
    def _reserved(self, key: str, size_bytes: int) -> Iterator[Path]:
        """Make room and a folder to fetch into; delete it unless it was moved away."""
        if size_bytes > self._max_bytes:
            message = f"the artifact is {size_bytes} bytes large, the cache may take {self._max_bytes}: raise artifacts.max_bytes"
            raise FailedPrecondition(message, reason="ARTIFACT_TOO_LARGE")
        with file_locks.held(self._space_lock):
            self._make_room(size_bytes)
            partial = self._partial / f"{key}.{size_bytes}.{secrets.token_hex(8)}"
            partial.mkdir(mode=0o700)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, size_bytes: int) -> None:
        self._remove_dead_partials()
        # In this order, and by key: what arrives between the two looks is counted, and counted once.
        arriving = {folder.name.partition(".")[0]: _reserved_bytes(folder) for folder in self._partial.iterdir()}
        promised = sum(max(0, _reserved_bytes(folder) - _size_bytes(folder)) for folder in self._partial.iterdir())
        kept = {_key_of(folder): _size_bytes(folder) for folder in self._kept()}
        used = sum((arriving | kept).values())
        if size_bytes + promised > self._free_bytes() + sum(kept.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for key in sorted(kept, key=lambda key: _last_used_ns(self._folder(key))):
            if used + size_bytes <= self._max_bytes and size_bytes + promised <= self._free_bytes():
                return
            if self._evict(key):
                used -= kept[key]
        if used + size_bytes > self._max_bytes:
            message = f"{size_bytes} bytes are needed, but {used} of the cache's {self._max_bytes} are in use: raise artifacts.max_bytes"
            raise ResourceExhausted(message, reason="ARTIFACT_CACHE_FULL", retry_after_s=_RETRY_AFTER_S)

    def _free_bytes(self) -> int:
        """What the disk has left: it is not ours alone, so it is asked before it is filled."""
        return shutil.disk_usage(self.root).free

    def _evict(self, key: str) -> bool:
        """Delete an artifact unless somebody uses it."""
        lock = file_locks.attempt(self._use_lock(key))
        if lock is None:
            return False
        try:
            self._discard(key)
            self._unlink_locks(key)
        finally:
            os.close(lock)
        log.info("an artifact was deleted to make room", digest=_DIGEST_PREFIX + key)
        return True

    def _discard(self, key: str) -> None:
        """Take an artifact out of sight in one step, then delete it; who has its files open may go on reading them."""
        doomed = self._trash / f"{key}.{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):  # somebody found it rotten before us
            self._folder(key).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _make_folders(self) -> None:
        for folder in (self.root, self._partial, self._trash, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _sweep(self) -> None:
        """Delete what processes left behind that were killed."""
        for doomed in self._trash.iterdir():
            shutil.rmtree(doomed, ignore_errors=True)
        self._remove_dead_partials()
        for key in (path.stem for path in self._locks.glob("*.use")):
            self._forget(key)

    def _remove_dead_partials(self) -> None:
        """Delete what nobody is fetching any more. Who fetches an artifact holds its use lock too, and that one is never somebody else's: the
        fetch lock's file may have been deleted, by who had the use lock to himself, and made anew."""
        for key in {folder.name.partition(".")[0] for folder in self._partial.iterdir()}:
            lock = file_locks.attempt(self._use_lock(key))
            if lock is not None:
                self._remove_partial(key)
                os.close(lock)

    def _forget(self, key: str) -> None:
        """Delete the locks of an artifact that is neither here nor being fetched."""
        lock = None if self._folder(key).exists() else file_locks.attempt(self._use_lock(key))
        if lock is not None:
            self._unlink_locks(key)
            os.close(lock)

    def _unlink_locks(self, key: str) -> None:
        """The use lock must be held exclusively: whoever waits for it finds its file gone, and begins anew."""
        self._fetch_lock(key).unlink(missing_ok=True)
        self._use_lock(key).unlink(missing_ok=True)

    def _remove_partial(self, key: str) -> None:
        """Delete unfinished fetches of an artifact. Its fetch lock, or its use lock exclusively, must be held: then nobody is at work on them."""
        for folder in self._partial.iterdir():
            if folder.name.partition(".")[0] == key:
                shutil.rmtree(folder, ignore_errors=True)

    # --- where

    def _kept(self) -> Iterator[Path]:
        return (folder for folder in self.root.glob("sha256-*") if folder.is_dir())

    def _folder(self, key: str) -> Path:
        return self.root / f"sha256-{key}"

    def _use_lock(self, key: str) -> Path:
        return self._locks / f"{key}.use"

    def _fetch_lock(self, key: str) -> Path:
        return self._locks / f"{key}.fetch"

    @property
    def _space_lock(self) -> Path:
        return self._locks / "space"

    @property
    def _locks(self) -> Path:
        return self.root / "locks"

    @property
    def _partial(self) -> Path:
        return self.root / "partial"

    @property
    def _trash(self) -> Path:
        return self.root / "trash"

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                message = f"the disk of the artifact cache {self.root} is full: make room, or lower artifacts.max_bytes"
                raise ResourceExhausted(message, reason="ARTIFACT_DISK_FULL", retry_after_s=_RETRY_AFTER_S) from error
            message = (
                f"the artifact cache {self.root} cannot be used ({error.strerror}): set artifacts.cache to a folder that can be written"
            )
            raise FailedPrecondition(message, reason="ARTIFACT_CACHE_UNUSABLE") from error


class _Transfer:
    """The files of one artifact on their way into one folder; once one `failed` or all are `stopped`, none goes on."""

    def __init__(self, source: Source, folder: Path, deadline_s: float, stopped: threading.Event) -> None:
        self._source = source
        self._folder = folder
        self._deadline_s = deadline_s
        self._stopped = stopped
        self.failed = False

    def fetch(self, name: str, expected: FileDigest) -> None:
        with (self._folder / PurePosixPath(name)).open("xb") as file:
            copy(self._source, name, expected, self._guarded(file.write))
            file.flush()
            os.fsync(file.fileno())

    def _guarded(self, write: Callable[[bytes], int]) -> Callable[[bytes], None]:
        def guarded(chunk: bytes) -> None:
            if self.failed or self._stopped.is_set():
                raise Unavailable("the artifact is not fetched any further", reason="ARTIFACT_FETCH_STOPPED")
            if time.monotonic() > self._deadline_s:
                raise Unavailable("the artifact took too long to arrive: raise artifacts.timeout_s", reason="ARTIFACT_FETCH_TIMEOUT")
            write(chunk)

        return guarded


def _key(digest: str) -> str:
    """Return the 64 hexadecimal digits of a digest, which are safe as a file's name."""
    key = digest.removeprefix(_DIGEST_PREFIX)
    if not digest.startswith(_DIGEST_PREFIX) or len(key) != 64 or set(key) - set("0123456789abcdef"):
        raise FailedPrecondition(f"the registry holds no usable digest for the artifact: {digest[:80]!r}", reason="ARTIFACT_CORRUPT")
    return key


def _key_of(folder: Path) -> str:
    return folder.name.removeprefix("sha256-")


def _drop(_chunk: bytes) -> None:
    pass


def _write(file: Path, content: bytes) -> None:
    with file.open("xb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _touch(folder: Path) -> None:
    """Note that an artifact was used now, to the nanosecond: the kernel's own idea of now moves in steps of milliseconds."""
    now_ns = time.time_ns()
    with contextlib.suppress(OSError):  # it could not be fetched, or may not be written any more: no reason to keep its lock
        os.utime(folder, ns=(now_ns, now_ns))


def _last_used_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size_bytes(folder: Path) -> int:
    """Return what is there now; somebody may be replacing it."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def _reserved_bytes(partial: Path) -> int:
    """Return what its name says, or what is in it where the name is none of ours."""
    _, _, rest = partial.name.partition(".")
    size_bytes = rest.partition(".")[0]
    return int(size_bytes) if size_bytes.isdecimal() else _size_bytes(partial)
