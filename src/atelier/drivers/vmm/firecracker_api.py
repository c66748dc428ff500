"""Firecracker's API: HTTP over the unix socket in its jail. One request per connection.

Called by the Firecracker driver. The VMM may be broken out of: no link in place of the socket is followed, and what it
answers is bounded. Every refusal becomes a VmmError with the vendor's own words. Source: Firecracker
src/firecracker/swagger/firecracker.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import httpcore

from atelier.drivers.vmm.firecracker_config import Resource
from atelier.host.unix_sockets import exact_socket
from atelier.model.errors import DiskFullError, VmmError

_ANSWER_MAX_BYTES = 1024 * 1024
_HINTS = (
    ("/dev/kvm", "give the machine's user the right to /dev/kvm; see 'atelier host doctor'"),
    ("kvm", "KVM does not work here; see 'atelier host doctor'"),
    ("tap", "the machine's TAP is gone, is another's, or another process holds it"),
    ("allocate memory", "ask for less memory, or remove sandboxes"),
    ("no such file", "an image, volume or saved machine was removed"),
    ("permission denied", "a file in the jail is not the machine's; see 'atelier host doctor'"),
)
"""By what stands in the fault message, in lower case."""


class FirecrackerApi:
    """``timeout_seconds`` bounds each request; writing a snapshot takes as long as the disk does."""

    def __init__(self, socket: Path, *, timeout_seconds: float = 30.0) -> None:
        self._socket = socket
        self._timeout_seconds = timeout_seconds

    async def get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path, None)

    async def put(self, resource: Resource) -> None:
        await self._request("PUT", resource.path, resource.body())

    async def patch(self, resource: Resource) -> None:
        await self._request("PATCH", resource.path, resource.body())

    async def state(self) -> str:
        """``Not started``, ``Running`` or ``Paused``."""
        state = (await self.get("/")).get("state")
        if not isinstance(state, str):
            raise self._nonsense("GET /", "it tells no state")
        return state

    async def version(self) -> str:
        version = (await self.get("/version")).get("firecracker_version")
        if not isinstance(version, str):
            raise self._nonsense("GET /version", "it tells no version")
        return version

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        what = f"{method} {path}"
        status, answer = await self._exchange(what, method, path, body)
        value = self._parse(what, answer)
        if 200 <= status < 300:
            return value
        fault = str(value.get("fault_message", "") or answer[:300].decode(errors="replace")).strip()
        raise _refusal(what, status, fault)

    async def _exchange(self, what: str, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        content = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", "localhost"), ("Accept", "application/json")]
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_seconds)
        try:
            with exact_socket(self._socket) as name:
                async with (
                    httpcore.AsyncConnectionPool(uds=name) as pool,
                    pool.stream(
                        method,
                        f"http://localhost{path}",
                        headers=headers,
                        content=content,
                        extensions={"timeout": limits},
                    ) as response,
                ):
                    answer = b""
                    async for piece in response.aiter_stream():
                        answer += piece
                        if len(answer) > _ANSWER_MAX_BYTES:
                            raise self._nonsense(what, "it has no end")
                    return response.status, answer
        except httpcore.TimeoutException as error:
            raise VmmError(
                f"Firecracker did not answer {what} within {self._timeout_seconds:g} s",
                code="firecracker_timeout",
                hint="the host may be overloaded, or the VMM hangs; its log may tell",
            ) from error
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise VmmError(
                f"Firecracker is gone, or has not answered {what}: {str(error) or type(error).__name__}",
                code="firecracker_gone",
                hint="its log may tell why it ended",
            ) from error

    def _parse(self, what: str, answer: bytes) -> dict[str, Any]:
        if not answer.strip():
            return {}
        try:
            value: object = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise self._nonsense(what, "it is no JSON") from error
        if not isinstance(value, dict):
            raise self._nonsense(what, "it is no object")
        return cast("dict[str, Any]", value)

    def _nonsense(self, what: str, why: str) -> VmmError:
        return VmmError(
            f"Firecracker's answer to {what} makes no sense: {why}",
            code="firecracker_protocol",
            hint="is it a Firecracker that listens there?",
        )


def _refusal(what: str, status: int, fault: str) -> VmmError | DiskFullError:
    lowered = fault.lower()
    if "no space left" in lowered:
        return DiskFullError(
            f"no space left while Firecracker did {what}: {fault}", hint="free some space, then try again"
        )
    hint = next((hint for word, hint in _HINTS if word in lowered), "")
    message = f"Firecracker refused {what}: {fault or f'status {status}'}"
    if status == 404:
        return VmmError(
            message, code="firecracker_unknown_request", hint="it is too old for this: install a newer release"
        )
    if status >= 500:
        return VmmError(message, code="firecracker_failed", hint=hint or "its log may tell why")
    return VmmError(message, code="firecracker_refused", hint=hint)
