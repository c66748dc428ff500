"""The user's terminal: raw mode, its size, and a session with a terminal in a sandbox (``shown_terminals``).

Called by ``shell`` and ``exec -t``. The only module of the CLI that may use termios. Whatever happens, the terminal
gets back the settings that it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from atelier.cli.shown_terminals import ShownTerminal
from atelier.client.terminal import AsyncTerminal
from atelier.model.errors import TransientError
from atelier.model.guest import ProcessEnded, ProcessOutput, TerminalSize
from atelier.schemas.terminals import JoinedEvent, LostEvent, ReplayedEvent

T = TypeVar("T")

EXIT_TERMINAL_FAILED = 125
_ESCAPE = 0x1D  # Ctrl-], as telnet and machinectl use it
_ESCAPE_COUNT = 3
_ESCAPE_SECONDS = 1.0
_INTERRUPT = 0x03
_RECONNECT_SECONDS = 30.0
_RECONNECT_PAUSE_SECONDS = 0.5
_READ_BYTES = 64 * 1024
_STATUS_QUESTION, _STATUS_ANSWER = b"\x1b[5n", b"\x1b[0n"
"""Source: ECMA-48, DSR; every terminal emulator answers it, after all that was asked before."""
_ANSWER_SECONDS = 1.0

_CALM_DOWN = (
    "\x1b[?1047l"  # leave the alternate screen
    "\x1b[?25h"  # show the cursor
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l"  # no mouse reports
    "\x1b[?2004l"  # no bracketed paste
    "\x1b[?1l\x1b>"  # ordinary cursor keys and keypad
    "\x1b[0m"
)
"""What a program does itself when it ends well; for when its end was not seen."""


def is_terminal() -> bool:
    """Whether stdin and stdout are both a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def current_size() -> TerminalSize:
    with contextlib.suppress(OSError, ValueError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns > 0 and size.lines > 0:
            return TerminalSize(min(size.columns, 1000), min(size.lines, 1000))
    return TerminalSize(80, 24)


@contextlib.contextmanager
def raw_mode(descriptor: int) -> Generator[Callable[[], None]]:
    """Every key goes to the sandbox, Ctrl-C too. Yields a function that sets the mode again (after a stop)."""
    before = termios.tcgetattr(descriptor)

    def enter() -> None:
        tty.setraw(descriptor, termios.TCSADRAIN)

    try:
        enter()
        yield enter
    finally:
        # TCSAFLUSH drops keys that were meant for the sandbox: they are no commands for the shell out here.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


async def run_terminal(shown: ShownTerminal) -> int:
    """Show a terminal of the sandbox in the user's own until its program ends; return the program's exit status.

    Raises AtelierError when the terminal cannot be opened, or is lost for longer than 30 s.
    """
    # Opened, there is a terminal: before, the user's own is not touched.
    session = _Session(shown, await shown.open(current_size()))
    try:
        if shown.greeting:
            _write(f"[atelier: {shown.greeting}]\r\n".encode())
        with raw_mode(sys.stdin.fileno()) as enter_raw_mode:
            return await session.run(enter_raw_mode)
    finally:
        await session.close()


class _Left(Exception):
    """The user left, or this process was told to end; ``status`` is what it ends with."""

    def __init__(self, status: int, note: str) -> None:
        super().__init__(note)
        self.status = status
        self.note = note


class _Session:
    def __init__(self, shown: ShownTerminal, terminal: AsyncTerminal[Any]) -> None:
        self._shown = shown
        self._terminal: AsyncTerminal[Any] | None = terminal
        self._escapes: list[float] = []
        self._answers = _LateAnswers()
        self._lost_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._left: asyncio.Future[_Left] | None = None

    async def close(self) -> None:
        if self._terminal is not None:
            await self._terminal.close()

    async def run(self, enter_raw_mode: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        loop.add_signal_handler(signal.SIGWINCH, self._on_resize)
        loop.add_signal_handler(signal.SIGCONT, self._on_continue, enter_raw_mode)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_hang_up, number)
        terminal = self._terminal
        assert terminal is not None
        typing = asyncio.create_task(self._type())
        ended_well = False
        try:
            while True:
                try:
                    status = await self._until_left(self._show(terminal))
                    ended_well = True
                    return status
                except TransientError as error:
                    await terminal.close()
                    terminal = await self._until_left(self._reconnect(error))
        except _Left as left:
            _write(f"\r\n{left.note}\r\n".encode())
            if left.status > 128:
                await self._shown.hang_up()
            return left.status
        finally:
            for task in (typing, *self._tasks):
                task.cancel()
            for number in (signal.SIGWINCH, signal.SIGCONT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
            if not ended_well:
                _write(_CALM_DOWN.encode())

    async def _until_left(self, work: Awaitable[T]) -> T:
        """``work``'s result, unless the user leaves before."""
        assert self._left is not None
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, self._left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        raise self._left.result()

    async def _show(self, terminal: AsyncTerminal[Any]) -> int:
        while True:
            event = await terminal.receive()
            self._lost_at = 0.0
            self._shown.hear(event)
            match event:
                case ProcessOutput():
                    self._answers.shown(event.data)
                    _write(event.data)
                case ProcessEnded():
                    return event.exit_code
                case JoinedEvent():
                    self._answers.begin()
                case LostEvent():
                    _write(f"\r\n[atelier: {event.bytes} bytes are kept no more]\r\n".encode())
                case ReplayedEvent():
                    if self._answers.ask():
                        _write(_STATUS_QUESTION)
                        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, self._await_no_more)
                    else:
                        self._await_no_more()
                case _:
                    pass  # its title, for one, reaches the user's terminal as the program wrote it

    async def _reconnect(self, reason: TransientError) -> AsyncTerminal[Any]:
        """Attach to the same program again: a restart of the manager or the gateway leaves it alone."""
        if not self._shown.is_found:
            raise reason
        self._terminal = None
        if not self._lost_at:
            self._lost_at = time.monotonic()
            _write(b"\r\n[atelier: connection lost, trying again; Ctrl-C gives up]\r\n")
        while True:
            if time.monotonic() - self._lost_at > _RECONNECT_SECONDS:
                raise reason
            await asyncio.sleep(_RECONNECT_PAUSE_SECONDS)
            with contextlib.suppress(TransientError):
                self._terminal = await self._shown.open(current_size(), again=True)
                self._on_resize()
                return self._terminal

    async def _type(self) -> None:
        descriptor = sys.stdin.fileno()
        while True:
            await _readable(descriptor)
            try:
                data = os.read(descriptor, _READ_BYTES)
            except OSError:
                data = b""
            if not data:
                self._leave(128 + signal.SIGHUP, "[atelier: the terminal is gone]")
                return
            if self._wants_to_leave(data):
                self._leave(0, f"[atelier: left; {self._shown.farewell}]")
                return
            if self._terminal is None:
                if _INTERRUPT in data:
                    self._leave(EXIT_TERMINAL_FAILED, "[atelier: gave up]")
                continue  # keys typed while there is no connection lead nowhere
            await self._send(self._answers.pass_on(data))

    async def _send(self, data: bytes) -> None:
        if data and self._terminal is not None:
            with contextlib.suppress(TransientError):  # the reading side sees it too, and connects again
                await self._terminal.send(data)

    def _await_no_more(self) -> None:
        self._do(self._send(self._answers.give_up()))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wants_to_leave(self, data: bytes) -> bool:
        now = time.monotonic()
        for byte in data:
            self._escapes = [*self._escapes, now] if byte == _ESCAPE else []
        self._escapes = [at for at in self._escapes if now - at < _ESCAPE_SECONDS]
        return len(self._escapes) >= _ESCAPE_COUNT

    def _leave(self, status: int, note: str) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_result(_Left(status, note))

    def _on_resize(self) -> None:
        if self._terminal is not None:
            self._do(self._resize(self._terminal))

    async def _resize(self, terminal: AsyncTerminal[Any]) -> None:
        with contextlib.suppress(TransientError):
            await terminal.resize(current_size())

    def _on_continue(self, enter_raw_mode: Callable[[], None]) -> None:
        with contextlib.suppress(termios.error):
            enter_raw_mode()
        self._on_resize()

    def _on_hang_up(self, number: signal.Signals) -> None:
        self._leave(128 + number, f"[atelier: ended by {number.name}]")


class _LateAnswers:
    """Keeps from a program what the user's terminal says to questions of long ago.

    Among what was written before there may be questions that a program asked the terminal of its time (where its cursor
    is, which colours it has). Shown again, they are answered again, as if typed. So what is typed is held while that is
    shown, then one more question is put; what came before its answer is dropped. A terminal that does not answer asks
    nothing, and what was held is passed on."""

    def __init__(self) -> None:
        self._held: bytearray | None = None
        self._may_ask = False
        self._has_asked = False

    def begin(self) -> None:
        self._held, self._may_ask, self._has_asked = bytearray(), False, False

    def shown(self, data: bytes) -> None:
        self._may_ask = self._may_ask or (self._held is not None and (b"\x1b" in data or b"\x05" in data))

    def ask(self) -> bool:
        """All of it has been shown: whether there may be answers, and the question has to be put."""
        self._has_asked = self._may_ask
        return self._may_ask

    def pass_on(self, typed: bytes) -> bytes:
        """How much of what was typed is for the program, now."""
        if self._held is None:
            return typed
        self._held = (self._held + typed)[-_READ_BYTES:]
        _, answer, rest = self._held.partition(_STATUS_ANSWER)
        if not (self._has_asked and answer):
            return b""
        self._held = None
        return bytes(rest)

    def give_up(self) -> bytes:
        held, self._held = self._held, None
        return bytes(held or b"")


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _write(data: bytes) -> None:
    """To the terminal itself, all of it; a terminal that is gone is no error (its end is noticed by reading)."""
    descriptor = sys.stdout.fileno()
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while len(view) > 0:
            view = view[os.write(descriptor, view) :]
