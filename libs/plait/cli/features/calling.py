"""Where feature-retrieval is, who calls it and for which tenant: what the commands of `plait features` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

if TYPE_CHECKING:
    from plait.registry.store import Store

_PANEL: Final = "Where feature-retrieval is"
_MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024

ViewArgument = Annotated[str, typer.Argument(metavar="VIEW", help="Name of the feature view.", show_default=False)]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)]
VersionOption = Annotated[int, typer.Option("--view-version", min=0, help="Version of the view; 0 = the current one.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="PLAIT_FEATURES_ADDRESS",
        help="host:port; default: the mesh on --state.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PLAIT_API_KEY", help="Better given in PLAIT_API_KEY.", show_default=False, rich_help_panel=_PANEL),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Call over TLS, trusting the system's roots.", rich_help_panel=_PANEL)]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", dir_okay=False, help="Call over TLS, trusting this PEM file.", show_default=False, rich_help_panel=_PANEL),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Send the API key to another machine in plain text.", rich_help_panel=_PANEL)
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One feature-retrieval: `address` is host:port, `ca` a PEM file; `api_key` is sent with every call."""

    address: str
    api_key: str = ""
    tls: bool = False
    ca: Path | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def __repr__(self) -> str:
        return f"<Target {self.address}>"


def target(address: str | None, api_key: str | None, tls: bool, ca: Path | None, insecure: bool, state: Path) -> Target:
    """Return what was given, the rest from the mesh on `state`. Raises FailedPrecondition (MESH_NOT_RUNNING), InvalidArgument."""
    from plait.errors import FailedPrecondition, InvalidArgument  # noqa: PLC0415
    from plait.local.endpoints import Endpoints  # noqa: PLC0415

    if address is None:
        try:
            endpoints = Endpoints.read(state)
        except FailedPrecondition as error:
            message = f"which feature-retrieval? {error.message}; or give --address and PLAIT_API_KEY"
            raise FailedPrecondition(message, reason=error.reason) from error
        address, api_key = endpoints.feature_retrieval, api_key or endpoints.api_key
    if api_key and not (tls or ca or insecure or _is_loopback(address)):
        message = f"the API key would travel to {address} in plain text: use --tls, or --insecure if a service mesh encrypts the way"
        raise InvalidArgument(message, reason="API_KEY_EXPOSED")
    return Target(address=address, api_key=api_key or "", tls=tls or ca is not None, ca=ca)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in {"localhost", "::1"} or host.startswith("127.")


@asynccontextmanager
async def stub(where: Target) -> AsyncIterator[Any]:
    """Connect; give the service's stub. Errors of calls are grpc.aio.AioRpcError (see `plait.errors.from_rpc_error`)."""
    import grpc  # noqa: PLC0415

    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc  # noqa: PLC0415

    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ]
    if _is_loopback(where.address):
        options.append(("grpc.enable_http_proxy", 0))  # gRPC would take what stays here to the proxy named in http_proxy
    if where.tls:
        credentials = grpc.ssl_channel_credentials(where.ca.read_bytes() if where.ca else None)
        channel = grpc.aio.secure_channel(where.address, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(where.address, options=options)
    async with channel:
        yield pb_grpc.FeatureRetrievalServiceStub(channel)


async def tenant_of(store: Store, api_key: str) -> str:
    """Return whose rows a key reads and writes. Raises NotFound (KEY_NOT_FOUND) for a key this registry does not know."""
    from plait.errors import NotFound  # noqa: PLC0415
    from plait.rpc.credentials import DEFAULT_TENANT, digest  # noqa: PLC0415

    if not api_key:
        return DEFAULT_TENANT
    wanted = digest(api_key)
    tenants = [key.tenant for key in await store.list_keys() if key.sha256 == wanted]
    if not tenants:
        raise NotFound("the registry at --dsn does not know this API key: do both belong to one mesh?", reason="KEY_NOT_FOUND")
    return tenants[0]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; a call that failed is told as its typed error."""
    import grpc  # noqa: PLC0415

    from plait.errors import from_rpc_error  # noqa: PLC0415

    try:
        return asyncio.run(work)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
