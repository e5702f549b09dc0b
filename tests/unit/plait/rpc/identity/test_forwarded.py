"""x-forwarded-client-cert as Envoy writes it, and as somebody would who wants to be taken for another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.rpc.identity.forwarded import last_uris

A, B = "spiffe://td/ns/a/sa/a", "spiffe://td/ns/b/sa/b"


@pytest.mark.parametrize(
    ("header", "uris"),
    [
        (f"By={B};Hash=ab;URI={A}", (A,)),
        (f'By={B};Hash=ab;Subject="CN=x,O=y;z";URI={A};DNS=a.example', (A,)),
        (f"URI={B},URI={A}", (A,)),  # the nearest proxy's is last
        (f'Subject="a,URI={B}",URI={A}', (A,)),
        (f'URI={A},Subject="a,URI={B}"', ()),
        (f'Subject="\\"",URI={A}', (A,)),
        (f'Subject="\\",URI={B}",URI={A}', (A,)),
        (f"URI={A};URI={B}", (A, B)),
        (f"uri={A}", (A,)),
        (f'URI="{A}"', (A,)),
        (f'URI="{A}', ()),
        (f'URI="{A}"x', ()),
        (f'URI=x"{A}"', ()),
        (f"URI={A};nonsense", ()),
        ("", ()),
        ("URI=", ("",)),
        (f"By={A}", ()),
        ("URI=" + "x" * 20_000, ()),
    ],
)
def test_the_uris_of_the_last_element(header: str, uris: tuple[str, ...]) -> None:
    assert last_uris(header) == uris


@given(st.text(max_size=60))
def test_whatever_comes_before_or_stands_in_quotes_decides_nothing(sent: str) -> None:
    """A caller's own header is passed on by a proxy that appends, and a subject is chosen by whoever asks for a certificate."""
    quoted = sent.replace("\\", "\\\\").replace('"', '\\"')
    assert last_uris(f'By={B};Subject="{quoted}";URI={A}') == (A,)
    found = last_uris(f"{sent},URI={A}")
    assert found in ((A,), ())  # () where what was sent leaves a quote open


@given(st.text(alphabet='",;=\\URI a', max_size=40))
def test_nothing_makes_it_fail(header: str) -> None:
    assert isinstance(last_uris(header), tuple)
