"""Text as models see it: a small number per word, made once when a row is written, so that reading text costs what reading an int32 does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from plait.registry.records import Feature
from plait.registry.shapes import OUT_OF_VOCABULARY, hash_code


class Coder:
    """Codes the texts of one feature, as `plait.registry.shapes.code_of` does one."""

    def __init__(self, code: Callable[[bytes], int]) -> None:
        self._code = code

    @classmethod
    def of(cls, feature: Feature) -> Coder:
        """Return the coder of a string feature: by its vocabulary, else by its number of hash buckets."""
        if feature.hash_buckets:
            return cls(lambda text: hash_code(text, feature.hash_buckets))
        known = {word.encode(): code for code, word in enumerate(feature.vocabulary, start=1)}
        return cls(lambda text: known.get(text, OUT_OF_VOCABULARY))

    def codes(self, texts: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Return one code per text: [texts]. Each distinct text is coded once."""
        distinct = {text: self._code(text) for text in set(texts)}
        return np.fromiter(map(distinct.__getitem__, texts), np.int32, len(texts))
