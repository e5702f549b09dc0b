"""The Prometheus endpoint over TLS: scraped while its certificate is replaced, and by nobody who shows none where one is asked for."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.authority import Authority

from plait.errors import FailedPrecondition
from plait.rpc.https import metrics_context
from plait.settings import TelemetrySettings
from plait.telemetry.metrics import Metrics


def scrape(address: str, context: ssl.SSLContext) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(f"https://localhost:{address.rpartition(':')[2]}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def shown(address: str, context: ssl.SSLContext) -> str:
    """Return the serial number of the certificate of a new connection."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        found: Any = tls.getpeercert()
    serial: str = found["serialNumber"]
    return serial


def test_it_is_scraped_with_whatever_certificate_is_there(tmp_path: Path) -> None:
    authority = Authority()
    first, second = authority.issue(), authority.issue()
    cert, key = first.write(tmp_path)
    client = ssl.create_default_context(cadata=authority.cert.decode())
    metrics = Metrics()
    metrics.counter("calls", "calls").inc()
    endpoint = metrics.serve("127.0.0.1", 0, metrics_context(TelemetrySettings(metrics_tls_cert=cert, metrics_tls_key=key)))
    try:
        assert "calls_total 1.0" in scrape(endpoint.address, client)
        assert int(shown(endpoint.address, client), 16) == first.serial
        cert.write_bytes(second.cert)  # half of the new pair is there: the old one goes on
        assert int(shown(endpoint.address, client), 16) == first.serial
        second.write(tmp_path)
        assert int(shown(endpoint.address, client), 16) == second.serial
        assert "calls_total 1.0" in scrape(endpoint.address, client)
        idle = socket.create_connection(("127.0.0.1", int(endpoint.address.rpartition(":")[2])), 10)  # says nothing, and holds up nobody
        assert "calls_total 1.0" in scrape(endpoint.address, client)
        idle.close()
    finally:
        endpoint.close()


def test_who_shows_no_certificate_learns_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    authority = Authority()
    cert, key = authority.issue().write(tmp_path)
    own_cert, own_key = authority.issue("prometheus").write(tmp_path, "prometheus")
    settings = TelemetrySettings(metrics_tls_cert=cert, metrics_tls_key=key, metrics_tls_client_ca=authority.write(tmp_path))
    metrics = Metrics()
    metrics.counter("calls", "calls").inc()
    endpoint = metrics.serve("127.0.0.1", 0, metrics_context(settings))
    try:
        client = ssl.create_default_context(cadata=authority.cert.decode())
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            scrape(endpoint.address, client)
        client.load_cert_chain(own_cert, own_key)
        assert "calls_total 1.0" in scrape(endpoint.address, client)
    finally:
        endpoint.close()
    assert "Traceback" not in capfd.readouterr().err


def test_what_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    assert metrics_context(TelemetrySettings()) is None
    cert, key = Authority().issue().write(tmp_path)
    key.write_bytes(Authority().issue().key)
    with pytest.raises(FailedPrecondition, match="TLS needs"):
        metrics_context(TelemetrySettings(metrics_tls_cert=cert, metrics_tls_key=key))
    with pytest.raises(ValueError, match="go together"):
        TelemetrySettings(metrics_tls_cert=cert)
    with pytest.raises(ValueError, match="metrics_tls_client_ca needs"):
        TelemetrySettings(metrics_tls_client_ca=cert)
