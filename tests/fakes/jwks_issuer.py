"""An issuer of tokens: keys of each kind, tokens good and bad, and its JWKS over HTTPS or in a file; it can be away, and rotates."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from tests.fakes.authority import Authority

ISSUER = "https://id.example.com"
AUDIENCE = "plait"


def encoded(part: Any) -> str:
    """Return JSON, or bytes, as a token holds them."""
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Key:
    """A key of one algorithm under an id."""

    def __init__(self, algorithm: str = "RS256", kid: str = "k1") -> None:
        self.algorithm, self.kid = algorithm, kid
        self.private: Any
        described: Any
        if algorithm.startswith(("RS", "PS")):
            self.private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            described = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        elif algorithm.startswith("ES"):
            self.private = ec.generate_private_key(ec.SECP256R1() if algorithm == "ES256" else ec.SECP384R1())
            described = ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        else:
            self.private = ed25519.Ed25519PrivateKey.generate()
            described = OKPAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        self.jwk = {k: v for k, v in described.items() if k != "key_ops"} | {"kid": kid, "use": "sig"}

    def sign(self, claims: dict[str, Any] | None = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
        """Return a token; a claim changed to None is left out."""
        now = time.time()
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "svc-feed", "iat": now, "exp": now + 600} if claims is None else claims
        said = {name: value for name, value in (said | changes).items() if value is not None}
        return jwt.encode(said, self.private, algorithm=self.algorithm, headers={"kid": self.kid} | (header or {}))


class JwksIssuer:
    """Serves a JWK set on https://localhost:port/keys in a thread; `asked` counts. Use it in `with`."""

    def __init__(self, authority: Authority, folder: Path, *keys: Key) -> None:
        self.keys = [*keys]
        self.asked = 0
        self.status = 200
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                body = json.dumps({"keys": [key.jwk for key in issuer.keys]}).encode()
                self.send_response(issuer.status)
                if issuer.status == 302:
                    self.send_header("Location", "https://localhost:1/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Tests need no access log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue().write(folder, "issuer"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}/keys"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="jwks issuer")

    def __enter__(self) -> JwksIssuer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
