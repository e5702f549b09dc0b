"""Artifacts in S3, Google Cloud Storage and what speaks like them; the only module that knows obstore.

Credentials and endpoints are found as obstore finds them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION…, GOOGLE_APPLICATION_CREDENTIALS,
GOOGLE_BASE_URL…, or the identity of the machine or pod. Where none of them is set and the machine has no identity either, the store is
asked without: what is public is read, and a refusal is told as the store's, not as trouble with the machine. Foreign errors end here:
their text may quote a store's answer, which can hold key ids and what was signed, so nothing of it is handed on but an HTTP status and the
store's error code.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import GCSStore, S3Store

from plait.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PlaitError, Unavailable
from plait.registry.locations import Prefix
from plait.registry.sources import CHUNK_BYTES, StoreOptions

RETRY_AFTER_S: Final = 5.0
_RANGES: Final = 8
_RANGE_BYTES: Final = 4 * 1024 * 1024  # times _RANGES is what one file takes of memory on its way
_LARGE_BYTES: Final = 4 * _RANGE_BYTES
_NO_RANGE: Final = re.compile(
    r"non-partial response|status code: 416"
)  # of a store that does not know ranges; of an object without that one
_PART_BYTES: Final = 8 * 1024 * 1024
_MOST_PARTS: Final = 9000  # S3 takes 10 000
_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
# Where obstore asks the machine for an identity, as its errors tell: the last thing it tries, when no setting names credentials.
_MACHINE: Final = re.compile(r"/latest/(?:api/token|meta-data/)|/computeMetadata/v1/")
_NO_CREDENTIALS: Final = {
    "s3": "this process has no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine or pod a role",
    "gs": "this process has no credentials: set GOOGLE_APPLICATION_CREDENTIALS, or give the machine or pod a service account",
}


class Bucket:
    """The files below one prefix. Thread-safe; blocks. Adapter of `sources.Source`, and can write."""

    def __init__(self, location: Prefix, options: StoreOptions) -> None:
        self._location = location
        self._options = options
        self._store = _open(location, options)
        self._anonymous = False

    def __repr__(self) -> str:
        return f"<Bucket {self._location}>"

    def __str__(self) -> str:
        return str(self._location)

    def read(self, name: str, most_bytes: int) -> bytes:
        content = bytearray()
        for chunk in self.chunks(name):
            content += chunk[: most_bytes + 1 - len(content)]
            if len(content) > most_bytes:
                break
        return bytes(content)

    def chunks(self, name: str, size_bytes: int = 0) -> Iterator[bytes]:
        """Yield a file as it arrives; a connection that breaks in the middle is resumed where it broke, as often as `retries` allows.

        Stores give each connection so much and no more, so a large file is asked for in ranges, several at once, and yielded in order.
        One that turns out to be of another size, and one of a store that does not know ranges, comes in one stream.
        """
        with self._errors(name):
            first = self._first_range(name) if size_bytes >= _LARGE_BYTES else None
            if first is not None and first.meta["size"] == size_bytes:
                yield from self._ranges(name, first, size_bytes)
                return
            for chunk in self._get(name).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def write(self, name: str, chunks: Iterator[bytes], size_bytes: int) -> None:
        """Upload a file from its pieces, whole or not at all. Raises as reading does, and whatever `chunks` raises."""
        part_bytes = max(_PART_BYTES, -(-size_bytes // _MOST_PARTS))
        with self._errors(name):
            if size_bytes <= _PART_BYTES:
                obstore.put(self._store, name, b"".join(chunks), use_multipart=False)
            else:
                obstore.put(self._store, name, chunks, use_multipart=True, chunk_size=part_bytes, max_concurrency=4)

    def create(self, name: str, content: bytes) -> None:
        """Upload a small file that must not be there yet. Raises AlreadyExists (ARTIFACT_EXISTS)."""
        with self._errors(name):
            obstore.put(self._store, name, content, mode="create", use_multipart=False)

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with self._errors(name):
            obstore.delete(self._store, name)

    def _first_range(self, name: str) -> obstore.GetResult | None:
        try:
            return self._get(name, {"range": (0, _RANGE_BYTES)})
        except BaseError as error:
            if not _NO_RANGE.search(str(error)):
                raise
            return None

    def _ranges(self, name: str, first: obstore.GetResult, size_bytes: int) -> Iterator[bytes]:
        """Yield a file's ranges in order, while the `_RANGES` - 1 behind the one that is waited for arrive too."""
        with ThreadPoolExecutor(_RANGES, thread_name_prefix="range") as pool:
            coming = deque([pool.submit(first.bytes)])
            begin = _RANGE_BYTES
            try:
                while coming:
                    while begin < size_bytes and len(coming) < _RANGES:
                        coming.append(
                            pool.submit(obstore.get_range, self._store, name, start=begin, end=min(begin + _RANGE_BYTES, size_bytes))
                        )
                        begin += _RANGE_BYTES
                    yield bytes(coming.popleft().result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _get(self, name: str, options: Any = None) -> obstore.GetResult:
        try:
            return obstore.get(self._store, name, options=options)
        except BaseError as error:
            if self._anonymous or not _MACHINE.search(str(error)):
                raise
        # Kept for the files that follow, so that the machine is not asked once for each; another thread may do the same, which is no harm.
        self._store, self._anonymous = _open(self._location, self._options, skip_signature=True), True
        return obstore.get(self._store, name, options=options)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._missing(name) from None
        except BaseError as error:
            raise self._error(name, error) from None
        except ValueError:
            raise InvalidArgument(f"{name} cannot be a name in {self._location}", reason="ARTIFACT_LOCATION") from None

    def _missing(self, name: str) -> FailedPrecondition:
        return FailedPrecondition(f"there is no {name} in {self._location}", reason="ARTIFACT_MISSING")

    def _error(self, name: str, error: BaseError) -> PlaitError:
        text = str(error)
        said = _said(text)
        nobody = _MACHINE.search(text) is not None
        if nobody or isinstance(error, PermissionDeniedError | UnauthenticatedError):
            advice = (
                _NO_CREDENTIALS[self._location.scheme] if nobody or self._anonymous else "check this process's credentials and their rights"
            )
            message = f"the store refuses to let us at {name} in {self._location} ({said}): {advice}"
            return FailedPrecondition(message, reason="ARTIFACT_FORBIDDEN")
        if isinstance(error, AlreadyExistsError | PreconditionError):
            return AlreadyExists(f"{name} is in {self._location} already; what is published is never changed", reason="ARTIFACT_EXISTS")
        if "BadScheme" in text:
            message = f"the endpoint for {self._location.scheme}:// is not https; allow http only for a store you trust the way to"
            return FailedPrecondition(message, reason="ARTIFACT_STORE_MISCONFIGURED")
        if "BareRedirect" in text:
            message = f"the store sends us away from {self._location}: the bucket lies in another region; set AWS_REGION"
            return FailedPrecondition(message, reason="ARTIFACT_STORE_MISCONFIGURED")
        message = f"{name} in {self._location} could not be transferred ({said})"
        return Unavailable(message, reason="ARTIFACT_STORE_UNAVAILABLE", retry_after_s=RETRY_AFTER_S)


def _open(location: Prefix, options: StoreOptions, **more: Any) -> S3Store | GCSStore:
    client: Any = {
        "timeout": timedelta(seconds=options.timeout_s),
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.stall_s),
        "allow_http": options.allow_http,
    }
    # Credentials are not renewed between tries, so trying ends well before the shortest-lived ones do.
    retry: Any = {"max_retries": options.retries, "retry_timeout": timedelta(seconds=min(options.timeout_s, 240.0))}
    kind = S3Store if location.scheme == "s3" else GCSStore
    try:
        return kind(location.bucket, prefix=location.path, client_options=client, retry_config=retry, **more)
    except (BaseError, ValueError, OSError):
        message = f"the environment's settings for {location.scheme}:// cannot be used: check its credentials and endpoint"
        raise FailedPrecondition(message, reason="ARTIFACT_STORE_MISCONFIGURED") from None


def _said(text: str) -> str:
    """Return what may be repeated of a foreign error."""
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        return f"HTTP {status[1]}{f' {code[1]}' if code else ''}"
    if "TokenRequest" in text or "redential" in text:
        return "no credentials could be had"
    if "TimedOut" in text or "Timeout" in text:
        return "it took too long"
    return "the connection could not be made" if "kind: Connect" in text else "the connection broke"
