"""Manifests: the YAML people write, checked whole before anything is sent.

Kubernetes' shape (apiVersion, kind, metadata.name, spec), any number of documents per file, files and folders in any mixture. Every
problem is reported at once with file and line, because a file that fails ten times in a row is fixed ten times more slowly.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO, cast

from plait.errors import FailedPrecondition, InvalidArgument, PlaitError
from plait.registry import artifact, locations, rules
from plait.registry.decode import Report, header, validated
from plait.registry.explain import shown, suggestion
from plait.registry.problems import Problem, refusal
from plait.registry.problems import path as path_text
from plait.registry.records import Kind, Model, ModelVersion, Record
from plait.registry.sources import StoreOptions, open_source, read_manifest
from plait.registry.specs import CLASSES, KINDS, Validator, filled_in, kind_of, to_manifest, to_spec
from plait.registry.yaml_tree import Document, Node, YamlProblem, documents

MAX_MANIFEST_BYTES: Final = 1024 * 1024
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_MANIFESTS: Final = 1000  # per apply
STDIN: Final = "-"

_FIELDS: Final = ("apiVersion", "kind", "metadata", "spec")
_METADATA: Final = ("name", "etag")
_SUFFIXES: Final = (".yaml", ".yml")
_VALIDATORS: Final = {kind: Validator(cls, forbid_unknown=True) for kind, cls in CLASSES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One resource somebody wants: `record` holds it, `source` says where it was written ("file:line", or "" where it was made in code).

    `folder` is where relative artifact paths start. `etag`, where given, must be the stored one when this is applied.
    """

    record: Record
    source: str = ""
    folder: Path = Path()
    etag: str = ""

    @property
    def kind(self) -> Kind:
        return kind_of(self.record)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def where(self) -> str:
        """How problems name it: its source, else kind and name."""
        return self.source or f"{self.kind} {self.name}"


def load(paths: Iterable[str | Path], *, stdin: TextIO | None = None) -> list[Manifest]:
    """Read files, folders (their *.yaml and *.yml, sorted, not deeper) and "-" (stdin); return the manifests in that order.

    Raises InvalidArgument (MANIFEST_INVALID) with one violation per problem, its field "file:line path".
    """
    problems: list[Problem] = []
    found: list[Manifest] = []
    for source, folder, text in _texts(paths, stdin or sys.stdin, problems):
        found += _parse(text, source, folder, problems)
    problems += _duplicates(found)
    if not found and not problems:
        problems.append(Problem(where="input", message="there is no manifest in it"))
    if len(found) > MAX_MANIFESTS:
        problems.append(Problem(where="input", message=f"holds {len(found)} manifests; at most {MAX_MANIFESTS} are applied at once"))
    if problems:
        raise refusal(InvalidArgument, problems, "the manifests cannot be applied", reason="MANIFEST_INVALID")
    return found


def parse(text: str, *, source: str = "manifest", folder: Path = Path()) -> list[Manifest]:
    """Read manifests out of a string. Raises as `load` does."""
    problems: list[Problem] = []
    found = _parse(text, source, folder, problems)
    problems += _duplicates(found)
    if problems:
        raise refusal(InvalidArgument, problems, "the manifests cannot be applied", reason="MANIFEST_INVALID")
    return found


def pin_artifacts(manifests: Sequence[Manifest], base: Path | None = None, *, options: StoreOptions | None = None) -> list[Manifest]:
    """Fill in path, digest and signature of every model version from its artifact.

    The files of a folder are checked on the way; of an artifact in an object store only `model.yaml` is read. Relative paths start at
    `base`, or where it is None at each manifest's own folder. A digest that a manifest gives must be the one found. `options`: how to
    speak with an object store. Raises FailedPrecondition (ARTIFACT_INVALID) with every problem.
    """
    problems: list[Problem] = []
    pinned = [_pin(manifest, base or manifest.folder, options or StoreOptions(), problems) for manifest in manifests]
    if problems:
        raise refusal(FailedPrecondition, problems, "the artifacts cannot be used", reason="ARTIFACT_INVALID")
    return pinned


def _texts(paths: Iterable[str | Path], stdin: TextIO, problems: list[Problem]) -> Iterator[tuple[str, Path, str]]:
    for given in paths:
        if str(given) == STDIN:
            yield "stdin", Path.cwd(), stdin.read(MAX_FILE_BYTES)
            continue
        for file in _files(Path(given), problems):
            text = _read(file, problems)
            if text is not None:
                yield str(file), file.parent, text


def _files(given: Path, problems: list[Problem]) -> list[Path]:
    if not given.is_dir():
        return [given]
    files = sorted(f for f in given.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    if not files:
        problems.append(Problem(where=str(given), message="there is no *.yaml or *.yml file in this folder"))
    return files


def _read(file: Path, problems: list[Problem]) -> str | None:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            problems.append(Problem(where=str(file), message=f"is larger than {MAX_FILE_BYTES} bytes"))
            return None
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.append(Problem(where=str(file), message=f"cannot be read: {error.strerror or error}"))
    except UnicodeDecodeError:
        problems.append(Problem(where=str(file), message="is not UTF-8 text"))
    return None


def _parse(text: str, source: str, folder: Path, problems: list[Problem]) -> list[Manifest]:
    report, found = Report(source, problems), []
    try:
        for document in documents(text):
            manifest = _manifest(document, report, folder)
            if manifest is not None:
                found.append(manifest)
    except YamlProblem as problem:
        report.at(problem.line, problem.message)
    return found


def _manifest(document: Document, report: Report, folder: Path) -> Manifest | None:
    if document.size_bytes > MAX_MANIFEST_BYTES:
        report.at(document.line, f"this manifest is {document.size_bytes} bytes long; at most {MAX_MANIFEST_BYTES} are allowed")
        return None
    before = len(report.problems)
    root = document.root
    kind = cast("Kind | None", header(root, report, kinds=KINDS, fields=_FIELDS))
    if not isinstance(root.value, dict):
        return None
    name, etag = _metadata(root, report)
    record = _record(root, report, kind, name) if kind else None
    if record is None or len(report.problems) > before:
        return None
    return Manifest(record=record, source=f"{report.source}:{document.line}", folder=folder, etag=etag)


def _metadata(root: Node, report: Report) -> tuple[str, str]:
    """Return (name, etag); an unusable name is reported and comes back empty."""
    metadata = root.child("metadata")
    if metadata is None or not isinstance(metadata.value, dict):
        report.below(root, ("metadata",), "is required; write metadata: {name: …}")
        return "", ""
    for name, node in metadata.value.items():
        if name not in _METADATA:
            report.at(
                node.line, f"is not a field of this{suggestion(name, _METADATA) or '; the fields here are name, etag'}", f"metadata.{name}"
            )
    return _text(metadata, "name", report, required=True), _text(metadata, "etag", report, required=False)


def _text(metadata: Node, name: str, report: Report, *, required: bool) -> str:
    node = metadata.child(name)
    if node is None:
        if required:
            report.at(metadata.line, "is required", f"metadata.{name}")
        return ""
    if not isinstance(node.value, str):
        report.at(node.line, f"expected text, found {shown(node.plain())}; put it in quotes", f"metadata.{name}")
        return ""
    if name == "name" and not rules.NAME.match(node.value):
        report.at(node.line, f"{node.value[:80]!r} is not a name: use {rules.NAME_HELP}", "metadata.name")
        return ""
    return node.value


def _record(root: Node, report: Report, kind: Kind, name: str) -> Record | None:
    spec = root.child("spec")
    if spec is None or spec.value is None:
        spec = Node({}, root.line)  # a Tenant needs none; for the others the required fields will be named
    if not isinstance(spec.value, dict):
        report.at(spec.line, f"expected a mapping of fields, found {shown(spec.plain())}", "spec")
        return None
    reserved = {"name": "belongs under metadata", **dict.fromkeys(filled_in(kind), "is filled in by the registry; leave it out")}
    for refused, why in reserved.items():
        if refused in spec.value:
            report.at(spec.value[refused].line, why, f"spec.{refused}")
    data = {key: value for key, value in spec.plain().items() if key not in reserved}
    record: Record | None = validated(_VALIDATORS[kind], {**data, "name": name or "unnamed"}, spec, report, prefix=("spec",))
    if record is not None:
        for steps, message in rules.check(record):
            report.below(spec, steps, message, prefix=("spec",))
    return record


def _duplicates(found: Sequence[Manifest]) -> Iterator[Problem]:
    first: dict[tuple[Kind, str], Manifest] = {}
    for manifest in found:
        earlier = first.setdefault((manifest.kind, manifest.name), manifest)
        if earlier is not manifest:
            message = f"{manifest.kind} {manifest.name} is described twice, first at {earlier.source}"
            yield Problem(where=manifest.source, field="metadata.name", message=message)


def _pin(manifest: Manifest, base: Path, options: StoreOptions, problems: list[Problem]) -> Manifest:
    model = manifest.record
    if not isinstance(model, Model):
        return manifest
    versions = []
    for index, version in enumerate(model.versions):
        try:
            named_only = model.pool and not version.artifact  # on a foreign server, which has it from elsewhere
            versions.append(version if named_only else _pin_version(version, base, options))
        except PlaitError as error:
            field = path_text(("spec", "versions", index, "artifact"))
            problems.append(Problem(where=manifest.where, field=field, message=str(error)))
    if len(versions) < len(model.versions):
        return manifest
    return dataclasses.replace(manifest, record=dataclasses.replace(model, versions=tuple(versions)))


def _pin_version(version: ModelVersion, base: Path, options: StoreOptions) -> ModelVersion:
    location = locations.parse(version.artifact, base)
    content = read_manifest(open_source(location, options))
    found_digest = artifact.digest_of(content)
    if version.digest and version.digest != found_digest:
        raise FailedPrecondition(
            f"version {version.version} is pinned to {version.digest}, but {location} holds {found_digest}", reason="ARTIFACT_CORRUPT"
        )
    found = artifact.parse(content, source=f"{location}/{artifact.FILE_NAME}")
    if isinstance(location, Path):
        artifact.verify_files(location, found)
    return dataclasses.replace(version, artifact=str(location), digest=found_digest, signature=found.signature)


__all__ = ["STDIN", "Manifest", "load", "parse", "pin_artifacts", "to_manifest", "to_spec"]
