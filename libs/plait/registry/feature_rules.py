"""What a feature view and a feature set must satisfy on their own: columns that rows can hold, tensors that can be made of them, expressions that
can be read. What they refer to is looked at by `crosschecks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

from plait.registry import aggregate_rules, expressions, findings
from plait.registry.findings import Finding, Steps
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, RequestFeature, Transform
from plait.registry.references import parse, width_of
from plait.registry.shapes import stored_type

MAX_FEATURES: Final = 1000  # per view, and per model input
MAX_PARTS: Final = 8
MAX_WORDS: Final = 100_000
MAX_WORD_BYTES: Final = 256
MAX_LENGTH: Final = 1024  # of a list
MAX_WIDTH: Final = 8192  # of an embedding
MAX_ROW_BYTES: Final = 64 * 1024  # stored, without texts
MAX_COMPUTED: Final = 100  # request features, and transforms, of a set
MAX_VIEW_VERSION: Final = 2**31 - 1
MAX_CALLERS: Final = 1000  # readers, and writers, of a view

_ROW_HEAD_BYTES: Final = 32 + 1000 // 8
_EMBEDDINGS: Final = ("float16", "float32", "int8")
_TENSOR: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}\Z")
_BITS: Final = {"int8": 8, "int16": 16, "int32": 32, "int64": 64, "timestamp": 64}
_DEFAULTS: Final[dict[str, tuple[type, str]]] = {"bool": (bool, "true or false"), "string": (str, "text")}
_LARGEST: Final = {"float16": 65504.0, "float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}


# --- views ----------------------------------------------------------------------------------------------------------------------------------


def check_view(view: FeatureView) -> Iterator[Finding]:
    """Yield everything wrong with a view."""
    yield from _entity(view.entity)
    yield from findings.count(("features",), view.features, MAX_FEATURES, "feature")
    yield from findings.unique(("features",), (f.name for f in view.features))
    for index, feature in enumerate(view.features):
        for steps, message in _feature(feature):
            yield ("features", index, *steps), message
    yield from _together(view)
    yield from findings.in_range(("version",), view.version, 1, MAX_VIEW_VERSION)
    yield from findings.in_range(("max_age_s",), view.max_age_s, 0, math.inf)
    yield from findings.in_range(("retention_s",), view.retention_s, 0, math.inf)
    if 0 < view.retention_s <= view.max_age_s:
        yield ("retention_s",), f"must be longer than max_age_s ({view.max_age_s:g}), so that a stale row is still there to be called stale"
    for field, callers in (("readers", view.readers), ("writers", view.writers)):
        if len(callers) > MAX_CALLERS:
            yield (field,), f"has {len(callers)} entries; at most {MAX_CALLERS} are allowed"
        yield from findings.unique((field,), callers, leaf=())
        for index, caller in enumerate(callers):
            yield from findings.name((field, index), caller)
    yield from aggregate_rules.check(view)
    yield from _feast(view)


def _entity(entity: Entity) -> Iterator[Finding]:
    yield from findings.name(("entity", "type"), entity.type)
    if entity.key != "composite":
        if entity.parts:
            yield ("entity", "parts"), f"are for composite keys, and this key is {entity.key}"
        return
    yield from findings.count(("entity", "parts"), entity.parts, MAX_PARTS, "part")
    yield from findings.unique(("entity", "parts"), (part.name for part in entity.parts))
    for index, part in enumerate(entity.parts):
        yield from findings.name(("entity", "parts", index, "name"), part.name)


def _together(view: FeatureView) -> Iterator[Finding]:
    """What holds for all features of a view at once."""
    wide = [feature.width > 0 for feature in view.features]
    if any(wide) and not all(wide):
        yield ("features", wide.index(not wide[0])), "embeddings live in a view of their own, where every feature has a width"
    size = _ROW_HEAD_BYTES + sum(_stored_bytes(feature) for feature in view.features)
    if size > MAX_ROW_BYTES:
        yield ("features",), f"take {size} bytes a row; at most {MAX_ROW_BYTES} are allowed: split the view"


def _stored_bytes(feature: Feature) -> int:
    if feature.aggregate is not None:
        return aggregate_rules.state_bytes(feature.aggregate)
    text = 4 if feature.dtype == "string" else 0  # the length of its text
    return max(0, width_of(feature)) * stored_type(feature).size_bytes + (2 if feature.max_length else 0) + text


def _feature(feature: Feature) -> Iterator[Finding]:
    yield from findings.name(("name",), feature.name)
    yield from findings.text(("description",), feature.description)
    yield from _default(feature)
    yield from _coding(feature)
    yield from _columns(feature)


def _default(feature: Feature) -> Iterator[Finding]:
    value, steps = feature.default, ("default",)
    if value is None:
        return
    if feature.dtype in _DEFAULTS:
        kind, wanted = _DEFAULTS[feature.dtype]
        if not isinstance(value, kind):
            yield steps, f"a {feature.dtype} feature needs {wanted} as default, found {value!r}"
        elif isinstance(value, str):
            yield from _word(steps, value)
            if feature.vocabulary and value not in feature.vocabulary:
                yield steps, "is not in the vocabulary"
    elif isinstance(value, bool | str):
        yield steps, f"the default of a feature of {feature.dtype} is a number, found {value!r}"
    elif feature.scale == 0 and feature.aggregate is None and (bits := _BITS.get(feature.dtype)):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if not isinstance(value, int) or not low <= value <= high:
            yield steps, f"an {feature.dtype} feature needs a whole number from {low} to {high} as default, found {value!r}"
    elif not abs(value) <= _LARGEST.get(feature.dtype, _LARGEST["float32"]):
        yield steps, f"does not fit {feature.dtype}: {value!r}; leave the default out where no value is known"


def _word(steps: Steps, word: str) -> Iterator[Finding]:
    if findings.unstorable(word):
        yield steps, "holds a character that cannot be stored (NUL or half of a surrogate pair)"
    elif len(word.encode()) > MAX_WORD_BYTES:
        yield steps, f"is longer than {MAX_WORD_BYTES} bytes of UTF-8"


def _coding(feature: Feature) -> Iterator[Finding]:
    """How text becomes numbers."""
    if feature.dtype != "string":
        for field, given in (("vocabulary", feature.vocabulary), ("hash_buckets", feature.hash_buckets)):
            if given:
                yield (field,), f"is for string features, and this one is {feature.dtype}"
        return
    if bool(feature.vocabulary) == bool(feature.hash_buckets):
        yield ("dtype",), "a string feature needs a vocabulary or a number of hash_buckets, and not both: models take numbers"
    if len(feature.vocabulary) > MAX_WORDS:
        yield ("vocabulary",), f"has {len(feature.vocabulary)} words; at most {MAX_WORDS} are allowed: use hash_buckets"
    yield from findings.unique(("vocabulary",), feature.vocabulary, leaf=())
    for index, word in enumerate(feature.vocabulary):
        yield from _word(("vocabulary", index), word)
    if feature.hash_buckets:
        yield from findings.in_range(("hash_buckets",), feature.hash_buckets, 1, 2**31 - 1)


def _columns(feature: Feature) -> Iterator[Finding]:
    """How many numbers one value has."""
    yield from findings.in_range(("width",), feature.width, 0, MAX_WIDTH)
    yield from findings.in_range(("max_length",), feature.max_length, 0, MAX_LENGTH)
    if feature.width and feature.dtype not in _EMBEDDINGS:
        yield ("width",), f"is for features of {', '.join(_EMBEDDINGS)}, and this one is {feature.dtype}"
    if feature.max_length and feature.width:
        yield ("max_length",), "excludes width: an embedding always has all its values"
    if feature.max_length and feature.dtype == "string":
        yield ("max_length",), "is for numbers: a list of texts cannot be stored; code the texts, or give each a feature of its own"
    if feature.scale:
        yield from findings.in_range(("scale",), feature.scale, 0, _LARGEST["float32"], open_low=True)
        if feature.dtype != "int8" or not feature.width:
            yield ("scale",), "is for int8 features with a width"
    if not feature.max_length:
        if feature.pad:
            yield ("pad",), "is for lists, which have a max_length"
    elif not holds(feature.dtype, feature.pad):
        yield ("pad",), f"does not fit {feature.dtype}: {feature.pad!r}"


def holds(dtype: str, value: float) -> bool:
    """Return whether a number is one of a dtype's exactly (of floats: about)."""
    if dtype == "bool":
        return value in (0, 1)
    if bits := _BITS.get(dtype):
        return float(value).is_integer() and -(2.0 ** (bits - 1)) <= value < 2.0 ** (bits - 1)
    return abs(value) <= _LARGEST.get(dtype, math.inf)


def _feast(view: FeatureView) -> Iterator[Finding]:
    feast = view.feast
    if feast is None:
        return
    for field, given in (("project", feast.project), ("view", feast.view), *(("join_keys", key) for key in feast.join_keys)):
        if not given or findings.unstorable(given):
            yield ("feast", field), "expected a name that Feast knows"
    wanted = len(view.entity.parts) if view.entity.key == "composite" else 1
    if len(feast.join_keys) != wanted:
        yield ("feast", "join_keys"), f"has {len(feast.join_keys)} entries, but the entity's key has {wanted} parts"
    if view.aggregation is not None:
        yield ("aggregation",), "excludes feast: such a view is only read"


# --- sets -----------------------------------------------------------------------------------------------------------------------------------


def check_set(feature_set: FeatureSet) -> Iterator[Finding]:
    """Yield everything wrong with a set."""
    yield from findings.count(("inputs",), feature_set.inputs, 100, "input")
    yield from findings.unique(("inputs",), (i.name for i in feature_set.inputs))
    for index, item in enumerate(feature_set.inputs):
        at: Steps = ("inputs", index)
        yield from tensor_name((*at, "name"), item.name)
        yield from findings.name((*at, "entity"), item.entity)
        yield from findings.count((*at, "features"), item.features, MAX_FEATURES, "feature")
        yield from findings.unique((*at, "features"), item.features, leaf=())
        for place, text in enumerate(item.features):
            for message in _reference(text, item, feature_set):
                yield (*at, "features", place), message
    for field, computed in (("request", feature_set.request), ("transforms", feature_set.transforms)):
        if len(computed) > MAX_COMPUTED:
            yield (field,), f"has {len(computed)} entries; at most {MAX_COMPUTED} are allowed"
        yield from findings.unique((field,), (c.name for c in computed))
    for index, feature in enumerate(feature_set.request):
        for steps, message in _request(feature):
            yield ("request", index, *steps), message
    for index, transform in enumerate(feature_set.transforms):
        for steps, message in _transform(transform, feature_set):
            yield ("transforms", index, *steps), message


def _reference(text: str, item: ModelInput, feature_set: FeatureSet) -> Iterator[str]:
    reference = parse(text)
    if reference is None:
        yield f"expected view:feature, view@version:feature, $request:name or $transform:name, found {text[:80]!r}"
    elif reference.kind == "request":
        yield from _sent(reference.feature, item.entity, feature_set, anything=False)
    elif reference.kind == "transform":
        transform = next((t for t in feature_set.transforms if t.name == reference.feature), None)
        if transform is None:
            yield f"there is no transform {reference.feature!r} under transforms"
        elif transform.entity != item.entity:
            yield f"transform {transform.name!r} is about {transform.entity!r}, but this input is about {item.entity!r}"


def _sent(name: str, entity: str, feature_set: FeatureSet, *, anything: bool) -> Iterator[str]:
    """Whether a request feature is there, and goes with rows of an entity type (`anything`: a transform may cross it with others)."""
    feature = next((r for r in feature_set.request if r.name == name), None)
    if feature is None:
        yield f"there is no request feature {name!r} under request"
    elif feature.entity not in ("", entity) and not anything:
        yield f"request feature {name!r} has one value per {feature.entity!r}, but this input is about {entity!r}"


def _request(feature: RequestFeature) -> Iterator[Finding]:
    yield from findings.name(("name",), feature.name)
    yield from findings.text(("description",), feature.description)
    if feature.entity:
        yield from findings.name(("entity",), feature.entity)
    for field in ("minimum", "maximum"):
        bound = getattr(feature, field)
        if bound is not None and not math.isfinite(bound):
            yield (field,), f"expected a finite number, found {bound}"
    if feature.minimum is not None and feature.maximum is not None and not feature.minimum <= feature.maximum:
        yield ("maximum",), f"must not be below minimum ({feature.minimum:g})"
    yield from _default(Feature(name=feature.name, dtype=feature.dtype, default=feature.default))
    value = feature.default
    low = -math.inf if feature.minimum is None else feature.minimum
    high = math.inf if feature.maximum is None else feature.maximum
    if value is not None and not low <= value <= high:
        yield ("default",), "is not between minimum and maximum"


def _transform(transform: Transform, feature_set: FeatureSet) -> Iterator[Finding]:
    yield from findings.name(("name",), transform.name)
    yield from findings.name(("entity",), transform.entity)
    yield from findings.text(("description",), transform.description)
    if transform.default is not None and not math.isfinite(transform.default):
        yield ("default",), f"expected a finite number, found {transform.default}"
    try:
        tree = expressions.parse(transform.expression)
    except expressions.ExpressionError as error:
        yield ("expression",), str(error)
        return
    for node in expressions.walk(tree):
        reference = parse(node.reference) if isinstance(node, expressions.Operand) else None
        if reference is not None and reference.kind == "request":
            for message in _sent(reference.feature, transform.entity, feature_set, anything=True):
                yield ("expression",), f"column {node.column}: {message}"


def tensor_name(steps: Steps, name: str) -> Iterator[Finding]:
    """Yield what keeps a text from naming a tensor."""
    if not _TENSOR.match(name):
        yield steps, f"{name[:80]!r} is not a tensor name: use a letter or '_', then up to 62 letters, digits, '_', '.' and '-'"
