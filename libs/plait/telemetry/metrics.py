"""Prometheus metrics of one process: made by the composition root and handed to the parts, never global."""

from __future__ import annotations

import collections
import socket
import ssl
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from plait.telemetry.logging import get_logger

log = get_logger(__name__)

# Seconds. Starts at half a millisecond because that is where our services answer.
LATENCY_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_SCRAPE_S: Final = 30.0  # longest wait for a part of a scrape over TLS


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        """Return a new counter; labels have bounded values, never ids."""
        return Counter(name, documentation, labels, registry=self.registry)

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        """Return a new gauge."""
        return Gauge(name, documentation, labels, registry=self.registry)

    def histogram(
        self, name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS_S
    ) -> Histogram:
        """Return a new histogram, of seconds unless `buckets` say otherwise."""
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)

    def serve(self, host: str, port: int, tls: Callable[[], ssl.SSLContext] | None = None) -> MetricsEndpoint:
        """Answer Prometheus' scrapes on a thread of its own until closed; port 0 picks a free one. `tls` is asked for each connection."""
        return MetricsEndpoint(self.registry, host, port, tls)


def _broken(request: object, client_address: object) -> None:
    """Say that a scrape failed, in place of socketserver's traceback on stderr: whoever scrapes went away, or shows no certificate."""
    log.info("a scrape of the metrics failed", client=str(client_address), error=type(sys.exception()).__name__)


def _secured(accepted: tuple[socket.socket, Any], tls: ssl.SSLContext) -> tuple[socket.socket, Any]:
    """Put TLS around a connection. The handshake waits for the first read, in the connection's own thread: it must hold up nobody else's."""
    plain, address = accepted
    plain.settimeout(_SCRAPE_S)
    return tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe many values at once, which costs a fifth of observing each: a lock per bucket they fall in instead of two per value.

    Reaches for what `Histogram.observe` uses itself and the package does not name in public; a test compares the two.
    """
    bounds = histogram._upper_bounds  # noqa: SLF001
    for at, count in collections.Counter([bisect_left(bounds, value) for value in values]).items():
        histogram._buckets[at].inc(count)  # noqa: SLF001
    histogram._sum.inc(sum(values))  # noqa: SLF001


class MetricsEndpoint:
    """The listening side of `Metrics.serve`."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        self._server.handle_error = _broken  # type: ignore[method-assign]
        if tls is not None:
            self._server.get_request = lambda: _secured(self._server.socket.accept(), tls())  # type: ignore[method-assign]
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening and wait for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
