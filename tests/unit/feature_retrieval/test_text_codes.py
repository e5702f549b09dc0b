"""Words as numbers: the same for one and for many, stable as a vocabulary grows, spread over the buckets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.text_codes import Coder
from plait.registry.records import Feature
from plait.registry.shapes import code_of

WORDS = st.text("abü\0", max_size=3)


@given(st.lists(WORDS, unique=True, min_size=1, max_size=5), st.lists(WORDS, max_size=20), st.integers(1, 2**31 - 1))
def test_many_are_coded_as_one_is(vocabulary: list[str], texts: list[str], buckets: int) -> None:
    for feature in (
        Feature(name="w", dtype="string", vocabulary=tuple(vocabulary)),
        Feature(name="h", dtype="string", hash_buckets=buckets),
    ):
        codes = Coder.of(feature).codes([text.encode() for text in texts])
        assert codes.dtype == np.int32
        assert codes.tolist() == [code_of(feature, text.encode()) for text in texts]


@given(st.lists(WORDS, unique=True, min_size=2, max_size=6), st.integers(1, 5), WORDS)
def test_a_vocabulary_that_grows_keeps_its_codes(words: list[str], kept: int, other: str) -> None:
    old, new = (Coder.of(Feature(name="w", dtype="string", vocabulary=tuple(v))) for v in (words[:kept], words))
    known = [word.encode() for word in words[:kept]]
    assert old.codes(known).tolist() == new.codes(known).tolist() == list(range(1, len(known) + 1))
    assert (old.codes([other.encode()])[0] == 0) == (other not in words[:kept])


def test_hashes_are_what_is_documented_and_spread() -> None:
    feature = Feature(name="h", dtype="string", hash_buckets=16)
    assert code_of(Feature(name="h", dtype="string", hash_buckets=1000), b"acme") == 0x81A24D3CB3572630 % 1000
    codes = Coder.of(feature).codes([str(n).encode() for n in range(16_000)])
    counts = np.bincount(codes, minlength=16)
    assert counts.size == 16
    assert counts.min() > 850
    assert counts.max() < 1150
