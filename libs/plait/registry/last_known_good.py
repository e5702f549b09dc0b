"""The last snapshot on disk, so that a process can start and serve while Postgres is away.

One JSON file: format version, revision, the stored specs, the hashes of the API keys, the epochs of views, and a checksum over them. Written beside and
renamed over, mode 0600, so that a reader sees the whole old or the whole new file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from plait.errors import PlaitError
from plait.registry.records import ApiKey, Epochs, Snapshot
from plait.registry.resources import records_of, snapshot_of
from plait.registry.specs import KINDS, Validator, from_stored, kind_of, to_plain, to_stored

FORMAT: Final = "plait-registry-snapshot"
VERSION: Final = 1

_KEY: Final = Validator(ApiKey, forbid_unknown=False)
_EPOCHS: Final = Validator(Epochs, forbid_unknown=False)


class Unusable(Exception):
    """The file exists but cannot be used; the message says why and holds nothing of its content."""


def write(file: Path, snapshot: Snapshot) -> None:
    """Replace the file. Raises OSError; the old file then stands as it was."""
    content = encode(snapshot)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        Path(name).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def read(file: Path) -> Snapshot | None:
    """Return the snapshot in the file, None where there is no file. Raises Unusable."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(f"it cannot be read: {error.strerror}") from error
    return decode(content)


def encode(snapshot: Snapshot) -> bytes:
    """Return the file's bytes."""
    body = {
        "revision": snapshot.revision,
        "resources": [{"kind": kind_of(r), "name": r.name, "spec": to_stored(r)} for r in records_of(snapshot)],
        "keys": [to_plain(key) for _, key in sorted(snapshot.keys.items())],
        "epochs": [[*of, to_plain(epochs)] for of, epochs in sorted(snapshot.epochs.items())],
    }
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    head = {"format": FORMAT, "version": VERSION, "saved_at": time.time(), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps({**head, "body": text}).encode()


def decode(content: bytes) -> Snapshot:
    """Return the snapshot in a file's bytes. Raises Unusable."""
    try:
        envelope = json.loads(content)
        if envelope["format"] != FORMAT or envelope["version"] != VERSION:
            raise Unusable(f"it is not a {FORMAT} of version {VERSION}")
        if hashlib.sha256(envelope["body"].encode()).hexdigest() != envelope["sha256"]:
            raise Unusable("its checksum is wrong")
        return _snapshot(json.loads(envelope["body"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError, PlaitError) as error:
        raise Unusable(f"it is damaged ({type(error).__name__})") from error


def _snapshot(body: dict[str, Any]) -> Snapshot:
    known = [r for r in body["resources"] if r["kind"] in KINDS]  # a newer build may have written kinds we do not know
    records = [from_stored(r["kind"], r["name"], r["spec"]) for r in known]
    epochs = {(tenant, view, version): _EPOCHS(found) for tenant, view, version, found in body.get("epochs", [])}  # older files have none
    return snapshot_of(body["revision"], records, [_KEY(key) for key in body["keys"]], epochs)
