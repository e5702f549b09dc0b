"""`model.yaml`: what a model artifact is made of, and proof that its files are what was published.

An artifact is a folder. Its `model.yaml` holds the SHA-256 of every file that may be opened, and the registry holds the SHA-256 of
`model.yaml`; so one digest pins everything. Pure reading, writing and hashing: neither torch nor numpy is needed to publish or check.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final, Literal, get_args

from plait.errors import FailedPrecondition
from plait.registry import rules, signing
from plait.registry.decode import API_VERSION, Report, header, validated
from plait.registry.explain import shown
from plait.registry.findings import Finding
from plait.registry.problems import Problem, refusal
from plait.registry.records import Batching, Execution, Signature, TensorSpec
from plait.registry.specs import Validator, to_plain
from plait.registry.yaml_tree import Node, YamlProblem, documents, dump

FILE_NAME: Final = "model.yaml"
KIND: Final = "ModelArtifact"
MAX_BYTES: Final = 1024 * 1024  # of model.yaml
RESERVED: Final = (FILE_NAME, signing.FILE_NAME)
_CHUNK_BYTES: Final = 1024 * 1024
_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
_FIELDS: Final = (
    "apiVersion", "kind", "name", "format", "entry", "architecture", "feature_set", "inputs", "outputs", "batching", "execution", "labels",
    "self_test", "files",
)  # fmt: skip

_SPARE: Final = frozenset({"feature_set", "batching", "execution", "architecture", "labels", "self_test"})  # the others stand without them

Format = Literal["torchscript", "torch_export", "aotinductor", "onnx", "safetensors"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
_LISTED_FORMATS: Final = f"one of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_NEVER_PICKLE: Final = "pickle is never loaded: export the model, or save its weights as safetensors"

MAX_NAME_BYTES: Final = 255
MAX_PATH_BYTES: Final = 900
MAX_DEPTH: Final = 32
MAX_INSTANCES: Final = 64
MAX_DEVICES: Final = 16  # GPUs of one machine
MAX_TIMEOUT_MS: Final = 3_600_000
MAX_BATCH_BYTES: Final = 1 << 40
MAX_SIZES: Final = 64  # preferred rows, buckets
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """What a file must be: 64 hexadecimal digits and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """An .npz file (read without pickle) with arrays "input.<name>" and "output.<name>", in the form that `plait.registry.self_test` tells.

    Outputs must agree to `tolerance`, absolute and relative.
    """

    file: str
    tolerance: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Which class of the worker's explicit registry holds the weights of a safetensors file, and the arguments to make it with."""

    name: str
    config: Mapping[str, int | float | bool | str | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactManifest:
    """A published model: how to load it (`format`, `entry`), its signature, how to batch, run and test it, and the digest of each file.

    `architecture` is for safetensors alone. `labels`: per output a text file with one class name a line, for the classification extension.
    """

    name: str
    format: Format
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    feature_set: str = ""
    batching: Batching = field(default_factory=Batching)
    execution: Execution = field(default_factory=Execution)
    architecture: Architecture | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    self_test: SelfTest | None = None
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        """What the registry keeps of it."""
        return Signature(inputs=self.inputs, outputs=self.outputs, feature_set=self.feature_set)


_VALIDATOR: Final = Validator(ArtifactManifest, forbid_unknown=True)


def read(path: Path | str) -> ArtifactManifest:
    """Return the manifest in an artifact's folder (or at the `model.yaml` itself).

    Raises FailedPrecondition: ARTIFACT_MISSING, or ARTIFACT_INVALID with every problem and its line.
    """
    file = manifest_file(path)
    return parse(_manifest_bytes(file), source=str(file))


def parse(content: bytes, *, source: str) -> ArtifactManifest:
    """Return the manifest held in the bytes of a `model.yaml`. Raises FailedPrecondition (ARTIFACT_INVALID)."""
    report = Report(source)
    manifest = _parse(content, report)
    if report.problems or manifest is None:
        raise refusal(FailedPrecondition, report.problems, f"{source} does not describe an artifact", reason="ARTIFACT_INVALID")
    return manifest


def write(folder: Path | str, manifest: ArtifactManifest) -> str:
    """Write `model.yaml` with the digest of every file in the folder (hidden files excepted); return its own digest.

    `manifest.files` is ignored and filled in. Raises FailedPrecondition: ARTIFACT_INVALID where entry or self test are not there, or a file
    is none that can be published (a link out of the folder, a name that is not UTF-8); ARTIFACT_FORBIDDEN, ARTIFACT_UNWRITABLE.
    """
    content = compose(folder, manifest)
    write_whole(Path(folder) / FILE_NAME, content)
    return digest_of(content)


def compose(folder: Path | str, manifest: ArtifactManifest) -> bytes:
    """Return what `write` would write, proven to be right. Raises as `write` does, except ARTIFACT_UNWRITABLE."""
    root = Path(folder)
    found = {name: _digest_of(root / name) for name in sorted(_files_in(root))}
    filled = dataclasses.replace(manifest, files=MappingProxyType(found))
    data = {"apiVersion": API_VERSION, "kind": KIND, **to_plain(filled, defaults=False)}
    content = dump(data).encode()
    parse(content, source=str(root / FILE_NAME))
    return content


def write_whole(file: Path, content: bytes) -> None:
    """Write a small file whole or not at all, over what is there. Raises FailedPrecondition (ARTIFACT_UNWRITABLE)."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        try:
            with draft.open("xb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be written: {error.strerror}", reason="ARTIFACT_UNWRITABLE") from error


def remove(file: Path) -> None:
    """Delete a file of an artifact. Raises FailedPrecondition (ARTIFACT_UNWRITABLE)."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be deleted: {error.strerror}", reason="ARTIFACT_UNWRITABLE") from error


def digest(path: Path | str) -> str:
    """Return "sha256:<hex>" of the artifact's `model.yaml`. Raises FailedPrecondition (ARTIFACT_MISSING)."""
    return digest_of(_manifest_bytes(manifest_file(path)))


def read_pinned(path: Path | str, expected_digest: str) -> ArtifactManifest:
    """Read `model.yaml` once, check those very bytes against the registry's digest, and return what they say.

    Raises FailedPrecondition: ARTIFACT_MISSING, ARTIFACT_CORRUPT, ARTIFACT_INVALID.
    """
    file = manifest_file(path)
    content = _manifest_bytes(file)
    check_pinned(content, expected_digest, source=str(file))
    return parse(content, source=str(file))


def check_pinned(content: bytes, expected_digest: str, *, source: str) -> None:
    """Check the bytes of a `model.yaml` against the registry's digest. Raises FailedPrecondition (ARTIFACT_CORRUPT)."""
    found = digest_of(content)
    if found != expected_digest:
        raise _corrupt(source, f"its digest is {found}, the registry expects {expected_digest or 'none'}")


def verify_files(folder: Path | str, manifest: ArtifactManifest) -> None:
    """Hash every listed file. Raises FailedPrecondition (ARTIFACT_CORRUPT) that names each file that is missing or differs."""
    root = Path(folder)
    problems = [p for name, expected in manifest.files.items() for p in _verify_file(root, name, expected)]
    if problems:
        raise refusal(FailedPrecondition, problems, f"the artifact in {root} is not what was published", reason="ARTIFACT_CORRUPT")


def lies_inside(file: Path, folder: Path) -> bool:
    """Say whether a file is below a folder once every link was followed; one that goes round in circles is nowhere."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def is_file(file: Path) -> bool:
    """Say whether there is a plain file. Raises FailedPrecondition (ARTIFACT_FORBIDDEN) where a folder on the way is not ours to look into."""
    try:
        return file.is_file()
    except OSError as error:
        raise unreadable(file, error) from error


def manifest_file(path: Path | str) -> Path:
    """Return where `model.yaml` is, given it or its folder."""
    given = Path(path)
    return given if given.name == FILE_NAME else given / FILE_NAME


def _parse(content: bytes, report: Report) -> ArtifactManifest | None:
    root = _root(content, report)
    if root is None or header(root, report, kinds=(KIND,), fields=_FIELDS) is None:
        return None
    known = {name: value for name, value in root.plain().items() if name in _FIELDS[2:]}
    if "format" in known and known["format"] not in FORMATS:
        report.below(root, ("format",), f"expected {_LISTED_FORMATS}, found {shown(known['format'])}; {_NEVER_PICKLE}")
        known["format"] = FORMATS[0]  # so that the other fields are looked at too; there is a problem now, so it is never used
    before = len(report.problems)
    manifest: ArtifactManifest | None = validated(_VALIDATOR, known, root, report)
    wrong = {problem.field.partition(".")[0].partition("[")[0] for problem in report.problems[before:]}
    if manifest is None and wrong <= _SPARE:
        # What the rest says is looked at too, so that nobody mends a file one kind of problem after the other.
        rest = {name: value for name, value in known.items() if name not in wrong}
        manifest = validated(_VALIDATOR, rest, root, Report(report.source))
    if manifest is not None:
        for steps, message in _check(manifest):
            if steps[0] not in wrong:
                report.below(root, steps, message)
    return manifest


def _root(content: bytes, report: Report) -> Node | None:
    if len(content) > MAX_BYTES:
        report.at(1, f"is {len(content)} bytes long; at most {MAX_BYTES} are allowed")
        return None
    try:
        found = list(documents(content.decode()))
    except UnicodeDecodeError:
        report.at(1, "is not UTF-8 text")
        return None
    except YamlProblem as problem:
        report.at(problem.line, problem.message)
        return None
    if len(found) != 1:
        report.at(1, f"expected one YAML document, found {len(found)}")
        return None
    return found[0].root


def _check(manifest: ArtifactManifest) -> Iterable[Finding]:
    if not manifest.name.isprintable() or not 1 <= len(manifest.name) <= MAX_NAME_BYTES:
        yield ("name",), f"expected 1 to {MAX_NAME_BYTES} characters that can be printed"
    yield from rules.check_signature(manifest.signature)
    yield from _check_batching(manifest)
    yield from _check_execution(manifest.execution)
    yield from _check_architecture(manifest)
    for name, file in manifest.files.items():
        yield from _check_file(name, file)
    yield from _check_nesting(manifest.files)
    yield from _check_listed(manifest)
    yield from _check_labels(manifest)


def _check_batching(manifest: ArtifactManifest) -> Iterable[Finding]:
    batching = manifest.batching
    if not 1 <= batching.max_rows <= batching.max_queue_rows:
        yield ("batching", "max_rows"), f"expected 1 to max_queue_rows ({batching.max_queue_rows}), found {batching.max_rows}"
    if not 0 <= batching.max_queue_delay_ms <= 1000:
        yield ("batching", "max_queue_delay_ms"), f"expected 0 to 1000, found {batching.max_queue_delay_ms:g}"
    if any(t.per == "request" for t in manifest.inputs) != bool(batching.row_splits):
        yield ("batching", "row_splits"), "must name the row-splits input where an input is per request, and be empty where none is"
    if not 1 <= batching.max_bytes <= MAX_BATCH_BYTES:
        yield ("batching", "max_bytes"), f"expected 1 to {MAX_BATCH_BYTES}, found {batching.max_bytes}"
    yield from _check_sizes("preferred_rows", batching.preferred_rows, batching.max_rows)
    yield from _check_sizes("buckets", batching.buckets, batching.max_rows)


def _check_sizes(field_name: str, sizes: tuple[int, ...], max_rows: int) -> Iterable[Finding]:
    if len(sizes) > MAX_SIZES:
        yield ("batching", field_name), f"has {len(sizes)} entries; at most {MAX_SIZES} are allowed"
    for index, size in enumerate(sizes):
        if not 1 <= size <= max_rows:
            yield ("batching", field_name, index), f"expected 1 to max_rows ({max_rows}), found {size}"
        elif index and size <= sizes[index - 1]:
            yield ("batching", field_name, index), f"must be larger than the one before it: {size} follows {sizes[index - 1]}"


def _check_execution(execution: Execution) -> Iterable[Finding]:
    if not 1 <= execution.instances <= MAX_INSTANCES:
        yield ("execution", "instances"), f"expected 1 to {MAX_INSTANCES}, found {execution.instances}"
    if len(execution.devices) > MAX_DEVICES:
        yield ("execution", "devices"), f"has {len(execution.devices)} entries; at most {MAX_DEVICES} are allowed"
    for place, number in enumerate(execution.devices):
        if not 0 <= number < MAX_DEVICES:
            yield ("execution", "devices", place), f"expected the number of a GPU, 0 to {MAX_DEVICES - 1}, found {number}"
        elif number in execution.devices[:place]:
            yield ("execution", "devices", place), f"names GPU {number} twice: raise instances instead"
    if not 0 <= execution.timeout_ms <= MAX_TIMEOUT_MS:
        yield ("execution", "timeout_ms"), f"expected 0 (the worker's setting) to {MAX_TIMEOUT_MS}, found {execution.timeout_ms:g}"


def _check_architecture(manifest: ArtifactManifest) -> Iterable[Finding]:
    found = manifest.architecture
    if found is None:
        if manifest.format == "safetensors":
            yield ("architecture",), "is required: a safetensors file holds weights only; name the class that takes them"
        return
    if manifest.format != "safetensors":
        yield ("architecture",), f"belongs to the format safetensors only; a {manifest.format} file holds its own graph"
    if not _IDENTIFIER.match(found.name):
        yield ("architecture", "name"), f"{found.name[:80]!r} is not a name: use letters, digits, '_', '.' and '-'"
    for name, value in found.config.items():
        if not name.isidentifier():
            yield ("architecture", "config", name), "is not the name of an argument"
        if isinstance(value, float) and not math.isfinite(value):
            yield ("architecture", "config", name), f"expected a finite number, found {value}"


def _check_listed(manifest: ArtifactManifest) -> Iterable[Finding]:
    if manifest.entry not in manifest.files:
        yield ("entry",), f"{manifest.entry[:80]!r} is not listed under files"
    test = manifest.self_test
    if test is not None and test.file not in manifest.files:
        yield ("self_test", "file"), f"{test.file[:80]!r} is not listed under files"
    if test is not None and not 0 < test.tolerance < 1:
        yield ("self_test", "tolerance"), f"expected a number between 0 and 1, found {test.tolerance:g}"


def _check_labels(manifest: ArtifactManifest) -> Iterable[Finding]:
    outputs = [t.name for t in manifest.outputs]
    for output, file in manifest.labels.items():
        if output not in outputs:
            yield ("labels", output), f"{output[:80]!r} is not an output; outputs: {', '.join(outputs)}"
        if file not in manifest.files:
            yield ("labels", output), f"{file[:80]!r} is not listed under files"


def _check_nesting(names: Iterable[str]) -> Iterable[Finding]:
    known = set(names)
    for name in sorted(known):
        inside = next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in known.union(RESERVED)), None)
        if inside is not None:
            yield ("files", name), f"lies inside {inside!r}, which is a file"


def _check_file(name: str, file: FileDigest) -> Iterable[Finding]:
    if not _safe(name):
        yield ("files", name), "must be a plain path inside the artifact's folder"
    if any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in name.split("/")):
        yield ("files", name), f"has a part of more than {MAX_NAME_BYTES} bytes, which file systems refuse"
    if len(name.encode(errors="replace")) > MAX_PATH_BYTES or name.count("/") >= MAX_DEPTH:
        yield (
            ("files", name[:80]),
            f"is longer than {MAX_PATH_BYTES} bytes or deeper than {MAX_DEPTH} folders, which not every place can hold",
        )
    if name in RESERVED:
        yield ("files", name), "cannot be listed in itself: the registry and the signature vouch for it"
    if not _SHA256.match(file.sha256):
        yield ("files", name, "sha256"), "expected 64 hexadecimal digits"
    if file.size_bytes < 0:
        yield ("files", name, "size_bytes"), f"expected 0 or more, found {file.size_bytes}"


def _safe(name: str) -> bool:
    """Say whether a name stays inside the folder on every system: no '..', no root, no drive, no backslash, no control characters."""
    parts = name.split("/")
    return bool(name) and name.isprintable() and not any(c in name for c in "\\:") and all(part not in ("", ".", "..") for part in parts)


def _verify_file(root: Path, name: str, expected: FileDigest) -> Iterable[Problem]:
    file = root / PurePosixPath(name)
    if not _safe(name) or not lies_inside(file, root):
        yield Problem(where=name, message="lies outside the artifact's folder and is not opened")
    elif not is_file(file):
        yield Problem(where=name, message="is missing")
    else:
        found = _digest_of(file)
        if found != expected:
            wanted = f"expected sha256 {expected.sha256} ({expected.size_bytes} bytes)"
            yield Problem(where=name, message=f"{wanted}, found {found.sha256} ({found.size_bytes} bytes)")


def _files_in(root: Path) -> list[str]:
    """Return the names of a folder's files, hidden ones excepted. What cannot be published is refused, never left out in silence."""
    names: list[str] = []
    problems: list[Problem] = []
    for parent, folders, files in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in (*folders, *files) if not name.startswith(".")):
            name = path.relative_to(root).as_posix()
            trouble = _trouble_with(path, root)
            if trouble:
                problems.append(Problem(where=name.encode(errors="backslashreplace").decode(), message=trouble))
            elif path.is_file() and name not in RESERVED:
                names.append(name)
    if problems:
        raise refusal(FailedPrecondition, problems, f"not all of {root} can be published", reason="ARTIFACT_INVALID")
    return names


def _trouble_with(path: Path, root: Path) -> str:
    """Say why a file or folder is not what another machine could be given, or return nothing."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "is a link to nothing: delete it, or put the file itself there"
    if path.is_symlink() and (path.is_dir() or not target.is_relative_to(root.resolve())):
        return "is a link that is not followed, to a folder or out of this one: put the files themselves there"
    return "" if path.is_file() or path.is_dir() else "is neither a file nor a folder: delete it"


def _raise_unreadable(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error


def _digest_of(file: Path) -> FileDigest:
    sha256, size_bytes = hashlib.sha256(), 0
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                sha256.update(chunk)
                size_bytes += len(chunk)
    except OSError as error:
        raise unreadable(file, error) from error
    return FileDigest(sha256=sha256.hexdigest(), size_bytes=size_bytes)


def _manifest_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except PermissionError as error:
        raise unreadable(file, error) from error
    except OSError as error:
        raise FailedPrecondition(f"there is no artifact at {file.parent}: {file} cannot be read", reason="ARTIFACT_MISSING") from error


def unreadable(file: Path, error: OSError) -> FailedPrecondition:
    """Return the error for a file or folder of this machine: ARTIFACT_FORBIDDEN where it is there and not ours to read, or ARTIFACT_MISSING."""
    if isinstance(error, PermissionError):
        return FailedPrecondition(f"{file} may not be read by this process: check its owner and mode", reason="ARTIFACT_FORBIDDEN")
    return FailedPrecondition(f"{file} cannot be read: {error.strerror or type(error).__name__}", reason="ARTIFACT_MISSING")


def _corrupt(where: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(f"{where} is not what was published: {message}", reason="ARTIFACT_CORRUPT", metadata={"file": FILE_NAME})


def digest_of(content: bytes) -> str:
    """Return "sha256:<hex>" of the bytes of a `model.yaml`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
