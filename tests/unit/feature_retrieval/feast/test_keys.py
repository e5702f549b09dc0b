"""Keys and fields as Feast makes them. Byte for byte against the package itself, where it is installed."""

from __future__ import annotations

import json
import random
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.feast_repository import CLIENTS, PYTHON, needs_feast

from feature_retrieval.feast.keys import EntityKeys, field_of, murmur3_32, time_field_of
from feature_retrieval.row_codec import Id
from plait.registry.records import FeastSource

DRIVER = FeastSource(project="drivers", view="v", join_keys=("driver_id",))
PAIR = FeastSource(project="drivers", view="v", join_keys=("driver_id", "customer_id"))


@pytest.mark.parametrize(
    ("source", "entity_id", "expected"),
    [
        (DRIVER, 1001, "0100000002000000090000006472697665725f69640400000008000000e90300000000000064726976657273"),
        (
            PAIR,
            (1001, "zoë"),
            (
                "02000000020000000b000000637573746f6d65725f696402000000090000006472697665725f696402000000040000007a6fc3ab"
                "0400000008000000e90300000000000064726976657273"
            ),
        ),
    ],
)
def test_keys_that_feast_0_67_wrote(source: FeastSource, entity_id: Id, expected: str) -> None:
    assert EntityKeys(source).keys([entity_id, entity_id]) == [bytes.fromhex(expected)] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("driver_hourly_stats:conv_rate", "6160e3da"), ("PairStats:Rides", "bd25c1b9"), (":", None), ("abc", "fa93ddb3"), ("é", "87071110")],
)
def test_fields_that_feast_0_67_wrote(text: str, expected: str | None) -> None:
    assert expected is None or murmur3_32(text.encode()).to_bytes(4, "little").hex() == expected
    view, _, feature = text.partition(":")
    if feature:
        assert field_of(view, feature) == murmur3_32(text.encode()).to_bytes(4, "little")
    assert time_field_of("v") == b"_ts:v"


def test_murmur_of_every_length_of_tail() -> None:
    known = {b"": 0, b"a": 0x3C2569B2, b"abc": 0xB3DD93FA, b"test": 0xBA6BD213, b"Hello, world!": 0xC0363E43}
    assert {data: murmur3_32(data) for data in known} == known
    assert murmur3_32(b"", seed=1) == 0x514E28B7


_PART = st.one_of(st.text(max_size=8), st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.tuples(_PART, _PART), min_size=2, max_size=6, unique=True))
def test_other_ids_have_other_keys(ids: list[tuple[str | int, str | int]]) -> None:
    assert len(set(EntityKeys(PAIR).keys(ids))) == len(ids)


@needs_feast
def test_keys_and_fields_are_feasts_own() -> None:
    generator = random.Random(4)  # noqa: S311  (nothing is hidden)

    def text() -> str:
        return "".join(
            chr(generator.choice((65, 97, 0, 32, 233, 0x4E16, 0x1F600)) + generator.randrange(20)) for _ in range(generator.randrange(12))
        )

    asked, ours = [], []
    for _ in range(300):
        names = list({text() for _ in range(generator.randrange(1, 5))})
        values = [generator.choice([text(), generator.randrange(-(2**63), 2**63)]) for _ in names]
        project = text()
        asked.append([project, names, values])
        source = FeastSource(project=project, view="v", join_keys=tuple(names))
        ours.append(EntityKeys(source).keys([values[0] if len(names) == 1 else tuple(values)])[0].hex())
    texts = [f"{text()}:{text()}" for _ in range(300)]
    sent = json.dumps({"keys": asked, "fields": texts})
    done = subprocess.run([str(PYTHON), str(CLIENTS / "feast_keys.py")], input=sent, capture_output=True, text=True, check=True, timeout=60)
    theirs = json.loads(done.stdout)
    assert ours == theirs["keys"]
    assert [field_of(*t.split(":", 1)).hex() for t in texts] == theirs["fields"]
