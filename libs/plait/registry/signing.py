"""Ed25519 signatures of artifacts: `model.yaml.sig` beside `model.yaml` says who vouches for it.

The registry's digest says which bytes were meant; a signature says that a holder of a key meant them, whoever may write to the registry
or the bucket. It is over the exact bytes of `model.yaml`, which pin every other file. `cryptography` is imported where a key is used.

The file is one line: "ed25519 <key id> <signature in base64>". A public key is written "ed25519:<32 bytes in base64>"; its id is the
first 16 hexadecimal digits of the SHA-256 of those 32 bytes. Ed25519: RFC 8032.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from plait.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE_NAME: Final = "model.yaml.sig"
MAX_BYTES: Final = 1024  # of model.yaml.sig
_PREFIX: Final = "ed25519:"
_LINE: Final = re.compile(rb"ed25519 ([0-9a-f]{16}) ([A-Za-z0-9+/]{86}==)\n?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """Whose signatures are to be believed: 32 bytes, and the id that signatures name it by."""

    raw: bytes

    @property
    def id(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def __str__(self) -> str:
        return _PREFIX + base64.b64encode(self.raw).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What a `model.yaml.sig` says: who signed, and the 64 bytes of the signature."""

    key_id: str
    signature: bytes


def public_key(text: str) -> PublicKey:
    """Return the key written as "ed25519:<base64>". Raises InvalidArgument (PUBLIC_KEY_INVALID)."""
    if "PRIVATE KEY" in text:
        raise InvalidArgument("this is a private key, keep it to yourself: give the public one, the .pub file", reason="PUBLIC_KEY_INVALID")
    try:
        raw = base64.b64decode(text.strip().removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not text.strip().startswith(_PREFIX) or len(raw) != 32:
        raise InvalidArgument(
            "a public key is written ed25519: and 32 bytes in base64, as `plait artifact keygen` prints it", reason="PUBLIC_KEY_INVALID"
        )
    return PublicKey(raw=raw)


def generate() -> tuple[bytes, PublicKey]:
    """Make a key: the private one as PEM (PKCS 8, not encrypted: keep the file to yourself), and its public half."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, _public(key)


def sign(content: bytes, private_pem: bytes) -> tuple[bytes, PublicKey]:
    """Return the bytes of a `model.yaml.sig` for the bytes of a `model.yaml`. Raises InvalidArgument (PRIVATE_KEY_INVALID)."""
    key = _private(private_pem)
    public = _public(key)
    line = f"ed25519 {public.id} {base64.b64encode(key.sign(content)).decode()}\n"
    return line.encode(), public


def parse(signature: bytes) -> Signed:
    """Read a `model.yaml.sig`. Raises FailedPrecondition (SIGNATURE_INVALID)."""
    found = _LINE.match(signature)
    if found is None:
        raise FailedPrecondition(f"{FILE_NAME} is not a signature as `plait artifact sign` writes it", reason="SIGNATURE_INVALID")
    return Signed(key_id=found[1].decode(), signature=base64.b64decode(found[2]))


class Trust:
    """Whose signatures count, and whether one is required."""

    def __init__(self, keys: Iterable[str] = (), *, required: bool) -> None:
        """Raises InvalidArgument (PUBLIC_KEY_INVALID)."""
        self._keys: Mapping[str, PublicKey] = MappingProxyType({key.id: key for key in map(public_key, keys)})
        self.required = required

    def __repr__(self) -> str:
        return f"<Trust keys={sorted(self._keys)} required={self.required}>"

    def check(self, content: bytes, signature: bytes | None) -> str:
        """Return the id of the trusted key that signed the bytes of a `model.yaml`.

        Raises FailedPrecondition: SIGNATURE_MISSING, SIGNATURE_INVALID (no signature of these bytes), SIGNATURE_UNTRUSTED (another key's).
        """
        if signature is None:
            raise FailedPrecondition(
                f"the artifact is not signed: it has no {FILE_NAME}; sign it with `plait artifact sign`", reason="SIGNATURE_MISSING"
            )
        signed = parse(signature)
        key = self._keys.get(signed.key_id)
        if key is None:
            known = ", ".join(sorted(self._keys)) or "none"
            message = f"the artifact is signed with key {signed.key_id}, which is not trusted here; trusted keys: {known}"
            raise FailedPrecondition(message, reason="SIGNATURE_UNTRUSTED", metadata={"key": signed.key_id})
        if not _verifies(key, signed.signature, content):
            message = f"the signature by key {signed.key_id} is not of this model.yaml: it was changed after it was signed"
            raise FailedPrecondition(message, reason="SIGNATURE_INVALID", metadata={"key": signed.key_id})
        return signed.key_id


def _verifies(key: PublicKey, signature: bytes, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    public: Ed25519PublicKey = Ed25519PublicKey.from_public_bytes(key.raw)
    try:
        public.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _private(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        half = " (this is a public one; the private one lies beside it)" if pem.lstrip().startswith(_PREFIX.encode()) else ""
        message = f"this is not an Ed25519 private key in PEM without a password, as `plait artifact keygen` makes it{half}"
        raise InvalidArgument(message, reason="PRIVATE_KEY_INVALID") from None
    return key


def _public(key: Ed25519PrivateKey) -> PublicKey:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    return PublicKey(raw=key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))
