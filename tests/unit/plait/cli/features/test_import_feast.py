"""`plait features import-feast`: manifests that can be applied as they are, and what is said where they cannot be made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.feast_repository import field, repository, service, view
from typer.testing import Result

from plait.cli.features import import_feast
from plait.cli.features.feast_mapping import Options, mapped
from plait.registry.manifests import load

Plait = Callable[..., Result]
PLUS = {"name": "plus", "features": [field("p", "Float64")], "inputs": ["v:a"], "request": [], "code": "x = 1\n---\nkind: \u2028trap"}
DUMP = repository(
    [view("v", [field("a", "Float32"), field("words", "String"), field("odd", "Map")], ttl_s=60.0, description="Übersicht: a")],
    [service("s", ("v", ["a", "words"]), ("plus", ["p"]))],
    on_demand=[PLUS],
)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "feature_store.yaml").write_text("project: shop\n")
    return tmp_path / "repo"


@pytest.fixture
def dumped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Feast would tell: it is asked for real in tests/integration/test_feast.py."""
    given = dict(DUMP)
    monkeypatch.setattr(import_feast, "read_repository", lambda _repo, _python: given)
    return given


def test_what_is_printed_can_be_applied(plait: Plait, repo: Path, dumped: dict[str, Any], tmp_path: Path) -> None:
    result = plait("features", "import-feast", str(repo), "--hash-buckets", "77")
    assert result.exit_code == 0, result.stderr
    printed = tmp_path / "all.yaml"
    printed.write_text(result.stdout)
    expected = mapped(dumped, Options(hash_buckets=77))
    assert [m.record for m in load([printed])] == [*expected.views, *expected.sets]
    assert "# on-demand view plus" in result.stdout
    assert "left out: FeatureView 'v', feature 'odd' (Map)" in result.stderr
    assert "1 feature view(s), 1 feature set(s); 2 thing(s) left out" in result.stderr


def test_programs_get_one_document(plait: Plait, repo: Path, dumped: dict[str, Any]) -> None:
    result = plait("features", "import-feast", str(repo), "--json")
    told = json.loads(result.stdout)
    assert [m["metadata"]["name"] for m in told["manifests"]] == ["v", "s"]
    assert len(told["left_out"]) == 2
    assert told["transforms"]["s"][0].startswith("on-demand view plus")


def test_files_are_written_and_not_written_over(plait: Plait, repo: Path, dumped: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "manifests"
    assert plait("features", "import-feast", str(repo), "--out", str(out)).exit_code == 0
    assert [m.kind for m in load([out])] == ["FeatureSet", "FeatureView"]
    (out / import_feast.VIEWS_FILE).write_text("mine")
    again = plait("features", "import-feast", str(repo), "--out", str(out))
    assert again.exit_code == 1
    assert "feature-views.yaml" in again.stderr
    assert (out / import_feast.VIEWS_FILE).read_text() == "mine"
    assert plait("features", "import-feast", str(repo), "--out", str(out), "--replace").exit_code == 0
    assert len(load([out])) == 2


def test_nothing_to_take_over_is_a_failure(plait: Plait, repo: Path, dumped: dict[str, Any]) -> None:
    dumped["views"] = [view("rain", [field("a", "Float32")], keys=[])]
    result = plait("features", "import-feast", str(repo))
    assert result.exit_code == 1
    assert "FeatureView 'rain': it has no entity" in result.stderr
    dumped.update(views=[], services=[], on_demand=[])
    assert "feast apply" in plait("features", "import-feast", str(repo)).stderr


def test_feast_has_to_be_there(plait: Plait, repo: Path, tmp_path: Path) -> None:
    result = plait("features", "import-feast", str(repo), "--python", sys.executable)
    assert result.exit_code == 1
    assert "has no feast: name one that has with --python" in result.stderr
    nobody = plait("features", "import-feast", str(repo), "--python", str(tmp_path / "nobody"))
    assert "cannot be started" in nobody.stderr
    (tmp_path / "empty").mkdir()
    assert "feature_store.yaml" in plait("features", "import-feast", str(tmp_path / "empty")).stderr
    (repo / "feast.py").write_text("raise ValueError('the registry is away')")  # a stand-in that fails as feast may
    assert "the registry is away" in plait("features", "import-feast", str(repo)).stderr
