"""Signs the certificate of an erasure: HMAC-SHA256 (RFC 2104) under the service's privacy key over the message without its signature."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.telemetry.pseudonyms import Pseudonyms


class Signer:
    """Signs with one key of at least 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._pseudonyms = Pseudonyms(key)
        self.key_id = hashlib.sha256(b"plait privacy key" + key).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"<Signer key_id={self.key_id}>"

    def sign(self, certificate: Any, entity: bytes) -> None:
        """Complete an ErasureCertificate for an entity (its typed id), of which it holds the pseudonym only."""
        certificate.entity_hash = self._pseudonyms.of(certificate.tenant, certificate.entity_type, entity)
        certificate.key_id = self.key_id
        certificate.signature = self._mac(certificate)

    def verify(self, certificate: Any) -> bool:
        """Say whether this key signed the certificate and nothing of it changed since."""
        return hmac.compare_digest(certificate.signature, self._mac(certificate))

    def _mac(self, certificate: Any) -> bytes:
        unsigned = pb.ErasureCertificate()
        unsigned.CopyFrom(certificate)
        unsigned.ClearField("signature")
        return hmac.digest(self._key, unsigned.SerializeToString(deterministic=True), "sha256")
