"""The terminals of a guest, by the service terminal.Terminal of its guest agent. Part of ``agent``."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from atelier.drivers.guest.event_streams import open_events
from atelier.drivers.guest.guest_http import GuestHttp
from atelier.drivers.guest.messages import Message, size_message, start_message
from atelier.drivers.guest.terminal_messages import terminal_event, terminal_session, terminal_sessions
from atelier.model.guest import ProcessSpec, TerminalSize
from atelier.model.terminal import TerminalEvent, TerminalSession

_SERVICE: Final = "terminal.Terminal/"
_NO_TERMINAL: Final = "terminal_not_found"
_NO_PROGRAM: Final = "program_not_found"
_INPUT_PIECE_BYTES: Final = 1024 * 1024


class AgentTerminals:
    """GuestTerminals; ``guest`` finds a sandbox's connections."""

    def __init__(self, guest: Callable[[str], GuestHttp]) -> None:
        self._guest = guest

    async def list(self, sandbox_id: str) -> list[TerminalSession]:
        return terminal_sessions(await self._call(sandbox_id, "listing terminals", "List", {}, is_question=True))

    async def open(self, sandbox_id: str, spec: ProcessSpec, title: str = "") -> TerminalSession:
        message = {**start_message(spec), "title": title}
        what = f"opening a terminal with {spec.arguments[0]}"
        answer = await self._call(sandbox_id, what, "Open", message, user=spec.user, absent=_NO_PROGRAM)
        return terminal_session(answer.get("terminal"))

    def attach(
        self, sandbox_id: str, terminal: str, size: TerminalSize | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[TerminalEvent]]:
        message: Message = {"terminal": terminal}
        if size is not None:
            message["size"] = size_message(size)
        what = f"attaching to terminal {terminal}"
        return open_events(
            self._guest(sandbox_id), what, _SERVICE + "Attach", message, terminal_event, absent=_NO_TERMINAL
        )

    async def write(self, sandbox_id: str, terminal: str, data: bytes) -> None:
        for start in range(0, len(data), _INPUT_PIECE_BYTES):
            piece = base64.b64encode(data[start : start + _INPUT_PIECE_BYTES]).decode()
            message = {"terminal": terminal, "pty": piece}
            await self._call(sandbox_id, f"typing into terminal {terminal}", "Write", message)

    async def resize(self, sandbox_id: str, terminal: str, size: TerminalSize, viewer: int = 0) -> None:
        message = {"terminal": terminal, "viewer": viewer, "size": size_message(size)}
        await self._call(sandbox_id, f"resizing terminal {terminal}", "Resize", message)

    async def rename(self, sandbox_id: str, terminal: str, title: str) -> TerminalSession:
        message = {"terminal": terminal, "title": title}
        answer = await self._call(sandbox_id, f"naming terminal {terminal}", "Rename", message)
        return terminal_session(answer.get("terminal"))

    async def close(self, sandbox_id: str, terminal: str) -> None:
        await self._call(sandbox_id, f"closing terminal {terminal}", "Close", {"terminal": terminal})

    async def _call(
        self,
        sandbox_id: str,
        what: str,
        procedure: str,
        message: Message,
        *,
        user: str = "",
        absent: str = _NO_TERMINAL,
        is_question: bool = False,
    ) -> Message:
        return await self._guest(sandbox_id).call(
            what, _SERVICE + procedure, message, user=user, absent=absent, is_question=is_question
        )
