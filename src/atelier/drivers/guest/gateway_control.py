"""Asks the gateway to offer, or no longer offer, a sandbox's guest channel: one JSON line there, one back.

Used by ``agent``. A connection per request; these are rare.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any, cast

from atelier.model.errors import AtelierError, GuestUnreachableError, HostError
from atelier.model.machine import GuestEndpoint

_ANSWER_MAX_BYTES = 4 * 1024 * 1024
_TIMEOUT_SECONDS = 10.0


class GatewayControl:
    """The client side of the gateway's control socket."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

    async def attach(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        """Idempotent. Raises GuestUnreachableError when the gateway does not answer, HostError when it refuses."""
        await self._ask(
            "attach",
            f"attaching the guest channel of {sandbox_id}",
            sandbox_id=sandbox_id,
            socket_path=str(endpoint.socket_path),
            kind=endpoint.kind,
            token=token,
        )

    async def detach(self, sandbox_id: str) -> None:
        """Idempotent: a sandbox that is not attached is no error."""
        await self._ask("detach", f"detaching the guest channel of {sandbox_id}", sandbox_id=sandbox_id)

    async def list_attached(self) -> list[str]:
        """Ids of the sandboxes whose channels are attached."""
        what = "listing the guest channels"
        channels = (await self._ask("list", what)).get("channels")
        if not isinstance(channels, list):
            raise HostError(f"{what}: the gateway's answer holds no list")
        found = (cast("dict[str, Any]", channel).get("sandbox_id") for channel in cast("list[object]", channels))
        return [sandbox_id for sandbox_id in found if isinstance(sandbox_id, str)]

    async def _ask(self, operation: str, what: str, **arguments: str) -> dict[str, Any]:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(str(self._socket_path), limit=_ANSWER_MAX_BYTES)
                writer.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
        except TimeoutError as error:
            raise self._unreachable(what, f"no answer within {_TIMEOUT_SECONDS:g} s") from error
        except (OSError, ValueError) as error:
            raise self._unreachable(what, str(error)) from error
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        if not line.endswith(b"\n"):
            raise self._unreachable(what, "the gateway closed the connection")
        return self._checked(line, what)

    @staticmethod
    def _checked(line: bytes, what: str) -> dict[str, Any]:
        try:
            answer: object = json.loads(line)
        except ValueError as error:
            raise HostError(f"{what}: the gateway's answer is no JSON") from error
        if not isinstance(answer, dict):
            raise HostError(f"{what}: the gateway's answer is no object")
        reply = cast("dict[str, Any]", answer)
        if reply.get("ok") is not True:
            raise HostError(
                f"{what}: {reply.get('message', 'the gateway refused')}", code=str(reply.get("code") or "host_error")
            )
        return reply

    def _unreachable(self, what: str, reason: str) -> AtelierError:
        return GuestUnreachableError(
            f"{what}: {reason}",
            code="gateway_unreachable",
            hint=f"the gateway listens on {self._socket_path}; is it running?",
        )
