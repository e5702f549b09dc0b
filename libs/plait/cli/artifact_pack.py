"""`plait artifact pack`: a `model.yaml` out of flags, with everything that is still missing said at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli.options import JsonOption
from plait.cli.output import write_json, write_line, write_note

if TYPE_CHECKING:
    from plait.errors import Violation
    from plait.registry.artifact import ArtifactManifest
    from plait.registry.records import TensorSpec

_TENSOR: Final = "NAME:DTYPE:SHAPE[:request]"
_SHOWN_FILES: Final = 10


def pack(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the model's files.", file_okay=False, exists=True)],
    name: Annotated[str, typer.Option(help="The model's name.", show_default=False)] = "",
    format_: Annotated[
        str, typer.Option("--format", help="torch_export, torchscript, aotinductor, onnx or safetensors.", show_default=False)
    ] = "",
    entry: Annotated[str, typer.Option(help="The file in the folder that is loaded.", show_default=False)] = "",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar=_TENSOR, help="An input, in order; -1 is a variable size.", show_default=False)
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", metavar="NAME:DTYPE:SHAPE", help="An output, in order.", show_default=False)
    ] = None,
    feature_set: Annotated[str, typer.Option(help="The feature set that yields the inputs.", show_default=False)] = "",
    row_splits: Annotated[str, typer.Option(help="The extra int64 input of a model with per-request inputs.", show_default=False)] = "",
    max_rows: Annotated[int | None, typer.Option(help="Most rows in one forward pass.", show_default=False)] = None,
    max_queue_delay_ms: Annotated[
        float | None,
        typer.Option(help="Longest wait of a free instance for callers that tend to come back; 0 = never.", show_default=False),
    ] = None,
    buckets: Annotated[
        list[int] | None, typer.Option("--bucket", help="A row count batches are padded to; may be repeated.", show_default=False)
    ] = None,
    instances: Annotated[int, typer.Option(help="How many compute side by side.")] = 1,
    instance_kind: Annotated[str, typer.Option(help="thread or process.")] = "thread",
    architecture: Annotated[str, typer.Option(help="safetensors: the worker's class that takes the weights.", show_default=False)] = "",
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME=VALUE", help="An argument of that class; may be repeated.", show_default=False),
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--labels", metavar="OUTPUT=FILE", help="A text file with a class name a line.", show_default=False)
    ] = None,
    self_test: Annotated[
        str, typer.Option(help="An .npz with arrays input.<name> and output.<name> (docs/formats.md: bytes, bfloat16).", show_default=False)
    ] = "",
    tolerance: Annotated[float, typer.Option(help="How far the self test's answer may be off.")] = 1e-4,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the model.yaml that is there; deletes its signature.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model.yaml of a folder: how to load it, its signature, and the digest of every file in it (hidden ones excepted).

    Example:  plait artifact pack ranker/ --name ranker --format onnx --entry model.onnx --input x:float32:-1,80 --output score:float32:-1

    Example:  plait artifact pack two-tower/ --name two-tower --format torch_export --entry model.pt2
    --input user:float32:1,41:request --input item:float32:-1,64 --output score:float32:-1 --row-splits row_splits --self-test self_test.npz

    Example:  plait artifact pack mlp/ --name mlp --format safetensors --entry model.safetensors --architecture mlp --config in=4
    --config "hidden=[8]" --config out=1 --input x:float32:-1,4 --output y:float32:-1,1
    """
    from plait.errors import AlreadyExists, InvalidArgument, Violation  # noqa: PLC0415
    from plait.registry import artifact, records, signing  # noqa: PLC0415

    if (folder / artifact.FILE_NAME).exists() and not replace:
        raise AlreadyExists(f"{folder / artifact.FILE_NAME} is there already: --replace writes over it", reason="ARTIFACT_EXISTS")
    _refuse_pickle(folder, format_, entry)
    problems: list[Violation] = []
    tensors = [[_tensor(f"--{side}", text, problems) for text in given or ()] for side, given in (("input", inputs), ("output", outputs))]
    arguments = dict(_pair("--config", text, problems) for text in config or ())
    label_files = dict(_pair("--labels", text, problems) for text in labels or ())
    given_values = {"--name": name, "--format": format_, "--entry": entry, "--input": inputs, "--output": outputs}
    problems += [Violation(flag, _what_is_missing(flag, folder)) for flag, value in given_values.items() if not value]
    given_files = [("--entry", entry), ("--self-test", self_test), *(("--labels", file) for file in label_files.values())]
    problems += [
        Violation(flag, _what_is_not_there(file, folder)) for flag, file in given_files if file and not _is_published(folder, file)
    ]
    if problems:
        raise InvalidArgument("model.yaml cannot be written yet", reason="ARTIFACT_INCOMPLETE", violations=problems)
    batching: dict[str, Any] = {"max_rows": max_rows, "max_queue_delay_ms": max_queue_delay_ms, "buckets": tuple(sorted(buckets or ()))}
    if max_rows is not None and max_rows > records.Batching().max_queue_rows:
        batching["max_queue_rows"] = max_rows
    manifest = artifact.ArtifactManifest(
        name=name,
        format=format_,  # type: ignore[arg-type]  # `write` checks what it writes
        entry=entry,
        inputs=tuple(t for t in tensors[0] if t is not None),
        outputs=tuple(t for t in tensors[1] if t is not None),
        feature_set=feature_set,
        batching=records.Batching(row_splits=row_splits, **{key: value for key, value in batching.items() if value is not None}),
        execution=records.Execution(instances=instances, kind=instance_kind),  # type: ignore[arg-type]
        architecture=artifact.Architecture(name=architecture, config={key: _value(text) for key, text in arguments.items()})
        if architecture or arguments
        else None,
        labels=label_files,
        self_test=artifact.SelfTest(file=self_test, tolerance=tolerance) if self_test else None,
    )
    content = artifact.compose(folder, manifest)
    _check_self_test(folder, manifest)
    artifact.write_whole(folder / artifact.FILE_NAME, content)
    signature = folder / signing.FILE_NAME
    if signature.exists():
        artifact.remove(signature)
        write_note(f"{signature} was of the former model.yaml and is deleted: sign again")
    _tell(folder, artifact.read(folder), artifact.digest_of(content), as_json=as_json)


def _refuse_pickle(folder: Path, format_: str, entry: str) -> None:
    """Say no before anything else is asked for: no answer to the other questions would help."""
    from plait.registry import pickles  # noqa: PLC0415

    if format_.lower() in pickles.NAMES:
        raise pickles.refused(f"{format_} is no format for a model")
    if entry:
        if pickles.is_pickle(folder / entry):
            raise pickles.refused(f"{entry} is a pickle")
        return
    files = _visible(folder)
    if files and all(pickles.is_pickle(folder / name) for name in files):
        raise pickles.refused(f"there is nothing but pickle in {folder} ({', '.join(files[:_SHOWN_FILES])})")


def _check_self_test(folder: Path, manifest: ArtifactManifest) -> None:
    """Say now what a worker would say of the self test."""
    from plait.registry import artifact, self_test  # noqa: PLC0415

    if manifest.self_test is None:
        return
    file = folder / manifest.self_test.file
    try:
        self_test.check(file.read_bytes(), manifest)
    except OSError as error:
        raise artifact.unreadable(file, error) from error


def _is_published(folder: Path, name: str) -> bool:
    """Say whether a name is one of the folder's own files, which hidden ones are not."""
    inside = not name.startswith("/") and not any(part.startswith(".") for part in name.split("/"))
    return inside and (folder / name).is_file()


def _what_is_not_there(name: str, folder: Path) -> str:
    return f"there is no file {name[:80]!r} that can be published; {_what_is_there(folder)}"


def _what_is_there(folder: Path) -> str:
    files = _visible(folder)
    more = ", …" if len(files) > _SHOWN_FILES else ""
    return f"here are {', '.join(files[:_SHOWN_FILES])}{more}" if files else "the folder is empty: put the model's files in it"


def _visible(folder: Path) -> list[str]:
    found = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return sorted(name.encode(errors="backslashreplace").decode() for name in found)


def _tell(folder: Path, manifest: ArtifactManifest, digest: str, *, as_json: bool) -> None:
    from plait.registry import artifact  # noqa: PLC0415

    if as_json:
        write_json({"file": str(folder / artifact.FILE_NAME), "digest": digest, "files": sorted(manifest.files)})
        return
    write_line(f"{folder / artifact.FILE_NAME} written: {len(manifest.files)} file(s)", "green")
    write_line(digest)
    if manifest.self_test is None:
        write_note("without --self-test a worker checks only that the model runs, not that it answers what it should")


def _tensor(flag: str, text: str, problems: list[Violation]) -> TensorSpec | None:
    """Read "item:float32:-1,64" or "user:float32:1,41:request"; dtypes are checked where model.yaml is."""
    from plait.errors import Violation  # noqa: PLC0415
    from plait.registry.records import TensorSpec  # noqa: PLC0415

    match text.split(":"):
        case [name, dtype, shape]:
            per = "row"
        case [name, dtype, shape, ("row" | "request") as per]:
            pass
        case _:
            problems.append(Violation(flag, f"expected {_TENSOR}, found {text[:80]!r}; for example item:float32:-1,64"))
            return None
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        problems.append(Violation(flag, f"expected sizes with commas between them, found {shape[:80]!r}; for example -1,64"))
        return None
    return TensorSpec(name=name, dtype=dtype, shape=sizes, per=per)  # type: ignore[arg-type]


def _pair(flag: str, text: str, problems: list[Violation]) -> tuple[str, str]:
    from plait.errors import Violation  # noqa: PLC0415

    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        problems.append(Violation(flag, f"expected NAME=VALUE, found {text[:80]!r}"))
    return name, value


def _value(text: str) -> Any:
    """Read an argument as YAML does: 8, 0.5, true, relu, [256, 128]."""
    import yaml  # noqa: PLC0415

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _what_is_missing(flag: str, folder: Path) -> str:
    match flag:
        case "--name":
            return f"how is the model called? for example {folder.resolve().name.lower()}"
        case "--format":
            return "which format is it? torch_export, torchscript, aotinductor, onnx or safetensors; pickle is never loaded"
        case "--entry":
            return f"which file is loaded? {_what_is_there(folder)}"
        case _:
            return f"which tensors? for example {flag} {'item:float32:-1,64' if flag == '--input' else 'score:float32:-1'}"
