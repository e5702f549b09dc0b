from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.registry.certificates import Signer

SIGNER = Signer(b"k" * 32)


def certificate() -> pb.ErasureCertificate:
    made = pb.ErasureCertificate(
        id="erasure-1", tenant="shop", entity_type="user", erased_until_us=7, erased_at_us=5, not_covered=["backups"]
    )
    made.views.add(feature_view="profile", rows=2, durable_rows=1)
    SIGNER.sign(made, b"s\0\x03ann")
    return made


def test_who_has_the_key_can_verify_it_and_nobody_else() -> None:
    assert SIGNER.verify(certificate())
    assert Signer(b"k" * 32).verify(certificate())
    assert not Signer(b"l" * 32).verify(certificate())
    assert Signer(b"l" * 32).key_id != certificate().key_id == SIGNER.key_id


def test_it_names_the_entity_by_its_pseudonym_only() -> None:
    assert b"ann" not in certificate().SerializeToString()
    assert len(certificate().entity_hash) == 12
    assert "k" * 8 not in repr(SIGNER)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(position: int, change: int) -> None:
    content = bytearray(certificate().SerializeToString())
    content[position % len(content)] ^= change
    try:
        changed = pb.ErasureCertificate.FromString(bytes(content))
    except Exception:
        return
    assert changed == certificate() or not SIGNER.verify(changed)
