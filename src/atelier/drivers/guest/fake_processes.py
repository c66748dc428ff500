"""The processes of a fake guest: a fixed few programs as coroutines; no process of the host is ever started.

Used by ``fake`` only. ``true``, ``false``, ``echo``, ``cat``, ``sleep`` and ``exit`` are known, by bare name or by path;
anything else writes that it was not found to stderr and ends with 127. Signals, time limits, stdin and the echo of a
terminal behave as in a real guest.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from atelier.drivers.guest.fake_files import FakeFiles
from atelier.model.errors import AtelierError, InvalidRequestError
from atelier.model.guest import (
    ProcessEnded,
    ProcessEvent,
    ProcessOutput,
    ProcessSpec,
    ProcessStarted,
    ProcessSummary,
    TerminalSize,
)

_RING_BYTES = 64 * 1024
_READER_BYTES = 256 * 1024
_IGNORED_SIGNALS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
_END_OF_INPUT = 0x04
_INTERRUPT = 0x03


class _Exit(Exception):
    """The program ends with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class _Reader:
    """Who follows a process. ``room`` is clear while it is too far behind."""

    def __init__(self) -> None:
        self.events: deque[ProcessEvent] = deque()
        self.pending_bytes = 0
        self.arrived = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    def push(self, event: ProcessEvent) -> None:
        self.events.append(event)
        if isinstance(event, ProcessOutput):
            self.pending_bytes += len(event.data)
            if self.pending_bytes >= _READER_BYTES:
                self.room.clear()
        self.arrived.set()

    async def follow(self) -> AsyncIterator[ProcessEvent]:
        while True:
            while self.events:
                event = self.events.popleft()
                if isinstance(event, ProcessOutput):
                    self.pending_bytes -= len(event.data)
                    if self.pending_bytes < _READER_BYTES:
                        self.room.set()
                yield event
                if isinstance(event, ProcessEnded):
                    return
            self.arrived.clear()
            await self.arrived.wait()


class FakeProcess:
    """One process. Made inside a running loop; its program begins at once."""

    def __init__(self, pid: int, spec: ProcessSpec, files: FakeFiles, on_end: Callable[[FakeProcess], None]) -> None:
        self.pid = pid
        self.spec = spec
        self.terminal_size = spec.terminal
        self.ended: ProcessEnded | None = None
        self._files = files
        self._on_end = on_end
        self._readers: list[_Reader] = []
        self._ring: deque[ProcessOutput] = deque()
        self._ring_bytes = 0
        self._input: deque[bytes] = deque()
        self._line = b""
        self._input_ended = not spec.stdin and spec.terminal is None
        self._input_arrived = asyncio.Event()
        self._signal = 0
        self._timed_out = False
        limit = spec.timeout_seconds
        self._timer = asyncio.get_running_loop().call_later(limit, self._time_is_over) if limit else None
        self._task = asyncio.create_task(self._run(), name=f"fake-process-{pid}")
        # Not within the task: one that is cancelled before its first step runs none of its lines.
        self._task.add_done_callback(self._ended)

    @property
    def summary(self) -> ProcessSummary:
        spec = self.spec
        return ProcessSummary(
            self.pid, spec.tag, spec.arguments, spec.working_directory, self.terminal_size is not None
        )

    def attach(self, *, replay: bool) -> _Reader:
        reader = _Reader()
        reader.push(ProcessStarted(self.pid))
        if replay:
            for output in self._ring:
                reader.push(output)
        if self.ended is not None:
            reader.push(self.ended)
        self._readers.append(reader)
        return reader

    def detach(self, reader: _Reader) -> None:
        reader.room.set()
        self._readers.remove(reader)

    # What is asked of it.

    async def send_input(self, data: bytes, *, terminal: bool) -> None:
        if terminal != (self.spec.terminal is not None):
            raise InvalidRequestError(f"process {self.pid} has {'no ' if terminal else 'a '}terminal")
        if terminal:
            await self._type(data)
            return
        if not self.spec.stdin or self._input_ended:
            raise InvalidRequestError(f"the input of process {self.pid} is closed")
        self._feed(data)

    def close_input(self) -> None:
        if self.spec.terminal is not None:
            raise InvalidRequestError(f"process {self.pid} has a terminal; send it a Ctrl-D")
        self._end_input()

    def send_signal(self, number: int) -> None:
        if self.ended is None and number not in _IGNORED_SIGNALS:
            self._signal = number
            self._task.cancel()

    def resize(self, size: TerminalSize) -> None:
        if self.spec.terminal is None:
            raise InvalidRequestError(f"process {self.pid} has no terminal")
        self.terminal_size = size

    async def close(self) -> None:
        """The guest is gone."""
        self.send_signal(signal.SIGKILL)
        await asyncio.gather(self._task, return_exceptions=True)

    # Input and output.

    def _feed(self, data: bytes) -> None:
        self._input.append(data)
        self._input_arrived.set()

    def _end_input(self) -> None:
        self._input_ended = True
        self._input_arrived.set()

    async def _type(self, data: bytes) -> None:
        """What a terminal does with keys: it shows them, and hands whole lines on."""
        for byte in data:
            if byte == _INTERRUPT:
                await self._write("pty", b"^C")
                self.send_signal(signal.SIGINT)
            elif byte == _END_OF_INPUT:
                if self._line:
                    self._feed(self._line)
                    self._line = b""
                else:
                    self._end_input()
            elif byte in b"\r\n":
                await self._write("pty", b"\r\n")
                self._feed(self._line + b"\n")
                self._line = b""
            else:
                await self._write("pty", bytes([byte]))
                self._line += bytes([byte])

    async def _write(self, stream: str, data: bytes) -> None:
        if not data:
            return
        output = ProcessOutput(stream, data)
        self._ring.append(output)
        self._ring_bytes += len(data)
        while self._ring_bytes > _RING_BYTES and len(self._ring) > 1:
            self._ring_bytes -= len(self._ring.popleft().data)
        for reader in self._readers:
            reader.push(output)
        for reader in list(self._readers):
            await reader.room.wait()

    async def _print(self, data: bytes, *, to_stderr: bool = False) -> None:
        if self.spec.terminal is not None:
            await self._write("pty", data.replace(b"\n", b"\r\n"))
        else:
            await self._write("stderr" if to_stderr else "stdout", data)

    async def _read(self) -> bytes:
        """The next piece of input, empty at its end."""
        while not self._input:
            if self._input_ended:
                return b""
            self._input_arrived.clear()
            await self._input_arrived.wait()
        return self._input.popleft()

    # The program.

    async def _run(self) -> None:
        name = self.spec.arguments[0].rpartition("/")[2]
        await _PROGRAMS.get(name, _unknown)(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        failure = None if task.cancelled() else task.exception()
        if self._signal or task.cancelled():
            number = self._signal or signal.SIGKILL
            words = (signal.strsignal(number) or f"signal {number}").lower()
            self.ended = ProcessEnded(128 + number, f"signal: {words}", "timeout" if self._timed_out else "")
        elif failure is None or isinstance(failure, _Exit):
            status = failure.status if failure is not None else 0
            self.ended = ProcessEnded(status, f"exit status {status}")
        else:
            self.ended = ProcessEnded(1, "exit status 1", f"a mistake in the fake: {failure!r}")
        for reader in self._readers:
            reader.push(self.ended)
        self._on_end(self)

    def _time_is_over(self) -> None:
        self._timed_out = True
        self.send_signal(signal.SIGKILL)

    async def say(self, text: str) -> None:
        await self._print(f"{self.spec.arguments[0]}: {text}\n".encode(errors="surrogateescape"), to_stderr=True)

    async def echo(self) -> None:
        words = list(self.spec.arguments[1:])
        ending = "\n"
        if words and words[0] == "-n":
            del words[0]
            ending = ""
        await self._print((" ".join(words) + ending).encode(errors="surrogateescape"))

    async def cat(self) -> None:
        status = 0
        for name in self.spec.arguments[1:] or ("-",):
            if name == "-":
                while piece := await self._read():
                    await self._print(piece)
                continue
            path = self._files.resolve(name.encode(errors="surrogateescape"), self.spec.user)
            try:
                content = self._files.read(path)
            except AtelierError as error:
                await self.say(error.message)
                status = 1
            else:
                await self._print(content)
        raise _Exit(status)

    async def sleep(self) -> None:
        try:
            seconds = sum(float(word) for word in self.spec.arguments[1:])
        except ValueError:
            await self.say("seconds are wanted")
            raise _Exit(1) from None
        await asyncio.sleep(seconds)

    async def exit(self) -> None:
        words = self.spec.arguments[1:]
        raise _Exit(int(words[0]) & 0xFF if words and words[0].isdecimal() else 0)


async def _true(process: FakeProcess) -> None:
    del process


async def _false(process: FakeProcess) -> None:
    del process
    raise _Exit(1)


async def _unknown(process: FakeProcess) -> None:
    await process.say(f"not found; a fake guest knows {', '.join(sorted(_PROGRAMS))} only")
    raise _Exit(127)


_PROGRAMS: dict[str, Callable[[FakeProcess], Awaitable[None]]] = {
    "true": _true,
    "false": _false,
    "echo": FakeProcess.echo,
    "cat": FakeProcess.cat,
    "sleep": FakeProcess.sleep,
    "exit": FakeProcess.exit,
}
