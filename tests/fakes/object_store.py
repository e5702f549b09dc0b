"""An object store on this machine that speaks enough of S3's and Google's XML protocols for obstore: objects, ranges, multipart uploads.

It keeps count of what it was asked, and can be told to misbehave.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

# What to do instead of answering a GET of this object, told (the handler, the object's bytes); returns whether it answered.
Fault = Callable[["Handler", bytes], bool]

SECRET = "key-id-and-string-to-sign"


class ObjectStore:
    """A context manager. `objects`: by "bucket/key". `requests`: how often each (method, "bucket/key") was asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.order: list[tuple[str, str]] = []
        self.faults: dict[str, Fault] = {}
        self.undeletable: set[str] = set()
        self.authorizations: set[str] = set()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.store = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="object store", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which obstore finds this store for s3:// and for gs://."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "eu-central-1",
            "GOOGLE_BASE_URL": self.url,
            "GOOGLE_BEARER_TOKEN": "test-token",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def asked(self, method: str, name: str) -> int:
        return self.requests[method, name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    store: ObjectStore

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name, content = self._found()
        fault = self.server.store.faults.get(name)
        if fault is not None and fault(self, content or b""):
            return
        if content is None:
            self.fail(404, "NoSuchKey")
            return
        self.send(content)

    def do_HEAD(self) -> None:
        _, content = self._found()
        if content is None:
            self.fail(404, "NoSuchKey")
        else:
            self.begin(200, len(content))

    def do_PUT(self) -> None:
        name, query = self._name()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        store = self.server.store
        if query.get("uploadId"):
            store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        else:
            fresh = self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
            with store.lock:
                if fresh and name in store.objects:
                    self.fail(412, "PreconditionFailed")
                    return
                store.objects[name] = body
        self._done(hashlib.md5(body).hexdigest())  # noqa: S324 - what S3's etags are

    def do_POST(self) -> None:
        name, query = self._name()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store = self.server.store
        if "delete" in query:
            self._delete_all(name, [unquote(key) for key in re.findall(r"<Key>([^<]+)</Key>", body.decode())])
            return
        if "uploads" in query:
            upload = secrets.token_hex(8)
            store.uploads[upload] = {}
            self._xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
            return
        parts = store.uploads.pop(query["uploadId"][0])
        listed = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        store.objects[name] = b"".join(parts[number] for number in listed)
        self._xml('<CompleteMultipartUploadResult><ETag>"whole"</ETag></CompleteMultipartUploadResult>')

    def do_DELETE(self) -> None:
        name, query = self._name()
        if query.get("uploadId"):
            self.server.store.uploads.pop(query["uploadId"][0], None)
        elif not self._delete(name):
            self.fail(403, "AccessDenied")
            return
        self.begin(204, 0)

    def _delete(self, name: str) -> bool:
        store = self.server.store
        if name not in store.undeletable:
            store.objects.pop(name, None)
        return name not in store.undeletable

    def _delete_all(self, bucket: str, keys: list[str]) -> None:
        """S3's DeleteObjects, which obstore deletes single objects with, too."""
        done, refused = "<Deleted><Key>{}</Key></Deleted>", "<Error><Key>{}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        answers = "".join((done if self._delete(f"{bucket}/{key}") else refused).format(key) for key in keys)
        self._xml(f"<DeleteResult>{answers}</DeleteResult>")

    def send(self, content: bytes) -> None:
        """Answer with an object, or with the part of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self.begin(200, len(content))
            self.wfile.write(content)
            return
        if int(asked[1]) >= len(content):
            self.fail(416, "InvalidRange")
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        self.begin(206, last + 1 - first, ("Content-Range", f"bytes {first}-{last}/{len(content)}"))
        self.wfile.write(content[first : last + 1])

    def begin(self, status: int, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        fixed = (("Content-Length", str(length)), ("ETag", '"tag"'), ("Last-Modified", "Tue, 24 Nov 2026 09:00:00 GMT"))
        for name, value in (*fixed, *headers):
            self.send_header(name, value)
        self.end_headers()

    def fail(self, status: int, code: str) -> None:
        """Answer as stores do: with a code for programs, and a text that repeats more than anybody else should read."""
        body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message><AWSAccessKeyId>{SECRET}</AWSAccessKeyId></Error>".encode()
        self.begin(status, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self, content: bytes, after_bytes: int) -> None:
        """Promise all of it, send a part, hang up."""
        self.begin(200, len(content))
        self.wfile.write(content[:after_bytes])
        self.close_connection = True

    def _found(self) -> tuple[str, bytes | None]:
        name, _ = self._name()
        return name, self.server.store.objects.get(name)

    def _name(self) -> tuple[str, dict[str, list[str]]]:
        split = urlsplit(self.path)
        name = unquote(split.path).removeprefix("/")
        store = self.server.store
        with store.lock:
            store.requests[self.command, name] += 1
            store.order.append((self.command, name))
            store.authorizations.add((self.headers.get("Authorization") or "").split(" ")[0])
        return name, parse_qs(split.query, keep_blank_values=True)

    def _done(self, tag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()

    def _xml(self, text: str) -> None:
        body = text.encode()
        self.begin(200, len(body))
        self.wfile.write(body)
