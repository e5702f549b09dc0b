"""How one plait service opens a channel to another."""

from __future__ import annotations

from typing import Any, Final

import grpc

from plait.rpc.certificates import Certificates, Material, channel_credentials
from plait.rpc.credentials import SERVICE_TOKEN_HEADER
from plait.rpc.renewed_channel import RenewedChannel
from plait.settings import ChannelSettings

# A peer that vanishes without a word (a lost node) is noticed within 30 s; one that was restarted is found again within a second.
_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),  # services of one mesh reach each other; a proxy in the environment is meant for the world outside
    ("grpc.enable_retries", 0),  # retries are decided where the deadline and the other endpoints are known
)


def open_channel(
    address: str, settings: ChannelSettings, *, interceptors: list[grpc.aio.ClientInterceptor] | None = None
) -> grpc.aio.Channel:
    """Return a channel to `address` (host:port or a gRPC target). It connects on first use and reconnects by itself.

    Where settings name certificates, new calls use those that are in the files then. Raises FailedPrecondition (CERTIFICATE_UNUSABLE).
    """
    options = [
        *_OPTIONS,
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if settings.tls:

        def secure(material: Material) -> grpc.aio.Channel:
            return grpc.aio.secure_channel(address, channel_credentials(material), options=options, interceptors=interceptors)

        return RenewedChannel(Certificates(settings.tls_cert, settings.tls_key, settings.tls_ca), secure)
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


def service_metadata(settings: ChannelSettings) -> tuple[tuple[str, str], ...]:
    """Return the metadata by which the other service knows us as a plait service."""
    token = settings.service_token.get_secret_value()
    return ((SERVICE_TOKEN_HEADER, token),) if token else ()
