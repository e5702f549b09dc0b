"""Feature sets compiled against views: which bytes of a row go into which column of which tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_retrieval.row_codec import KeySpace
from feature_retrieval.views import Plan, Plans, Run, compile_plan, schemas_of
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureSet, FeatureView, ModelInput, Snapshot

ITEM = Entity(type="item")
STATS = FeatureView(
    name="stats", entity=ITEM, version=3, features=(Feature(name="a", default=1.5), Feature(name="b", default=-1), Feature(name="c"))
)
CONTENT = FeatureView(
    name="content",
    entity=ITEM,
    features=(Feature(name="x"), Feature(name="n", dtype="int64", default=7), Feature(name="flag", dtype="bool"), Feature(name="y")),
)
PROFILE = FeatureView(name="profile", entity=Entity(type="user", key="int64"), features=(Feature(name="age", default=30),))


def snapshot_with(*inputs: ModelInput, views: tuple[FeatureView, ...] = (STATS, CONTENT, PROFILE)) -> Snapshot:
    return Snapshot(revision=4, feature_views={v.name: v for v in views}, feature_sets={"home": FeatureSet(name="home", inputs=inputs)})


def plan_of(*inputs: ModelInput, views: tuple[FeatureView, ...] = (STATS, CONTENT, PROFILE), wanted: tuple[str, ...] = ()) -> Plan:
    return compile_plan(snapshot_with(*inputs, views=views), "home", wanted)


def item(*features: str, name: str = "item", dtype: Any = "float32") -> ModelInput:
    return ModelInput(name=name, entity="item", features=features, dtype=dtype)


USER = ModelInput(name="user", entity="user", features=("profile:age",))


def gathered(plan: Plan, values: dict[str, float]) -> list[list[float]]:
    """What a plan's runs copy out of one row per view, in which each feature has its value; NaN where nothing is copied."""
    tensors = [np.full((1, t.width), np.nan) for t in plan.tensors]
    for entity in plan.entities:
        for view in entity.views:
            codec = view.current.codec
            block = codec.blank(1)
            for name, column in codec.columns.items():
                value = np.array([values[f"{view.view.name}:{name}"]], column.dtype)
                block[0, column.offset : column.offset + column.dtype.itemsize] = value.view(np.uint8)
            for run in view.current.runs:
                tensors[run.tensor][:, run.column_from : run.column_to] = block[:, run.row_from : run.row_to].view(run.dtype)
    return [t[0].tolist() for t in tensors]


VALUES = {"stats:a": 1, "stats:b": 2, "stats:c": 3, "content:x": 4, "content:n": 5, "content:flag": 1, "content:y": 6, "profile:age": 7}


@pytest.mark.parametrize(
    "features",
    [
        ("stats:a", "stats:b", "stats:c"),
        ("stats:c", "stats:b", "stats:a"),
        ("stats:b", "content:n", "stats:a", "content:x", "content:flag"),
        ("content:y", "content:x", "content:x", "stats:c"),
        ("stats:a", "content:x", "stats:b", "stats:c"),
    ],
)
def test_columns_of_several_views_land_in_the_order_asked(features: tuple[str, ...]) -> None:
    plan = plan_of(item(*features))
    assert gathered(plan, VALUES) == [[VALUES[f] for f in features]]
    [entity] = plan.entities
    for view in entity.views:  # cells and names are what defaults are put by
        assert [f"{view.view.name}:{name}" for name in view.names[0]] == [features[at] for at in view.cells[0].tolist()]


def test_neighbours_are_moved_by_one_copy() -> None:
    [view] = plan_of(item("stats:a", "stats:b", "stats:c")).entities[0].views
    assert view.current.runs == (Run(40, 52, np.dtype("<f4"), 0, 0, 3),)
    [view] = plan_of(item("stats:a", "stats:b"), item("stats:c", name="more")).entities[0].views
    assert [(run.tensor, run.row_from, run.row_to) for run in view.current.runs] == [(0, 40, 48), (1, 48, 52)]  # not across tensors
    stats, _ = plan_of(item("stats:a"), item("content:x", "stats:b", name="more")).entities[0].views
    assert [(run.tensor, run.column_from) for run in stats.current.runs] == [(0, 0), (1, 1)]
    [view] = plan_of(item("content:x", "content:n", "content:flag")).entities[0].views
    assert len(view.current.runs) == 3  # not across dtypes
    vectors = FeatureView(
        name="v",
        entity=ITEM,
        features=tuple(Feature(name=n, dtype="int8", width=2, scale=s) for n, s in zip("abcd", (0.5, 0.25, 0.25, 0), strict=True)),
    )
    [view] = plan_of(item("v:a", "v:b", "v:c", "v:d"), views=(vectors,)).entities[0].views
    assert [(run.column_from, run.column_to, run.scale) for run in view.current.runs] == [(0, 2, 0.5), (2, 6, 0.25), (6, 8, 0.0)]


def test_tensors_and_entities() -> None:
    plan = plan_of(USER, item("stats:a", "content:n"), item("stats:b", name="light", dtype="float64"))
    assert [(t.name, t.entity_type, t.dtype, t.number, t.width) for t in plan.tensors] == [
        ("user", "user", np.dtype("<f4"), 11, 1),
        ("item", "item", np.dtype("<f4"), 11, 2),
        ("light", "item", np.dtype("<f8"), 12, 1),
    ]
    assert [(e.entity_type, e.entity and e.entity.key, e.tensors, [v.view.name for v in e.views]) for e in plan.entities] == [
        ("user", "int64", (0,), ["profile"]),
        ("item", "string", (1, 2), ["stats", "content"]),  # stats is read once for both
    ]
    stats = plan.entities[1].views[0]
    assert {at: cells.tolist() for at, cells in stats.cells.items()} == {1: [0], 2: [0]}
    assert stats.key_space("shop") == KeySpace.of("shop", "item", "stats", 3)


def test_only_the_asked_inputs_are_compiled_in_the_set_s_order() -> None:
    inputs = (USER, item("stats:a"), item("content:x", name="content"))
    plan = plan_of(*inputs, wanted=("content", "user"))
    assert [t.name for t in plan.tensors] == ["user", "content"]
    assert [v.view.name for e in plan.entities for v in e.views] == ["profile", "content"]


def test_defaults_are_cast_to_the_tensor_and_nan_where_there_is_none() -> None:
    plan = plan_of(item("stats:c", "content:n", "stats:a", "content:y"), item("content:n", name="count", dtype="int32"))
    stats, content = plan.entities[0].views
    np.testing.assert_array_equal(stats.defaults[0], np.array([np.nan, 1.5], np.float32))
    np.testing.assert_array_equal(content.defaults[0], np.array([7, np.nan], np.float32))
    np.testing.assert_array_equal(content.defaults[1], np.array([7], np.int32))
    assert content.defaults[0].dtype == np.float32
    assert content.defaults[1].dtype == np.int32
    assert not stats.has_all_defaults
    assert not content.has_all_defaults
    assert plan_of(item("stats:a", "content:n")).entities[0].views[0].has_all_defaults  # only what is asked counts


def test_large_whole_defaults_keep_every_digit() -> None:
    big = FeatureView(name="big", entity=ITEM, features=(Feature(name="n", dtype="int64", default=(1 << 62) + 1), Feature(name="x")))
    [view] = plan_of(item("big:n", dtype="int64"), item("big:x", name="x"), views=(big,)).entities[0].views
    assert view.defaults[0].tolist() == [(1 << 62) + 1]


def test_rows_of_every_schema_have_a_picture() -> None:
    old = FeatureSchema(id=1, features=STATS.features[:1])
    view = FeatureView(name="stats", entity=ITEM, features=STATS.features, schemas=(old, FeatureSchema(id=5, features=STATS.features)))
    [plan] = plan_of(item("stats:b", "stats:a"), views=(view,)).entities[0].views
    assert sorted(plan.pictures) == [1, 5]
    assert plan.current is plan.pictures[5]
    assert not plan.current.absent
    assert plan.pictures[1].absent  # it has no b
    assert [(run.column_from, run.column_to) for run in plan.pictures[1].runs] == [(1, 2)]
    [only_a] = plan_of(item("stats:a"), views=(view,)).entities[0].views
    assert not only_a.pictures[1].absent
    assert schemas_of(view) == view.schemas
    assert schemas_of(STATS) == (FeatureSchema(id=1, features=STATS.features),)


def test_the_null_mask_is_of_the_asked_columns_only() -> None:
    [view] = plan_of(item("stats:c")).entities[0].views
    block = view.current.codec.blank(2)
    view.current.codec.set_nulls(block, np.array([[True, True, False], [False, False, True]]))
    assert view.current.codec.has_null(block, view.current.null_mask).tolist() == [False, True]


def test_unknown_sets_and_inputs_are_refused_with_what_there_is() -> None:
    snapshot = snapshot_with(USER, item("stats:a"))
    with pytest.raises(NotFound, match=r"no feature set 'hone'; did you mean 'home'\?: see 'plait get featureset'") as caught:
        compile_plan(snapshot, "hone")
    assert caught.value.reason == "FEATURE_SET_NOT_FOUND"
    with pytest.raises(InvalidArgument, match=r"\['items', 'users'\]; feature set 'home' has \['user', 'item'\]"):
        compile_plan(snapshot, "home", ("users", "items"))
    with pytest.raises(InvalidArgument, match="given twice"):
        compile_plan(snapshot, "home", ("user", "user"))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((item("nosuch:a"),), "view 'nosuch' of entity 'item'"),
        ((item("profile:age"),), "view 'profile' of entity 'item'"),
        ((item("stats:a", "stats:zz", "stats:yy"),), r"\['yy', 'zz'\] of view 'stats'"),
    ],
)
def test_a_set_that_does_not_fit_its_views_says_so(inputs: tuple[ModelInput, ...], words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        plan_of(*inputs)
    assert caught.value.reason == "FEATURE_SET_BROKEN"


def test_plans_are_compiled_once_and_bounded() -> None:
    inputs = tuple(item("stats:a", name=f"i{n}") for n in range(12))
    plans = Plans(snapshot_with(*inputs))
    assert plans.get("home", ()) is plans.get("home", [])
    assert plans.get("home", ["i1"]) is not plans.get("home", ["i2"])
    for number in range(1, 1 << 12):  # a caller may ask for any subset
        chosen = [f"i{n}" for n in range(12) if number >> n & 1]
        assert [t.name for t in plans.get("home", chosen).tensors] == chosen
    assert len(plans._compiled) == 1024


def test_a_broken_set_does_not_hurt_the_others() -> None:
    sets = {name: FeatureSet(name=name, inputs=(item(reference),)) for name, reference in (("good", "stats:a"), ("bad", "gone:a"))}
    plans = Plans(Snapshot(feature_views={"stats": STATS}, feature_sets=sets))
    with pytest.raises(FailedPrecondition):
        plans.get("bad", ())
    assert plans.get("good", ()).tensors[0].width == 1
