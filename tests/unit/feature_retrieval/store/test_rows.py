"""The answer of a store: what it says when everything came, and that nobody can change what all answers share."""

from __future__ import annotations

import numpy as np

from feature_retrieval.store.rows import NONE, Read


def test_an_answer_is_whole_unless_a_key_was_late_or_failed() -> None:
    assert Read([b"row", None]).whole
    assert not Read([b"row", None], late=np.array([1])).whole
    assert not Read([b"row", None], failed=np.array([1])).whole


def test_the_empty_positions_are_shared_and_read_only() -> None:
    assert Read([]).late is Read([]).failed is NONE
    assert not NONE.flags.writeable
