"""What records say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plait.registry.records import Feature


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (Feature(name="a", default=2.5), 2.5),
        (Feature(name="a", default=0), 0),
        (Feature(name="a", dtype="bool", default=True), 1),
        (Feature(name="a"), math.nan),
        (Feature(name="a", dtype="float16"), math.nan),
        (Feature(name="a", dtype="int64"), 0),
        (Feature(name="a", dtype="bool"), 0),
    ],
)
def test_what_stands_in_for_an_unknown_value(feature: Feature, expected: float) -> None:
    np.testing.assert_equal(float(feature.stand_in), float(expected))
