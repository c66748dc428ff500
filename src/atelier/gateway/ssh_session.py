"""One session of a visitor's (a shell, a program, sftp), joined with one in the guest. Made by ``ssh_connection``.

Bytes, window sizes, signals, breaks and ends are passed on both ways, with back-pressure. The exit status is passed on
only when the guest's side has closed: data may still come after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import asyncssh

from atelier.gateway.ssh_guest import PACKET_BYTES, WINDOW_BYTES
from atelier.model.errors import AtelierError

_PATIENCE_SECONDS: Final = 5.0
Channel = Any
"""A channel of asyncssh's, whose types do not say that with no encoding it carries bytes."""
_FAILED_STATUS: Final = 255
"""What ssh itself ends with when it cannot connect."""


class VisitorSession(asyncssh.SSHServerSession[bytes]):
    """``log_in`` gives the connection to the guest; ``note_use`` is told of everything that is typed or sent."""

    def __init__(
        self, log_in: Callable[[], Awaitable[asyncssh.SSHClientConnection]], note_use: Callable[[], None]
    ) -> None:
        self._log_in = log_in
        self._note_use = note_use
        self._channel: Channel
        self._guest: Channel | None = None
        self._joining: asyncio.Task[None] | None = None
        self._early: list[tuple[bytes, asyncssh.DataType]] = []
        self._has_ended = False

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._channel = chan

    def connection_lost(self, exc: Exception | None) -> None:
        if self._joining is not None:
            self._joining.cancel()
        if self._guest is not None:
            self._guest.close()

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: object) -> bool:
        return True

    def shell_requested(self) -> bool:
        return True

    def exec_requested(self, command: str) -> bool:
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        return True

    def session_started(self) -> None:
        self._channel.pause_reading()
        self._joining = asyncio.create_task(self._join())

    async def _join(self) -> None:
        chan = self._channel
        try:
            connection = await self._await_login()
            terminal = chan.get_terminal_type()
            opened = await cast(Any, connection).create_session(
                lambda: _GuestSession(chan, self._note_use if terminal is None else None),
                command=chan.get_command(),
                subsystem=chan.get_subsystem(),
                env=dict(chan.get_environment()),
                term_type=terminal,
                term_size=chan.get_terminal_size(),
                term_modes=chan.get_terminal_modes(),
                request_pty="force" if terminal else False,
                encoding=None,
                window=WINDOW_BYTES,
                max_pktsize=PACKET_BYTES,
            )
        except (AtelierError, asyncssh.Error, OSError) as error:
            reason = error.message if isinstance(error, AtelierError) else str(error)
            chan.write_stderr(f"atelier: {reason}\r\n".encode())
            chan.exit(_FAILED_STATUS)
            return
        guest = self._guest = opened[0]
        for data, kind in self._early:
            guest.write(data, kind)
        self._early.clear()
        if self._has_ended:
            guest.write_eof()
        chan.resume_reading()

    async def _await_login(self) -> asyncssh.SSHClientConnection:
        logging_in = asyncio.ensure_future(self._log_in())
        try:
            done, _ = await asyncio.wait({logging_in}, timeout=_PATIENCE_SECONDS)
            if not done:
                self._channel.write_stderr(b"atelier: waiting for the sandbox\r\n")
            return await logging_in
        finally:
            logging_in.cancel()

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self._note_use()
        if self._guest is None:
            self._early.append((data, datatype))
        elif not self._guest.is_closing():
            self._guest.write(data, datatype)

    def eof_received(self) -> bool:
        if self._guest is None:
            self._has_ended = True
        elif not self._guest.is_closing():
            self._guest.write_eof()
        # The channel stays open for what the guest still has to say.
        return True

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._guest is not None:
            self._guest.change_terminal_size(width, height, pixwidth, pixheight)

    def signal_received(self, signal: str) -> None:
        if self._guest is not None:
            self._guest.send_signal(signal)

    def break_received(self, msec: int) -> bool:
        if self._guest is not None:
            self._guest.send_break(msec)
        return True

    def pause_writing(self) -> None:
        if self._guest is not None:
            self._guest.pause_reading()

    def resume_writing(self) -> None:
        if self._guest is not None:
            self._guest.resume_reading()


class _GuestSession(asyncssh.SSHClientSession[bytes]):
    """``note_use``: told of output, where somebody waits for it."""

    def __init__(self, visitor: Channel, note_use: Callable[[], None] | None) -> None:
        self._visitor = visitor
        self._note_use = note_use
        self._end: Callable[[], None] = visitor.close

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        if self._note_use is not None:
            self._note_use()
        if not self._visitor.is_closing():
            self._visitor.write(data, datatype)

    def eof_received(self) -> bool:
        if not self._visitor.is_closing():
            self._visitor.write_eof()
        return True

    def exit_status_received(self, status: int) -> None:
        self._end = lambda: self._visitor.exit(status)

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self._end = lambda: self._visitor.exit_with_signal(signal, core_dumped, msg, lang)

    def pause_writing(self) -> None:
        self._visitor.pause_reading()

    def resume_writing(self) -> None:
        self._visitor.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
