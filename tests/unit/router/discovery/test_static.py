"""Addresses as people write them."""

from __future__ import annotations

import pytest

from router.discovery import static


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:50053", ("127.0.0.1:50053",)),
        (" b:2 , a:1 ,\n", ("b:2", "a:1")),
        ("dns:///worker.ml.svc.cluster.local:443", ("dns:///worker.ml.svc.cluster.local:443",)),
        ("[::1]:80,ipv6:[fe80::1]:81,ipv4:10.0.0.1:82", ("[::1]:80", "ipv6:[fe80::1]:81", "ipv4:10.0.0.1:82")),
    ],
)
def test_addresses_in_order(text: str, expected: tuple[str, ...]) -> None:
    assert static.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        (" , ", "at least one"),
        ("worker", "'worker' is not host:port"),
        ("worker:0", "port of 1 to 65535"),
        ("worker:65536", "port of 1 to 65535"),
        ("http://worker:80", "is not host:port"),
        ("::1:80", "is not host:port"),
        ("a:1 b:2", "is not host:port"),
        ("a:1,b:2,a:1", "listed twice"),
    ],
)
def test_what_is_no_address_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        static.parse(text)
