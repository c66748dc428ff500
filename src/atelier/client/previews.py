"""Ports of a sandbox and their previews: the part of ``Sandbox`` and ``AsyncSandbox`` that is about the web, and HTTP clients
that reach previews.

Names below ``localhost`` lead to this machine here, whatever its resolver makes of them.
"""

from __future__ import annotations

import ssl

import httpx

from atelier.client import preview_calls
from atelier.client.connection import AsyncConnectionLease, ConnectionLease
from atelier.model.errors import PreconditionError
from atelier.model.preview import KEY_HEADER
from atelier.schemas.previews import Port
from atelier.schemas.sandboxes import Sandbox as SandboxDetails

_LOCAL = ".localhost"


class PreviewTransport(httpx.HTTPTransport):
    """Resolves ``*.localhost`` by itself."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return super().handle_request(_at_this_machine(request))


class AsyncPreviewTransport(httpx.AsyncHTTPTransport):
    """The same on asyncio."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await super().handle_async_request(_at_this_machine(request))


def _at_this_machine(request: httpx.Request) -> httpx.Request:
    if request.url.scheme == "http" and request.url.host.endswith(_LOCAL):
        # The header Host is set already, and stays.
        request.url = request.url.copy_with(host="127.0.0.1")
    return request


def _url_of(port: Port) -> str:
    if port.url is None:
        raise PreconditionError("previews are not served by this manager", code="no_previews", hint="its log says why")
    return port.url


def _verify(url: str) -> ssl.SSLContext | bool:
    return True if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class SandboxPorts:
    """Mixed into ``SandboxLife``."""

    _lease: ConnectionLease
    details: SandboxDetails

    def ports(self) -> list[Port]:
        """Those on which something listens, and those that are shared."""
        return self._lease.connection.send(preview_calls.list_ports(self.details.id)).items

    def preview_url(self, port: int | str) -> str:
        """Where a port (a number, or ``vscode``, ``agent``, ``browser``) is visited. Raises PreconditionError
        (``no_previews``)."""
        return _url_of(self._lease.connection.send(preview_calls.get_port(self.details.id, str(port))))

    def preview_client(self, port: int | str) -> httpx.Client:
        """An HTTP client for a port's preview, which enters by this handle's key. To be closed."""
        url = self.preview_url(port)
        transport = PreviewTransport(verify=_verify(url), trust_env=False)
        return httpx.Client(base_url=url, headers={KEY_HEADER: self._lease.endpoint.api_key}, transport=transport)


class AsyncSandboxPorts:
    """Mixed into ``AsyncSandboxLife``."""

    _lease: AsyncConnectionLease
    details: SandboxDetails

    async def ports(self) -> list[Port]:
        """See ``SandboxPorts``."""
        return (await self._lease.connection.send(preview_calls.list_ports(self.details.id))).items

    async def preview_url(self, port: int | str) -> str:
        """See ``SandboxPorts``."""
        return _url_of(await self._lease.connection.send(preview_calls.get_port(self.details.id, str(port))))

    async def preview_client(self, port: int | str) -> httpx.AsyncClient:
        """See ``SandboxPorts``."""
        url = await self.preview_url(port)
        transport = AsyncPreviewTransport(verify=_verify(url), trust_env=False)
        return httpx.AsyncClient(base_url=url, headers={KEY_HEADER: self._lease.endpoint.api_key}, transport=transport)
