"""What the manager says to the gateway: newline-delimited JSON on a unix socket that only this user can open.

Served by ``__main__``; owns all attached channels. Requests ``{"operation": "attach", "sandbox_id", "socket_path",
"token"}``, ``{"operation": "detach", "sandbox_id"}``, ``{"operation": "list"}``, ``{"operation": "ping"}``, and
``{"operation": "serve_ssh", ...}`` (``ssh_server``), ``{"operation": "serve_previews", ...}`` (``preview_server``); answers
``{"ok": true, ...}`` or ``{"ok": false, "code", "message"}``, in order. attach and detach are idempotent; an attach
with another socket or token replaces the channel. Neither is done for a client that has gone meanwhile: it may be a dead
manager, and the next one have asked for the opposite. It must never wait for a guest.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import atelier
from atelier.gateway.attachments import Attachment, AttachmentFiles, parse_attachment
from atelier.gateway.channel import GuestChannel
from atelier.gateway.clients import ClientDoor
from atelier.gateway.preview_server import PreviewServer
from atelier.gateway.ssh_server import SshServer
from atelier.guest_protocol import PROTOCOL_VERSION
from atelier.host.files import disk_full_as_error
from atelier.host.line_server import Answer, Request
from atelier.host.peers import has_gone
from atelier.model.errors import AtelierError, ConflictError, InvalidRequestError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import RunLayout

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attached:
    attachment: Attachment
    channel: GuestChannel
    door: ClientDoor
    task: asyncio.Task[None]


class ChannelSet:
    """All attached channels of this gateway, and the operations on them."""

    def __init__(
        self, layout: RunLayout, ssh: SshServer, previews: PreviewServer, *, epoch_wait_seconds: float
    ) -> None:
        self._layout = layout
        self._ssh = ssh
        self._previews = previews
        self._files = AttachmentFiles(layout.channels)
        self._epoch_wait_seconds = epoch_wait_seconds
        self._attached: dict[str, _Attached] = {}
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Attach again what an earlier gateway had attached; sweep away what else it has left."""
        self._files.sweep()
        for attachment in self._files.load():
            try:
                await self._attach(attachment)
            except (AtelierError, OSError) as error:
                log.error("cannot attach %s again: %s", attachment.sandbox_id, error)

    async def close(self) -> None:
        """Cut everything; the attachments stay on disk for the next gateway."""
        async with self._lock:
            for sandbox_id in list(self._attached):
                await self._drop(sandbox_id)

    async def answer(self, request: Request, asker: int) -> Answer:
        """Perform one request, which came over the socket ``asker``. Raises AtelierError, OSError."""
        name = request.get("operation")
        match name:
            case "ping":
                return self._on_ping()
            case "list":
                return self._on_list()
            case "serve_ssh":
                async with self._lock:
                    return await self._ssh.answer(request)
            case "serve_previews":
                async with self._lock:
                    return await self._previews.answer(request)
            case "attach" | "detach":
                # One after the other: whoever is found here has all that it asked for before its successor has anything.
                async with self._lock:
                    if has_gone(asker):
                        raise ConflictError(f"who asked for this {name} has gone", code="asker_gone")
                    return await (self._on_attach if name == "attach" else self._on_detach)(request)
            case _:
                raise InvalidRequestError(
                    "unknown operation: the gateway knows attach, detach, list, ping, serve_ssh and serve_previews"
                )

    async def _on_attach(self, request: Request) -> Answer:
        attachment = parse_attachment(request)
        present = self._attached.get(attachment.sandbox_id)
        if present is None or present.attachment != attachment:
            self._files.save(attachment)
            await self._drop(attachment.sandbox_id)
            try:
                await self._attach(attachment)
            except BaseException:
                self._files.remove(attachment.sandbox_id)
                raise
        return {"ok": True, "channel_socket": str(self._layout.channel_socket(attachment.sandbox_id))}

    async def _on_detach(self, request: Request) -> Answer:
        sandbox_id = request.get("sandbox_id")
        if not isinstance(sandbox_id, str) or not is_sandbox_id(sandbox_id):
            raise InvalidRequestError("sandbox_id is missing, or is no sandbox id")
        self._files.remove(sandbox_id)
        await self._drop(sandbox_id)
        return {"ok": True}

    def _on_list(self) -> Answer:
        return {"ok": True, "channels": [_describe(attached) for attached in self._attached.values()]}

    def _on_ping(self) -> Answer:
        return {
            "ok": True,
            "pid": os.getpid(),
            "protocol_version": PROTOCOL_VERSION,
            "version": atelier.__version__,
        }

    async def _attach(self, attachment: Attachment) -> None:
        channel = GuestChannel(
            attachment.sandbox_id, Path(attachment.socket_path), attachment.token, is_vsock=attachment.kind == "vsock"
        )
        path = self._layout.channel_socket(attachment.sandbox_id)
        door = ClientDoor(channel, path, epoch_wait_seconds=self._epoch_wait_seconds)
        with disk_full_as_error(f"opening {path}"):
            door.open()
        task = asyncio.create_task(channel.run(), name=f"channel-{attachment.sandbox_id}")
        task.add_done_callback(_log_end)
        self._attached[attachment.sandbox_id] = _Attached(attachment, channel, door, task)

    async def _drop(self, sandbox_id: str) -> None:
        attached = self._attached.pop(sandbox_id, None)
        if attached is None:
            return
        await attached.door.close()
        attached.task.cancel()
        await asyncio.gather(attached.task, return_exceptions=True)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("%s ended by a mistake in the gateway", task.get_name(), exc_info=task.exception())


def _describe(attached: _Attached) -> Answer:
    channel = attached.channel
    return {
        "sandbox_id": channel.sandbox_id,
        "socket_path": str(channel.vmm_socket),
        "state": channel.state,
        "last_error": channel.last_error,
        "epochs": channel.epochs,
        "streams": channel.stream_count,
        "clients": attached.door.client_count,
        "received_bytes": channel.received_bytes,
        "sent_bytes": channel.sent_bytes,
        "frames_received": channel.frames_received,
        "violations": channel.violations,
        "last_violation": channel.last_violation,
    }
