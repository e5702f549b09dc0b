"""`plait features erase` and `verify`: entities that wish to be forgotten, and the proof of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from plait.cli.features.calling import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    Target,
    TlsOption,
    run,
    stub,
    target,
)
from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line, write_note, write_table

_AT_ONCE: Final = 1000  # ids of one call
_KEY: Final = "PLAIT_FEATURE_RETRIEVAL_PRIVACY__KEY"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(erase)
    app.command()(verify)


def erase(
    entity_type: Annotated[str, typer.Argument(metavar="TYPE", help="Entity type, for example user.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record; no ids.", show_default=False)],
    certificate: Annotated[
        Path,
        typer.Option(
            "--certificate", metavar="FILE", dir_okay=False, help="Where the certificates go, as JSON; a new file.", show_default=False
        ),
    ],
    ids: Annotated[str, typer.Option("--ids", help="Ids, separated by commas.", show_default=False)] = "",
    ids_from: Annotated[
        Path | None, typer.Option("--ids-from", metavar="FILE", dir_okay=False, help="A file with one id a line.", show_default=False)
    ] = None,
    int_ids: Annotated[bool, typer.Option("--int-ids", help="The ids are numbers (entity key: int64), not text.")] = False,
    json_ids: Annotated[
        bool, typer.Option("--json-ids", help='Each line is JSON: "text", a number, or ["shop", 7] for a key of several parts.')
    ] = False,
    for_ever: Annotated[bool, typer.Option("--for-ever", help="Also refuse whatever will happen to them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: it cannot be undone.")] = False,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Remove entities from every feature view, for good: neither a replay nor a backfill brings them back.

    What happens to them from five minutes later on is taken again, unless --for-ever is given.

    Example:  plait features erase user --ids 4711 --reason "request 17" --certificate erased.json

    Example:  plait features erase user --ids-from ids.txt --int-ids --for-ever --yes --reason "closed accounts" --certificate erased.json
    """
    wanted = _ids(ids, ids_from, int_ids=int_ids, json_ids=json_ids)
    where = target(address, api_key, tls, ca, insecure, state)
    if not yes:
        typer.confirm(f"Erase {len(wanted):,} entities of type {entity_type} at {where.address}? It cannot be undone.", abort=True)
    _claim(certificate)
    try:
        documents = run(_erase(entity_type, wanted, reason, certificate, where, for_ever=for_ever))
    finally:
        if not certificate.stat().st_size:  # nothing was certified: the same command may be run again
            certificate.unlink()
    if as_json:
        write_json({"certificates": documents})
        return
    rows = sum(view.get("rows", 0) for document in documents for view in document.get("views", []))
    letters = sum(document.get("dead_letters", 0) for document in documents)
    write_line(
        f"{len(documents):,} entities are erased, {rows:,} rows and {letters:,} dead letters were removed; "
        f"the certificates are in {certificate}"
    )
    for place in documents[0].get("not_covered", []):
        write_note(f"not covered: {place}")


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, exists=True, help="Certificates, as erase wrote them.")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            envvar=_KEY,
            help=f"The service's privacy key, better given in {_KEY}; default: the mesh's on --state.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Check that certificates were signed with the service's privacy key and that nothing of them changed since.

    Example:  plait features verify erased.json
    """
    from google.protobuf import json_format  # noqa: PLC0415

    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
    from plait.errors import InvalidArgument  # noqa: PLC0415
    from plait.registry.certificates import Signer  # noqa: PLC0415

    key = key or _key_on(state)
    try:
        documents = json.loads(file.read_text(encoding="utf-8"))["certificates"]
        found = [json_format.ParseDict(document, pb.ErasureCertificate()) for document in documents]
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise InvalidArgument(f"{file} holds no certificates ({type(error).__name__})", reason="CERTIFICATE_UNREADABLE") from error
    signer = Signer(key.encode())
    verdicts = [(one.id, one.entity_hash, signer.verify(one)) for one in found]
    if as_json:
        write_json([{"id": name, "entity_hash": entity, "valid": valid} for name, entity, valid in verdicts])
    else:
        write_table(("certificate", "entity", "valid"), verdicts)
    if not all(valid for _, _, valid in verdicts):
        raise InvalidArgument("a certificate is not valid: it was changed, or signed with another key", reason="CERTIFICATE_INVALID")


def _key_on(state: Path) -> str:
    from plait.local.keys import privacy_key_on  # noqa: PLC0415
    from plait.local.state import StateFolder  # noqa: PLC0415

    key = privacy_key_on(StateFolder(state))
    if not key:
        raise typer.BadParameter(f"no mesh on {state} has one: give --state, --key or {_KEY}", param_hint="--key")
    return key


def _claim(file: Path) -> None:
    """Make the file of the certificates, before anything is erased: neither may it fail to be written, nor replace others."""
    try:
        file.open("x").close()
    except FileExistsError:
        raise typer.BadParameter(f"{file} is there already: certificates are not overwritten", param_hint="--certificate") from None
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written: {type(error).__name__}", param_hint="--certificate") from None


def _ids(given: str, file: Path | None, *, int_ids: bool, json_ids: bool) -> list[Any]:
    """Return the ids. Messages hold none of them."""
    texts = [text.strip() for text in given.split(",") if text.strip()]
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file} cannot be read: {type(error).__name__}", param_hint="--ids-from") from None
    if not texts:
        raise typer.BadParameter("give ids with --ids or --ids-from", param_hint="--ids")
    try:
        if json_ids:
            return [json.loads(text) for text in texts]
        return [int(text) for text in texts] if int_ids else texts
    except ValueError:
        raise typer.BadParameter("an id is no number, or no JSON", param_hint="--int-ids / --json-ids") from None


async def _erase(entity_type: str, wanted: list[Any], reason: str, file: Path, where: Target, *, for_ever: bool) -> list[dict[str, Any]]:
    """Erase, a thousand at a time. What was certified is on disk before the next thousand: a break loses no certificate."""
    from google.protobuf import json_format  # noqa: PLC0415

    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    documents: list[dict[str, Any]] = []
    async with stub(where) as service:
        for at in range(0, len(wanted), _AT_ONCE):
            request = pb.EraseEntityRequest(reason=reason, for_ever=for_ever)
            request.entities.entity_type = entity_type
            for entity_id in wanted[at : at + _AT_ONCE]:
                _put(request.entities.ids, entity_id)
            response = await service.EraseEntity(request, metadata=where.metadata, timeout=120)
            documents += [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in response.certificates]
            file.write_text(json.dumps({"certificates": documents}, indent=2), encoding="utf-8")
    return documents


def _put(message: Any, entity_id: Any) -> None:
    if isinstance(entity_id, str):
        message.string_ids.append(entity_id)
    elif isinstance(entity_id, int):
        message.int64_ids.append(entity_id)
    elif isinstance(entity_id, list):
        parts = message.composite_ids.add().parts
        for part in entity_id:
            parts.add(**{"string_part" if isinstance(part, str) else "int64_part": part})
    else:
        raise typer.BadParameter("an id is text, a number, or a list of these", param_hint="--json-ids")
