"""Ids as requests give them: of the declared kind, whole, and each once."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.entity_ids import unique


@given(st.lists(st.sampled_from(["1", "2", 1, 2, ("1", 1), ("1", "1")])))
def test_each_id_once_and_every_row_found_again(ids: list[Any]) -> None:
    once, inverse = unique(ids)
    assert len(set(once)) == len(once)
    assert (inverse is None) == (len(set(ids)) == len(ids))
    assert ids == (list(once) if inverse is None else [once[at] for at in inverse.tolist()])
