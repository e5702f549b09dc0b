"""A signature is of these bytes, by this key, or it is refused; and the reason says which."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry import signing
from plait.registry.signing import Trust

CONTENT = b"kind: ModelArtifact\n"
PEM, KEY = signing.generate()
OTHER_PEM, OTHER = signing.generate()
SIGNATURE, _ = signing.sign(CONTENT, PEM)


def reason(trust: Trust, content: bytes, signature: bytes | None) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        trust.check(content, signature)
    return refused.value.reason


def test_a_trusted_signature_passes_and_names_its_key() -> None:
    assert Trust([str(OTHER), str(KEY)], required=True).check(CONTENT, SIGNATURE) == KEY.id


def test_the_file_holds_a_plain_ed25519_signature_of_the_bytes() -> None:
    word, key_id, _ = SIGNATURE.decode().split()
    assert (word, key_id) == ("ed25519", KEY.id)
    Ed25519PublicKey.from_public_bytes(KEY.raw).verify(signing.parse(SIGNATURE).signature, CONTENT)


def test_each_refusal_has_its_reason() -> None:
    trust = Trust([str(KEY)], required=True)
    assert reason(trust, CONTENT, None) == "SIGNATURE_MISSING"
    assert reason(trust, CONTENT + b"\n", SIGNATURE) == "SIGNATURE_INVALID"
    assert reason(trust, CONTENT, signing.sign(CONTENT, OTHER_PEM)[0]) == "SIGNATURE_UNTRUSTED"
    claimed = signing.sign(CONTENT, OTHER_PEM)[0].replace(OTHER.id.encode(), KEY.id.encode())
    assert reason(trust, CONTENT, claimed) == "SIGNATURE_INVALID"
    assert reason(Trust([], required=True), CONTENT, SIGNATURE) == "SIGNATURE_UNTRUSTED"


@given(st.integers(0, 511))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    spoilt = bytearray(signing.parse(SIGNATURE).signature)
    spoilt[bit // 8] ^= 1 << bit % 8
    line = b"ed25519 " + KEY.id.encode() + b" " + __import__("base64").b64encode(spoilt) + b"\n"
    assert reason(Trust([str(KEY)], required=True), CONTENT, line) == "SIGNATURE_INVALID"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_without_a_crash(content: bytes) -> None:
    assert reason(Trust([str(KEY)], required=True), CONTENT, content) == "SIGNATURE_INVALID"


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 44, "ed25519:" + "é" * 44, str(KEY)[8:]])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Trust([text], required=False)
    assert refused.value.reason == "PUBLIC_KEY_INVALID"


def test_a_public_key_reads_back() -> None:
    assert signing.public_key(f" {KEY}\n") == KEY


def other_kinds() -> list[bytes]:
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    curve = ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
    return [b"", b"no key", curve, str(KEY).encode()]


@pytest.mark.parametrize("pem", other_kinds(), ids=["empty", "text", "another curve", "public key"])
def test_what_is_no_private_key_is_refused(pem: bytes) -> None:
    with pytest.raises(InvalidArgument) as refused:
        signing.sign(CONTENT, pem)
    assert refused.value.reason == "PRIVATE_KEY_INVALID"


def test_reading_the_registry_does_not_load_cryptography() -> None:
    code = "import sys, plait.registry.manifests; sys.exit('cryptography' in sys.modules or 'obstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
