"""The header by which a proxy tells whose certificate it saw: x-forwarded-client-cert, in the form of Envoy's.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert: elements divided by commas, the
last one put there by the nearest proxy; each of `Key=value` pairs divided by semicolons; values with ,;= in them in double quotes, in which
a backslash stands before a quote. Anybody can send it, so it counts only where the connection itself proves a trusted proxy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

FORWARDED_HEADER: Final = "x-forwarded-client-cert"
_MAX_CHARS: Final = 16_384


def last_uris(header: str) -> tuple[str, ...]:
    """Return the URIs of the last element, none where the header is not well formed."""
    try:
        if len(header) > _MAX_CHARS:
            return ()
        *_, last = _divided(header, ",")
        pairs = [pair.partition("=") for pair in _divided(last, ";")]
        if not all(equals for _, equals, _ in pairs):
            return ()
        return tuple(_unquoted(value) for key, _, value in pairs if key.strip().upper() == "URI")
    except ValueError:
        return ()


def _divided(text: str, by: str) -> Iterator[str]:
    """Yield the parts of a text between marks that stand outside of quotes. Raises ValueError where a quote is not closed."""
    start, quoted, escaped = 0, False, False
    for at, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\" and quoted:
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == by and not quoted:
            yield text[start:at]
            start = at + 1
    if quoted:
        raise ValueError("a quote is not closed")
    yield text[start:]


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        if '"' in value:
            raise ValueError("a quote within a value")
        return value
    inner = value[1:-1]
    if len(value) < 2 or not value.endswith('"'):
        raise ValueError("more after a quoted value")
    return inner.replace('\\"', '"').replace("\\\\", "\\")
