"""As much of the Kubernetes API as following EndpointSlices takes, over real HTTP: lists, watches from a version on, and ways to fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web
from kubernetes.aio import client

PATH = "/apis/discovery.k8s.io/v1/namespaces/ml/endpointslices"


def endpoint(host: str, *, uid: str = "", zone: str = "", **conditions: bool | None) -> dict[str, Any]:
    made: dict[str, Any] = {"addresses": [host], "conditions": conditions}
    if uid:
        made["targetRef"] = {"kind": "Pod", "uid": uid}
    if zone:
        made["zone"] = zone
    return made


def endpoint_slice(
    name: str, *endpoints: dict[str, Any], family: str = "IPv4", ports: Any = None, service: str = "workers"
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "ml", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": ports if ports is not None else [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": 50053}],
    }


class KubernetesApi:
    """Holds slices by name; every change gets the next resource version and goes to those who watch.

    `status` other than 200 answers every request; versions up to `forgotten` cannot be watched from (410 Gone).
    """

    def __init__(self) -> None:
        self.status = 200
        self.forgotten = 0
        self.lists = 0
        self.watching = 0
        self._version = 100
        self._slices: dict[str, dict[str, Any]] = {}
        self._log: list[tuple[int, dict[str, Any]]] = []
        self._changed = asyncio.Condition()
        self._cut = 0
        self._runner = web.AppRunner(self._app(), handle_signals=False, shutdown_timeout=0.1)
        self.port = 0

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get(PATH, self._answer)
        return app

    async def __aenter__(self) -> KubernetesApi:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        await self._runner.cleanup()

    def configuration(self) -> client.Configuration:
        made = client.Configuration(host=f"http://127.0.0.1:{self.port}")
        made.client_session_kwargs = {"trust_env": False}
        return made

    async def put(self, made: dict[str, Any]) -> None:
        """Add or change a slice."""
        name = made["metadata"]["name"]
        await self._change("MODIFIED" if name in self._slices else "ADDED", made)

    async def delete(self, name: str) -> None:
        await self._change("DELETED", self._slices[name])

    async def cut(self) -> None:
        """End every watch, as an API server that is restarted does."""
        async with self._changed:
            self._cut += 1
            self._changed.notify_all()

    async def _change(self, kind: str, made: dict[str, Any]) -> None:
        async with self._changed:
            self._version += 1
            made["metadata"]["resourceVersion"] = str(self._version)
            name = made["metadata"]["name"]
            if kind == "DELETED":
                del self._slices[name]
            else:
                self._slices[name] = made
            self._log.append((self._version, {"type": kind, "object": made}))
            self._changed.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.json_response({"kind": "Status", "code": self.status, "reason": "Away", "message": "away"}, status=self.status)
        label, _, service = request.query["labelSelector"].partition("=")
        if "watch" not in request.query:
            self.lists += 1
            items = [one for one in self._slices.values() if one["metadata"]["labels"].get(label) == service]
            body = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(self._version)}, "items": items}
            return web.json_response(body)
        return await self._watch(request, label, service)

    async def _watch(self, request: web.Request, label: str, service: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        seen, cut = int(request.query["resourceVersion"]), self._cut
        if seen <= self.forgotten:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        self.watching += 1
        try:
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while cut == self._cut:
                    async with self._changed:
                        news = [(version, event) for version, event in self._log if version > seen]
                        if not news:
                            await self._changed.wait()
                            continue
                    for version, event in news:
                        seen = version
                        if event["object"]["metadata"]["labels"].get(label) == service:
                            await response.write(json.dumps(event).encode() + b"\n")
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.watching -= 1
        return response
