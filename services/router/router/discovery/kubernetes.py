"""Endpoints of a Kubernetes Service, followed through its EndpointSlices.

List, then watch from there on, as https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes says. A watch
that died without a word looks like one without news, so each lasts a minute at most and everything is listed again. What the API cannot say
just now stays as it was: endpoints serve on while the control plane is away.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from plait.telemetry.logging import get_logger
from router.discovery.found import Found, Tell

if TYPE_CHECKING:
    from kubernetes.aio import client

log = get_logger(__name__)

_SERVICE_LABEL: Final = "kubernetes.io/service-name"
_WATCH_S: Final = 60
_SLACK_S: Final = 10.0  # the server ends a watch; where it does not, we do after this much more
_FIRST_RETRY_S: Final = 0.5
_MAX_RETRY_S: Final = 10.0
_GONE: Final = 410


class KubernetesDiscovery:
    """The ready pods behind `service` in `namespace`; `port` by its name there.

    `configure` makes the client's configuration, anew for each list, as service account tokens are rotated; by default that of the pod we
    run in, which needs get, list and watch on `endpointslices.discovery.k8s.io`. `on_news` is called whenever the API answered.
    """

    def __init__(
        self,
        namespace: str,
        service: str,
        port: str,
        *,
        configure: Callable[[], client.Configuration] | None = None,
        on_news: Callable[[], None] = lambda: None,
        watch_s: int = _WATCH_S,
    ) -> None:
        self._namespace = namespace
        self._service = service
        self._port = port
        self._configure = configure or _in_cluster
        self._on_news = on_news
        self._watch_s = watch_s

    def __repr__(self) -> str:
        return f"<KubernetesDiscovery {self._namespace}/{self._service}:{self._port}>"

    async def run(self, tell: Tell) -> None:
        """Tell of all endpoints, at once and whenever they change, until cancelled. What cannot be asked just now is retried for ever."""
        try:
            import kubernetes.aio  # noqa: PLC0415, F401  (as below)
        except ImportError:  # a pool of the registry must not end a router that cannot follow it
            log.exception("endpoints in Kubernetes cannot be followed: pip install 'plait-router[kubernetes]'", discovery=repr(self))
            await asyncio.Event().wait()
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await self._follow(tell)
                retry_s = _FIRST_RETRY_S
            except Exception as error:
                if not _passing(error):
                    raise
                log.warning("the Kubernetes API does not answer; known endpoints are kept", discovery=repr(self), error=_words(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S)

    async def _follow(self, tell: Tell) -> None:
        """List, and watch until it is time to list again."""
        from kubernetes.aio import client, watch  # noqa: PLC0415  (half a second, and an extra that only those in Kubernetes install)

        async with client.ApiClient(self._configure()) as api:
            discovery: Any = client.DiscoveryV1Api(api)
            watcher: Any = watch.Watch()  # type: ignore[no-untyped-call]
            selector = f"{_SERVICE_LABEL}={self._service}"
            listed = await discovery.list_namespaced_endpoint_slice(self._namespace, label_selector=selector, _request_timeout=_SLACK_S)
            slices = {one.metadata.name: one for one in listed.items}
            told = self._tell(slices.values(), tell, None)
            changes = watcher.stream(
                discovery.list_namespaced_endpoint_slice,
                self._namespace,
                label_selector=selector,
                resource_version=listed.metadata.resource_version,
                timeout_seconds=self._watch_s,
                _request_timeout=self._watch_s + _SLACK_S,
            )
            try:
                async with changes:
                    async for change in changes:
                        one = change["object"]
                        if change["type"] == "DELETED":
                            slices.pop(one.metadata.name, None)
                        elif change["type"] in ("ADDED", "MODIFIED"):
                            slices[one.metadata.name] = one
                        told = self._tell(slices.values(), tell, told)
            except client.exceptions.ApiException as error:
                if error.status != _GONE:  # else what was listed is too long ago to watch from
                    raise

    def _tell(self, slices: Iterable[Any], tell: Tell, told: frozenset[Found] | None) -> frozenset[Found]:
        self._on_news()
        found = endpoints(slices, self._port)
        if found != told:
            tell(found)
        return found


def endpoints(slices: Iterable[Any], port: str) -> frozenset[Found]:
    """Return what EndpointSlices list under a port's name: one endpoint per pod, whatever the families of addresses it has (IPv4 first), and
    in however many slices it is while they are rewritten."""
    found: dict[object, Found] = {}
    for one in sorted((s for s in slices if s.address_type in ("IPv4", "IPv6")), key=lambda s: (s.address_type, s.metadata.name)):
        number = next((p.port for p in one.ports or () if (p.name or "") == port), None)
        if number is None:
            continue
        for endpoint in one.endpoints or ():
            made = _found(endpoint, one.address_type, number)
            key = endpoint.target_ref.uid if endpoint.target_ref is not None and endpoint.target_ref.uid else made.address
            known = found.get(key)
            if known is None or (known.address == made.address and made.ready and not known.ready):
                found[key] = made
    return frozenset(found.values())


def _found(endpoint: Any, family: str, port: int) -> Found:
    host = endpoint.addresses[0]
    conditions = endpoint.conditions
    ready = conditions is None or conditions.ready is None or conditions.ready
    return Found(
        address=f"[{host}]:{port}" if family == "IPv6" else f"{host}:{port}",
        zone=endpoint.zone or "",
        ready=bool(ready),
        terminating=bool(conditions is not None and conditions.terminating),
    )


def _in_cluster() -> client.Configuration:
    from kubernetes.aio import client, config  # noqa: PLC0415  (as above)

    made = client.Configuration()
    config.load_incluster_config(client_configuration=made)  # type: ignore[no-untyped-call]
    made.client_session_kwargs = {
        "trust_env": False
    }  # the API is in the cluster; a proxy in the environment is meant for the world outside
    return made


def _passing(error: Exception) -> bool:
    """Whether it may go away by itself: the API away, refusing, or answering nonsense, as against a fault of ours."""
    import aiohttp  # noqa: PLC0415  (comes with kubernetes)
    from kubernetes.aio import client, config  # noqa: PLC0415  (as above)

    outside = (client.exceptions.ApiException, config.ConfigException, aiohttp.ClientError, OSError, TimeoutError, ssl.SSLError, ValueError)
    return isinstance(error, outside)


def _words(error: Exception) -> str:
    """Return what happened in a line: an ApiException's own words are a page of headers and body."""
    status = getattr(error, "status", None)
    return f"{type(error).__name__} {status} {getattr(error, 'reason', '')}" if status else f"{type(error).__name__} {str(error)[:200]}"
