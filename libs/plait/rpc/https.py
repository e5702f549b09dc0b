"""TLS for what listens without gRPC: the Prometheus endpoint. Its certificate is replaced on disk like those of gRPC's ports."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from plait.rpc.certificates import Certificates
from plait.settings import TelemetrySettings


def metrics_context(settings: TelemetrySettings) -> Callable[[], ssl.SSLContext] | None:
    """Return what gives the newest context, None where the endpoint speaks clear text. Raises FailedPrecondition (CERTIFICATE_UNUSABLE).

    Ask it on one thread. Scrapes are few, so each looks at the files itself.
    """
    cert, key, ca = settings.metrics_tls_cert, settings.metrics_tls_key, settings.metrics_tls_client_ca
    if cert is None or key is None:
        return None
    certificates = Certificates(cert, key, ca)
    context, fresh = _context(cert, key, ca), True

    def newest() -> ssl.SSLContext:
        nonlocal context, fresh
        fresh = not certificates.renew() and fresh
        if not fresh:
            try:
                context, fresh = _context(cert, key, ca), True
            except (ssl.SSLError, OSError):
                """Replaced again while it was read: the next scrape looks anew."""
        return context

    return newest


def _context(cert: Path, key: Path, ca: Path | None) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(cert, key)
    if ca is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(ca)
    return made
