"""`plait artifact`: what an ML engineer hands over, from a folder of files to a signed artifact that workers fetch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli import artifact_pack
from plait.cli.options import AllowHttpOption, JsonOption
from plait.cli.output import write_json, write_line, write_note, write_table
from plait.cli.progress import transfer

if TYPE_CHECKING:
    from plait.registry.artifact import ArtifactManifest
    from plait.registry.publishing import Described
    from plait.registry.records import TensorSpec

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="The artifact's folder.", file_okay=False, exists=True)]
PlaceArgument = Annotated[str, typer.Argument(metavar="PLACE", help="A folder, s3://bucket/folder or gs://bucket/folder.")]

_HELP = """Make, sign, check and publish model artifacts.

An artifact is a folder with a model.yaml that says how to load the model and what each file must be.

Start here:

  plait artifact pack ranker/ --name ranker --format onnx --entry model.onnx --input x:float32:-1,80 --output score:float32:-1

  plait artifact verify ranker/

  plait artifact push ranker/ s3://models/ranker/7
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(name="artifact", help=_HELP, no_args_is_help=True)
    for command in (artifact_pack.pack, describe, verify, keygen, sign, push):
        group.command()(command)
    app.add_typer(group)


def describe(place: PlaceArgument, allow_http: AllowHttpOption = False, as_json: JsonOption = False) -> None:
    """Show what an artifact's model.yaml says; nothing else of it is read.

    Example:  plait artifact describe ranker/

    Example:  plait artifact describe s3://models/ranker/7 --json
    """
    found = _described(place, allow_http)
    if as_json:
        write_json(_document(found))
        return
    manifest, signed = found.manifest, _signed(found)
    write_line(f"{manifest.name} ({manifest.format}), {len(manifest.files)} file(s), {found.size_bytes} bytes", "bold")
    write_line(f"at {found.location}\n{found.digest}\n{signed}\n")
    tensors = [("input", t) for t in manifest.inputs] + [("output", t) for t in manifest.outputs]
    write_table(("", "tensor", "dtype", "shape", "per"), [(side, t.name, t.dtype, _shape(t), t.per) for side, t in tensors])
    write_line("")
    write_table(("file", "bytes", "sha256", "is"), _files(manifest))


def verify(
    place: PlaceArgument,
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="Demand a signature by this key: ed25519:… or a .pub file; may be repeated.", show_default=False),
    ] = None,
    allow_http: AllowHttpOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of an artifact against its model.yaml, and the signature where a key is given.

    Example:  plait artifact verify ranker/

    Example:  plait artifact verify s3://models/ranker/7 --public-key signing.pub
    """
    from plait.registry import publishing  # noqa: PLC0415
    from plait.registry.signing import Trust  # noqa: PLC0415

    trust = Trust([_key_text(key) for key in public_key or ()], required=bool(public_key))
    found = _described(place, allow_http)
    with transfer(f"checking {place}", found.size_bytes) as progress:
        publishing.verify(found, _options(allow_http), trust, progress)
    if as_json:
        write_json(_document(found) | {"signature_checked": trust.required})
        return
    write_line(f"{found.location} is whole: {len(found.manifest.files)} file(s), {found.size_bytes} bytes", "green")
    write_line(found.digest)
    write_line(f"signed by trusted key {found.signed.key_id}" if trust.required and found.signed else _signed(found))


def keygen(
    out: Annotated[
        Path, typer.Option("--out", dir_okay=False, help="File for the private key; the public one goes beside it as .pub.")
    ] = Path("signing.pem"),
    as_json: JsonOption = False,
) -> None:
    """Make an Ed25519 key to sign artifacts with.

    Keep the private key to yourself; list the public one in the worker's setting PLAIT_MODEL_WORKER_ARTIFACTS__TRUSTED_KEYS.

    Example:  plait artifact keygen --out signing.pem
    """
    from plait.errors import AlreadyExists, InvalidArgument  # noqa: PLC0415
    from plait.registry import signing  # noqa: PLC0415

    public_file = out.with_suffix(".pub")
    if public_file == out:
        raise InvalidArgument(f"{out} is where the public key would go: choose another --out, {out.with_suffix('.pem')}", reason="KEY_NAME")
    if public_file.exists():
        raise AlreadyExists(f"{public_file} is there already; a key is never written over: choose another --out", reason="KEY_EXISTS")
    pem, public = signing.generate()
    _write_new(out, pem, mode=0o600)
    _write_new(public_file, f"{public}\n".encode(), mode=0o644)
    if as_json:
        write_json({"private_key_file": str(out), "public_key_file": str(public_file), "public_key": str(public), "key_id": public.id})
        return
    write_line(f"private key (only you may read it): {out}\npublic key: {public_file}")
    write_line(f"{public}   (id {public.id})")


def sign(
    folder: FolderArgument,
    key: Annotated[Path, typer.Option("--key", dir_okay=False, exists=True, help="Private key, as keygen makes it.")],
    as_json: JsonOption = False,
) -> None:
    """Check an artifact's files, then sign its model.yaml; writes model.yaml.sig beside it.

    Example:  plait artifact sign ranker/ --key signing.pem
    """
    from plait.registry import artifact, publishing, signing  # noqa: PLC0415

    public = publishing.sign(folder, _key_bytes(key))
    if as_json:
        write_json({"file": str(folder / signing.FILE_NAME), "digest": artifact.digest(folder), "key_id": public.id})
        return
    write_line(f"{folder / signing.FILE_NAME} written: signed by key {public.id}", "green")


def push(
    folder: FolderArgument,
    to: Annotated[str, typer.Argument(metavar="TO", help="s3://bucket/folder or gs://bucket/folder, of its own for each version.")],
    allow_http: AllowHttpOption = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an artifact, model.yaml last, so that nobody ever sees half of it; what is published is never changed.

    Credentials and the endpoint come from the environment (AWS_…, GOOGLE_…) or the machine's identity.

    Example:  plait artifact push ranker/ s3://models/ranker/7
    """
    from plait.errors import InvalidArgument  # noqa: PLC0415
    from plait.registry import locations, publishing  # noqa: PLC0415

    location = locations.parse(to, Path.cwd())
    if isinstance(location, Path):
        raise InvalidArgument(f"{to} is a folder; push goes to s3://bucket/folder or gs://bucket/folder", reason="ARTIFACT_LOCATION")
    size_bytes = _described(str(folder), allow_http).size_bytes
    with transfer(f"pushing {folder}", size_bytes) as progress:
        found = publishing.push(folder, location, _options(allow_http), progress)
    if as_json:
        write_json(_document(found))
        return
    write_line(f"{location} holds {found.manifest.name}: {len(found.manifest.files)} file(s), {size_bytes} bytes", "green")
    write_line(f"{found.digest}\n{_signed(found)}")
    write_note(f"publish it: spec.versions: - {{version: …, artifact: {location}}} in a Model's manifest, then plait apply")


def _described(place: str, allow_http: bool) -> Described:
    from plait.registry import locations, publishing  # noqa: PLC0415

    return publishing.describe(locations.parse(place, Path.cwd()), _options(allow_http))


def _options(allow_http: bool) -> Any:
    from plait.registry.sources import StoreOptions  # noqa: PLC0415

    return StoreOptions(allow_http=allow_http)


def _document(found: Described) -> dict[str, Any]:
    from plait.registry.specs import to_plain  # noqa: PLC0415

    signed = found.signed
    return {
        "location": str(found.location),
        "digest": found.digest,
        "size_bytes": found.size_bytes,
        "signed_by": signed.key_id if signed is not None else None,
        "model": to_plain(found.manifest),
    }


def _signed(found: Described) -> str:
    return f"signed by key {found.signed.key_id} (not checked: give --public-key to verify)" if found.signed is not None else "not signed"


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in spec.shape) + "]"


def _files(manifest: ArtifactManifest) -> list[tuple[object, ...]]:
    roles = {manifest.entry: "entry", **{file: f"labels of {output}" for output, file in manifest.labels.items()}}
    if manifest.self_test is not None:
        roles[manifest.self_test.file] = f"self test, tolerance {manifest.self_test.tolerance:g}"
    return [(name, file.size_bytes, file.sha256[:16] + "…", roles.get(name, "")) for name, file in manifest.files.items()]


def _key_text(given: str) -> str:
    """Return the text of a public key given as such or as a file."""
    from plait.errors import InvalidArgument  # noqa: PLC0415

    if given.startswith("ed25519:"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{given} is neither ed25519:… nor a file that holds it", reason="PUBLIC_KEY_INVALID") from error


def _key_bytes(file: Path) -> bytes:
    from plait.errors import FailedPrecondition  # noqa: PLC0415

    try:
        return file.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"the key {file} cannot be read: {error.strerror}", reason="KEY_UNREADABLE") from error


def _write_new(file: Path, content: bytes, *, mode: int) -> None:
    from plait.errors import AlreadyExists, FailedPrecondition  # noqa: PLC0415

    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise AlreadyExists(f"{file} is there already; a key is never written over: choose another --out", reason="KEY_EXISTS") from error
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be written: {error.strerror}", reason="KEY_UNWRITABLE") from error
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
    except OSError as error:
        file.unlink(missing_ok=True)  # half a key is none
        raise FailedPrecondition(f"{file} cannot be written: {error.strerror}", reason="KEY_UNWRITABLE") from error
