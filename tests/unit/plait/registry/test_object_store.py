"""What goes wrong between us and an object store, on a real wire: each kind is told apart, and nothing secret is repeated."""

from __future__ import annotations

import hashlib
import itertools
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.object_store import SECRET, Handler, ObjectStore

from plait.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PlaitError, Unavailable
from plait.registry.locations import Prefix
from plait.registry.object_store import Bucket
from plait.registry.sources import StoreOptions

S3 = Prefix(scheme="s3", bucket="models", path="ranker/7")
GS = Prefix(scheme="gs", bucket="models", path="ranker/7")
KEY = "models/ranker/7/model.pt"
CONTENT = bytes(range(256)) * 20_000  # several pieces

both = pytest.mark.parametrize("location", [S3, GS], ids=["s3", "gs"])


def bucket(location: Prefix = S3, **options: Any) -> Bucket:
    return Bucket(
        location, StoreOptions(**{"timeout_s": 20, "stall_s": 5, "connect_timeout_s": 2, "retries": 1, "allow_http": True} | options)
    )


def refused(act: Callable[[], object]) -> PlaitError:
    with pytest.raises(PlaitError) as caught:
        act()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.metadata)
    for secret in (SECRET, "test-key", "test-secret", "test-token", "Signature"):
        assert secret not in shown
    return caught.value


@both
@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (401, "InvalidAccessKeyId")])
def test_a_store_that_says_no_is_told_from_one_that_is_away(object_store: ObjectStore, location: Prefix, status: int, code: str) -> None:
    object_store.faults[KEY] = lambda handler, _: (handler.fail(status, code), True)[1]
    error = refused(lambda: bucket(location).read("model.pt", 100))
    assert (type(error), error.reason) == (FailedPrecondition, "ARTIFACT_FORBIDDEN")
    assert f"HTTP {status} {code}" in error.message
    assert object_store.asked("GET", KEY) == 1


@both
def test_a_store_in_trouble_is_asked_again_and_then_reported(object_store: ObjectStore, location: Prefix) -> None:
    object_store.faults[KEY] = lambda handler, _: (handler.fail(503, "SlowDown"), True)[1]
    error = refused(lambda: bucket(location, retries=2).read("model.pt", 100))
    assert (type(error), error.reason) == (Unavailable, "ARTIFACT_STORE_UNAVAILABLE")
    assert error.retry_after_s is not None
    assert "HTTP 503 SlowDown" in error.message
    assert object_store.asked("GET", KEY) == 3


def once(fault: Callable[[Handler, bytes], None]) -> Callable[[Handler, bytes], bool]:
    """Misbehave the first time."""
    turns = itertools.count()

    def answer(handler: Handler, content: bytes) -> bool:
        if next(turns):
            return False
        fault(handler, content)
        return True

    return answer


@both
def test_a_broken_transfer_goes_on_where_it_broke(object_store: ObjectStore, location: Prefix) -> None:
    object_store.objects[KEY] = CONTENT
    object_store.faults[KEY] = once(lambda handler, content: handler.cut(content, 1_500_000))
    assert b"".join(bucket(location).chunks("model.pt")) == CONTENT
    assert object_store.asked("GET", KEY) == 2


@both
def test_a_transfer_that_breaks_again_and_again_is_given_up(object_store: ObjectStore, location: Prefix) -> None:
    object_store.objects[KEY] = CONTENT
    object_store.faults[KEY] = lambda handler, content: (handler.cut(content, 10), True)[1]
    assert refused(lambda: list(bucket(location).chunks("model.pt"))).reason == "ARTIFACT_STORE_UNAVAILABLE"


LARGE = hashlib.shake_128(b"large").digest(20 * 1024 * 1024 + 7)


def large(store: ObjectStore, location: Prefix, content: bytes = LARGE) -> bytes:
    """Return what arrives of an object that should be as large as LARGE."""
    store.objects[KEY] = content
    return b"".join(bucket(location).chunks("model.pt", len(LARGE)))


@both
def test_a_large_file_comes_in_ranges_at_once_and_in_order(object_store: ObjectStore, location: Prefix) -> None:
    together = threading.Barrier(5)  # as many requests as it has ranges behind the first: none is answered before all are there
    turns = itertools.count()

    def wait(*_: object) -> bool:
        if next(turns):
            together.wait(20)
        return False

    object_store.faults[KEY] = wait
    assert large(object_store, location) == LARGE
    assert object_store.asked("GET", KEY) == 6


@both
def test_a_store_that_knows_no_ranges_is_read_in_one_stream(object_store: ObjectStore, location: Prefix) -> None:
    def whole(handler: Handler, content: bytes) -> bool:
        handler.begin(200, len(content))
        handler.wfile.write(content)
        return True

    object_store.faults[KEY] = whole
    assert large(object_store, location) == LARGE
    assert object_store.asked("GET", KEY) == 2


@both
@pytest.mark.parametrize("content", [LARGE + b"x", LARGE[:-1], b"short", b""], ids=["longer", "shorter", "short", "empty"])
def test_a_large_file_of_another_size_is_read_as_it_is(object_store: ObjectStore, location: Prefix, content: bytes) -> None:
    assert large(object_store, location, content) == content


@both
def test_a_range_that_breaks_goes_on_where_it_broke(object_store: ObjectStore, location: Prefix) -> None:
    turns = itertools.count()

    def cut_the_third(handler: Handler, content: bytes) -> bool:
        if next(turns) != 2:
            return False
        first, last = (int(part) for part in handler.headers["Range"].removeprefix("bytes=").split("-"))
        handler.begin(206, last + 1 - first, ("Content-Range", f"bytes {first}-{last}/{len(content)}"))
        handler.wfile.write(content[first : first + 1000])
        handler.close_connection = True
        return True

    object_store.faults[KEY] = cut_the_third
    assert large(object_store, location) == LARGE
    assert object_store.asked("GET", KEY) == 7


@both
def test_a_range_that_is_refused_ends_the_transfer(object_store: ObjectStore, location: Prefix) -> None:
    turns = itertools.count()
    object_store.faults[KEY] = lambda handler, _: bool(next(turns) >= 2 and (handler.fail(403, "AccessDenied"), True)[1])
    assert refused(lambda: large(object_store, location)).reason == "ARTIFACT_FORBIDDEN"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("range")]


@both
def test_whoever_stops_reading_a_large_file_leaves_nothing_running(object_store: ObjectStore, location: Prefix) -> None:
    object_store.objects[KEY] = LARGE
    chunks = bucket(location).chunks("model.pt", len(LARGE))
    assert LARGE.startswith(next(chunks))
    chunks.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("range")]


def test_a_silent_store_is_given_up(object_store: ObjectStore) -> None:
    def silent(handler: Handler, content: bytes) -> bool:
        handler.begin(200, len(content))
        handler.connection.recv(1)  # until the other side has had enough
        handler.close_connection = True
        return True

    object_store.objects[KEY] = CONTENT
    object_store.faults[KEY] = silent
    error = refused(lambda: list(bucket(stall_s=0.2, retries=0).chunks("model.pt")))
    assert error.reason == "ARTIFACT_STORE_UNAVAILABLE"


@both
def test_nobody_listening(object_store: ObjectStore, location: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("GOOGLE_BASE_URL", url)
        error = refused(lambda: bucket(location).read("model.pt", 100))
    assert error.reason == "ARTIFACT_STORE_UNAVAILABLE"
    assert "connection could not be made" in error.message


@both
def test_what_an_endpoint_holds_besides_its_address_is_not_repeated(
    object_store: ObjectStore, location: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = object_store.url.replace("http://", "http://test-key:test-secret@")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("GOOGLE_BASE_URL", url)
    object_store.faults[KEY] = lambda handler, _: (handler.fail(403, "AccessDenied"), True)[1]
    assert refused(lambda: bucket(location).read("model.pt", 100)).reason in {"ARTIFACT_FORBIDDEN", "ARTIFACT_STORE_UNAVAILABLE"}


@both
def test_http_needs_to_be_allowed(object_store: ObjectStore, location: Prefix) -> None:
    object_store.objects[KEY] = b"weights"
    error = refused(lambda: bucket(location, allow_http=False).read("model.pt", 100))
    assert error.reason == "ARTIFACT_STORE_MISCONFIGURED"
    assert "not https" in error.message
    assert not object_store.requests


def test_another_region_is_named_as_the_cause(object_store: ObjectStore) -> None:
    object_store.faults[KEY] = lambda handler, _: (handler.fail(301, "PermanentRedirect"), True)[1]
    error = refused(lambda: bucket().read("model.pt", 100))
    assert error.reason == "ARTIFACT_STORE_MISCONFIGURED"
    assert "AWS_REGION" in error.message


def test_an_environment_that_cannot_be_used_is_named(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/nowhere/test-secret.json")
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    error = refused(lambda: bucket(GS).read("model.pt", 100))
    assert error.reason == "ARTIFACT_STORE_MISCONFIGURED"


@both
def test_credentials_come_from_the_environment(object_store: ObjectStore, location: Prefix) -> None:
    object_store.objects[KEY] = b"weights"
    assert bucket(location).read("model.pt", 100) == b"weights"
    assert object_store.authorizations == {"AWS4-HMAC-SHA256" if location is S3 else "Bearer"}


@both
@pytest.mark.parametrize("size_bytes", [0, 7, 9 * 1024 * 1024])
def test_what_is_written_is_read(object_store: ObjectStore, location: Prefix, size_bytes: int) -> None:
    content = CONTENT[:1] * size_bytes
    pieces = (content[at : at + 1_000_000] for at in range(0, size_bytes, 1_000_000))
    bucket(location).write("model.pt", pieces, size_bytes)
    assert object_store.objects == {KEY: content}
    assert not object_store.uploads


@both
@pytest.mark.parametrize("size_bytes", [7, 9 * 1024 * 1024])
def test_an_upload_that_ends_early_leaves_nothing(object_store: ObjectStore, location: Prefix, size_bytes: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"0" * (size_bytes - 1)
        raise FailedPrecondition("it changed", reason="ARTIFACT_CORRUPT")

    with pytest.raises(FailedPrecondition, match="it changed"):
        bucket(location).write("model.pt", pieces(), size_bytes)
    assert object_store.objects == {}


@both
def test_what_must_be_new_is_never_written_over(object_store: ObjectStore, location: Prefix) -> None:
    bucket(location).create("model.pt", b"first")
    error = refused(lambda: bucket(location).create("model.pt", b"second"))
    assert (type(error), error.reason) == (AlreadyExists, "ARTIFACT_EXISTS")
    assert object_store.objects == {KEY: b"first"}


def test_a_name_no_store_takes(object_store: ObjectStore) -> None:
    error = refused(lambda: bucket().read("../model.pt", 100))
    assert (type(error), error.reason) == (InvalidArgument, "ARTIFACT_LOCATION")


@pytest.fixture(params=["silent", "says no"])
def without_credentials(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ObjectStore]:
    """The store, for a process that no setting and no machine gives credentials; the machine's identity service is real, and ours."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_BEARER_TOKEN"):
        monkeypatch.delenv(name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}" if request.param == "silent" else object_store.url
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", url)
        monkeypatch.setenv("GCE_METADATA_HOST", url.removeprefix("http://"))
        yield object_store


@both
def test_a_refusal_is_told_as_one_without_credentials_too(without_credentials: ObjectStore, location: Prefix) -> None:
    without_credentials.faults[KEY] = lambda handler, _: (handler.fail(403, "AccessDenied"), True)[1]
    error = refused(lambda: bucket(location, retries=0).read("model.pt", 100))
    assert (type(error), error.reason) == (FailedPrecondition, "ARTIFACT_FORBIDDEN")
    assert "HTTP 403 AccessDenied" in error.message
    assert "has no credentials: set" in error.message


@both
def test_what_is_public_needs_no_credentials(without_credentials: ObjectStore, location: Prefix) -> None:
    without_credentials.objects[KEY] = CONTENT
    there = bucket(location, retries=0)
    assert b"".join(there.chunks("model.pt")) == CONTENT
    assert refused(lambda: there.read("other.pt", 100)).reason == "ARTIFACT_MISSING"
    without_credentials.faults[KEY] = lambda handler, _: (handler.fail(503, "SlowDown"), True)[1]
    assert refused(lambda: there.read("model.pt", 100)).reason == "ARTIFACT_STORE_UNAVAILABLE"


@both
def test_nothing_is_written_without_credentials(without_credentials: ObjectStore, location: Prefix) -> None:
    error = refused(lambda: bucket(location, retries=0).create("model.pt", b"weights"))
    assert (type(error), error.reason) == (FailedPrecondition, "ARTIFACT_FORBIDDEN")
    assert "has no credentials: set" in error.message
    assert without_credentials.objects.get(KEY) is None


def test_credentials_that_are_set_but_cannot_be_fetched_are_trouble(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("test-token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{object_store.url}/identity")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    object_store.objects[KEY] = b"public"
    assert refused(lambda: bucket(retries=0).read("model.pt", 100)).reason == "ARTIFACT_STORE_UNAVAILABLE"
