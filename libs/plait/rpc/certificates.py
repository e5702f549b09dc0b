"""TLS whose certificates are replaced on disk while the process runs, as cert-manager, SPIRE and ConfigMaps do every few days or hours.

Files are looked at, not watched: a ConfigMap changes by a symlink far up the path, of which no watch on the file hears. What cannot be used, such
as a file that is half written or a key that is not the certificate's, changes nothing: the pair before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from plait.errors import FailedPrecondition
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_Seen = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is in the files, PEM; None where no file is named. `ends_s`: when the first certificate of the chain ends, seconds since the epoch."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None
    ends_s: float


class Certificates:
    """The files of one listener or channel, as they last could be used."""

    def __init__(self, cert: Path | None, key: Path | None, ca: Path | None) -> None:
        """Raises FailedPrecondition (CERTIFICATE_UNUSABLE) where they cannot be used from the start."""
        self._paths: Final = (cert, key, ca)
        self._seen = self._look()
        self.material = self._read()

    def __repr__(self) -> str:
        return f"<Certificates {[str(path) for path in self._paths if path]}>"

    def renew(self) -> bool:
        """Read the files again if they have changed, and say whether there is something new. Quick where nothing has."""
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            material = self._read()
        except FailedPrecondition as error:
            log.warning("new certificates cannot be used, the ones before go on", error=error.message)
            return False
        renewed = material != self.material
        self.material = material
        if renewed:
            log.info("certificates were renewed", files=[str(path) for path in self._paths if path])
        return renewed

    def _look(self) -> _Seen:
        return tuple(_stamp(path) for path in self._paths)

    def _read(self) -> Material:
        try:
            cert, key, ca = (path.read_bytes() if path else None for path in self._paths)
            return Material(cert=cert, key=key, ca=ca, ends_s=_checked(cert, key, ca))
        except (OSError, ValueError, TypeError) as error:  # TypeError: the key is encrypted
            files = ", ".join(str(path) for path in self._paths if path)
            what = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
            raise FailedPrecondition(
                f"TLS needs a PEM certificate chain, its unencrypted key and PEM roots; {files}: {what}", reason="CERTIFICATE_UNUSABLE"
            ) from None


def server_credentials(certificates: Certificates, *, mutual: bool) -> grpc.ServerCredentials:
    """Return what a server listens with; each handshake is made with the newest material. `mutual`: callers must show a certificate, too."""

    def configuration(material: Material) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(material.key or b"", material.cert or b"")], root_certificates=material.ca)

    told = certificates.material

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for each handshake, on a thread of its own."""
        nonlocal told
        newest = certificates.material
        if newest is told:
            return None
        told = newest
        return configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        configuration(told),
        renewed,  # type: ignore[arg-type]  # None says that nothing is new, of which the stubs know nothing
        require_client_authentication=mutual,
    )


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """Return what a channel connects with; without roots the system's are trusted."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.cert)


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _checked(cert: bytes | None, key: bytes | None, ca: bytes | None) -> float:
    """Return when the certificate ends. Raises ValueError where the parts cannot be read or do not belong together."""
    from cryptography import x509  # noqa: PLC0415  (only who speaks TLS loads it)
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key  # noqa: PLC0415

    if ca is not None:
        x509.load_pem_x509_certificates(ca)
    if cert is None or key is None:
        return 0.0
    chain = x509.load_pem_x509_certificates(cert)
    form: Callable[..., bytes] = lambda public: public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # noqa: E731
    if form(chain[0].public_key()) != form(load_pem_private_key(key, None).public_key()):
        raise ValueError("the key is not the certificate's")
    return chain[0].not_valid_after_utc.timestamp()
