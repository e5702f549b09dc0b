"""The public keys of those who issue tokens (JWKS, RFC 7517), kept fresh behind the calls: no call waits for an issuer that is away.

Read every five minutes, and when a token names a key that is not known, every ten seconds at most. An issuer that cannot be reached keeps
the keys it had for a day; one that answers without a key has taken it back.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from plait.settings import JwtIssuer
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

REFRESH_S: Final = 300.0
AGAIN_S: Final = 10.0
KEEP_S: Final = 86_400.0
_TIMEOUT_S: Final = 5.0
_MAX_BYTES: Final = 1 << 20

Jwk = Mapping[str, Any]


class Issuer:
    """One issuer's settings and keys."""

    def __init__(self, settings: JwtIssuer, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._keys: dict[str, Jwk] = {}  # by kid; "" where a key has none
        self._read_at = -KEEP_S  # when it last answered
        self._tried_at = -KEEP_S
        self._reading: asyncio.Task[None] | None = None
        self.reads = 0

    def __repr__(self) -> str:
        return f"<Issuer {self.settings.issuer} keys={len(self._keys)} reads={self.reads}>"

    def key(self, kid: str) -> Jwk | None:
        """Return a key by its id. A token that names none is for an issuer that has one key only."""
        if self._clock() - self._read_at > KEEP_S:
            return None
        if not kid:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def look(self, *, unknown: bool = False) -> asyncio.Task[None] | None:
        """Begin to read the keys where that is due, or a key is `unknown` and it was not tried just now; return the reading under way."""
        since_s = self._clock() - self._tried_at
        if self._reading is None and (since_s >= REFRESH_S or ((unknown or not self._keys) and since_s >= AGAIN_S)):
            self._tried_at = self._clock()
            self._reading = asyncio.create_task(self._read(), name="jwks")
        return self._reading

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        self.reads += 1
        try:
            keys = _parsed(await asyncio.to_thread(_fetched, self.settings))
        except (OSError, ValueError) as error:
            log.warning("the keys of an issuer of tokens cannot be read", issuer=self.settings.issuer, error=type(error).__name__)
        else:
            if keys.keys() != self._keys.keys():
                log.info("the keys of an issuer of tokens", issuer=self.settings.issuer, keys=len(keys))
            self._keys = keys
            self._read_at = self._clock()
        finally:
            self._reading = None


class KeyUnknown(Exception):
    """A token is signed with a key that is not known yet; `issuer` may know it when asked."""

    def __init__(self, issuer: Issuer) -> None:
        super().__init__()
        self.issuer = issuer


def _fetched(settings: JwtIssuer) -> bytes:
    if not settings.jwks.startswith("https://"):
        return Path(settings.jwks).read_bytes()
    context = ssl.create_default_context(cafile=settings.jwks_ca)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Stay())
    with opener.open(settings.jwks, timeout=_TIMEOUT_S) as answer:
        data: bytes = answer.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("too large")
    return data


class _Stay(urllib.request.HTTPRedirectHandler):
    """Keys come from where the settings say, and from nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _parsed(data: bytes) -> dict[str, Jwk]:
    """Return the keys for signatures by id; secret (symmetric) ones are no issuer's to publish. Raises ValueError."""
    found = json.loads(data)
    listed = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise ValueError("no JWK set")  # noqa: TRY004  (it is what was sent that is wrong)
    usable = [key for key in listed if isinstance(key, dict) and key.get("kty") in {"RSA", "EC", "OKP"} and key.get("use", "sig") == "sig"]
    return {str(key.get("kid", "")): key for key in usable}
