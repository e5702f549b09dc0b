"""`plait features import-feast`: a Feast repository becomes manifests, and what does not is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli.options import JsonOption
from plait.cli.output import write_json, write_line, write_note

if TYPE_CHECKING:
    from plait.cli.features.feast_mapping import Mapped
    from plait.registry.records import FeatureSet, FeatureView

VIEWS_FILE: Final = "feature-views.yaml"
SETS_FILE: Final = "feature-sets.yaml"
_TAIL: Final = 1500
_NO_FEAST: Final = "No module named 'feast'"


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command("import-feast")(import_feast)


def import_feast(
    repo: Annotated[
        Path, typer.Argument(metavar="REPO", help="Folder with the repository's feature_store.yaml.", file_okay=False, exists=True)
    ],
    python: Annotated[
        Path | None,
        typer.Option("--python", dir_okay=False, help="A Python that has feast; default: the one plait runs in.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, help=f"Write {VIEWS_FILE} and {SETS_FILE} here, not to stdout.", show_default=False),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the files that are there.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Have the views read Feast's Redis as it is, instead of being filled anew; docs/feast.md.")
    ] = False,
    max_length: Annotated[int, typer.Option(min=1, max=1024, help="Of lists: as many values as the model will see.")] = 32,
    hash_buckets: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Of strings without a vocabulary.")] = 1 << 20,
    as_json: JsonOption = False,
) -> None:
    """Turn the entities, feature views and feature services of an applied Feast repository into manifests.

    A view's time to live becomes its largest age. `Array(Float32)` with a vector_length, or with a tag `width`, becomes an embedding, other
    lists become lists; a string is hashed unless its tag `vocabulary` lists its words. Whatever has no equal here is named on stderr.

    Example:  plait features import-feast feature_repo/ --python feast-venv/bin/python --out manifests/

    Example:  plait features import-feast feature_repo/ | plait apply -f -
    """
    from plait.cli.features.feast_mapping import Options, mapped  # noqa: PLC0415

    found = mapped(read_repository(repo, python), Options(max_length=max_length, hash_buckets=hash_buckets, in_place=in_place))
    _refuse_nothing(found)
    texts = {VIEWS_FILE: _documents(found.views), SETS_FILE: _documents(found.sets, found.transforms)}
    if out is not None:
        _write(texts, out, replace=replace)
    if as_json:
        write_json({"manifests": _manifests([*found.views, *found.sets]), "left_out": found.left_out, "transforms": found.transforms})
        return
    if out is None:
        write_line("---\n".join(text for text in texts.values() if text))
    for sentence in found.left_out:
        write_note(f"left out: {sentence}")
    write_note(f"{len(found.views)} feature view(s), {len(found.sets)} feature set(s); {len(found.left_out)} thing(s) left out")


def read_repository(repo: Path, python: Path | None) -> dict[str, Any]:
    """Have Feast tell what is in a repository. Raises FailedPrecondition (FEAST_NOT_FOUND), InvalidArgument (FEAST_UNREADABLE)."""
    from plait.errors import FailedPrecondition, InvalidArgument  # noqa: PLC0415

    if not (repo / "feature_store.yaml").exists():
        raise FailedPrecondition(f"{repo} has no feature_store.yaml: give the folder that has", reason="FEAST_NOT_FOUND")
    script = Path(__file__).with_name("feast_dump.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="plait-feast-") as folder:
        answer = Path(folder) / "repository.json"
        # Through stdin, so that not our folder but the repository comes first among the places modules are imported from.
        argv = [_program(python), "-W", "ignore", "-", str(repo.absolute()), str(answer)]
        try:
            done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False, cwd=repo)  # noqa: S603  (the user's own Python)
        except OSError as error:
            raise FailedPrecondition(f"{argv[0]} cannot be started: {error.strerror}", reason="FEAST_NOT_FOUND") from error
        if _NO_FEAST in done.stderr:
            message = f"{argv[0]} has no feast: name one that has with --python, for example feast-venv/bin/python"
            raise FailedPrecondition(message, reason="FEAST_NOT_FOUND")
        if done.returncode:
            raise InvalidArgument(f"feast cannot read {repo}; it said:\n{done.stderr[-_TAIL:]}", reason="FEAST_UNREADABLE")
        read: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return read


def _program(python: Path | None) -> str:
    """Return what to start, still found from within the repository's folder."""
    if python is None:
        return sys.executable
    return shutil.which(python) or str(python.absolute()) if python.parent == Path() else str(python.absolute())


def _refuse_nothing(found: Mapped) -> None:
    from plait.errors import FailedPrecondition  # noqa: PLC0415

    if found.views:
        return
    reasons = "\n".join(found.left_out) or "its registry is empty: run `feast apply` first"
    raise FailedPrecondition(f"nothing of the repository can be taken over\n{reasons}", reason="FEAST_UNSUPPORTED")


def _documents(records: Sequence[FeatureView | FeatureSet], comments: dict[str, list[str]] | None = None) -> str:
    """Return the manifests as YAML, each after its comments."""
    import yaml  # noqa: PLC0415

    texts = []
    for record, manifest in zip(records, _manifests(records), strict=True):
        said = "".join(f"# {line}".rstrip() + "\n" for line in (comments or {}).get(record.name, ()))
        texts.append(said + str(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=120)))
    return "---\n".join(texts)


def _manifests(records: Sequence[FeatureView | FeatureSet]) -> list[dict[str, Any]]:
    from plait.registry.specs import to_manifest  # noqa: PLC0415

    return [to_manifest(record) for record in records]


def _write(texts: dict[str, str], out: Path, *, replace: bool) -> None:
    from plait.errors import FailedPrecondition  # noqa: PLC0415

    there = [name for name in texts if (out / name).exists()]
    if there and not replace:
        raise FailedPrecondition(f"{out} has {', '.join(there)}: give another --out, or --replace", reason="FILE_EXISTS")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
        write_note(f"wrote {out / name}")
