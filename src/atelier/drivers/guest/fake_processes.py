"""The processes of a fake guest: a fixed few programs as coroutines; no process of the host is ever started.

Used by ``fake`` only. ``true``, ``false``, ``echo``, ``cat``, ``sleep``, ``exit``, ``python3 -m http.server PORT``, which serves
nobody, and a shell (``sh``, ``bash``) that knows ``echo`` and ``exit`` are known, by bare name or by path; anything else writes
that it was not found to stderr and ends with 127. Signals, time limits, stdin and the echo of a
terminal behave as in a real guest. While the guest stands still no program takes a step, and its state can be dumped and
begun again from there, in another fake guest.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

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


class FakeMovement:
    """Whether a fake guest moves or stands still, and for how long it has moved. Made inside a running loop."""

    def __init__(self, *, is_still: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._moving = asyncio.Event()
        self._moved_seconds = 0.0
        self._since = self._loop.time()
        if not is_still:
            self._moving.set()

    @property
    def is_still(self) -> bool:
        return not self._moving.is_set()

    @property
    def moved_seconds(self) -> float:
        return self._moved_seconds + (0.0 if self.is_still else self._loop.time() - self._since)

    def stop(self) -> None:
        self._moved_seconds = self.moved_seconds
        self._moving.clear()

    def go_on(self) -> None:
        if self.is_still:
            self._since = self._loop.time()
            self._moving.set()

    async def wait(self) -> None:
        """Return once it moves."""
        while self.is_still:
            await self._moving.wait()


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


class FakeWatcher(Protocol):
    """Who sees all that a process writes, and its end, and never holds it up."""

    def written(self, data: bytes) -> None: ...

    def ended(self) -> None: ...


class FakeProcess:
    """One process. Made inside a running loop; its program begins at once."""

    def __init__(
        self,
        pid: int,
        spec: ProcessSpec,
        files: FakeFiles,
        movement: FakeMovement,
        on_end: Callable[[FakeProcess], None],
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """``memory``: what ``dump`` gave; the program goes on from there."""
        self.pid = pid
        self.spec = spec
        self.terminal_size = spec.terminal
        self.ended: ProcessEnded | None = None
        self.watcher: FakeWatcher | None = None
        self._files = files
        self._movement = movement
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
        self._arguments_done = 0
        self._status = 0
        self._lived_before_seconds = 0.0
        self._moved_at_begin = movement.moved_seconds
        if memory is not None:
            self._remember(memory)
        limit = spec.timeout_seconds
        self._timer: asyncio.TimerHandle | None = None
        if limit:
            left = limit - self._lived_before_seconds
            self._timer = asyncio.get_running_loop().call_later(left, self._time_is_over)
        self._task = asyncio.create_task(self._run(), name=f"fake-process-{pid}")
        # Not within the task: one that is cancelled before its first step runs none of its lines.
        self._task.add_done_callback(self._ended)

    def dump(self) -> dict[str, Any]:
        """The state between two steps of its program, in JSON's kinds of values."""
        size = self.terminal_size
        return {
            "pid": self.pid,
            "spec": asdict(self.spec),
            "terminal_size": None if size is None else asdict(size),
            "ring": [[output.stream, output.data.hex()] for output in self._ring],
            "input": [piece.hex() for piece in self._input],
            "line": self._line.hex(),
            "input_ended": self._input_ended,
            "signal": self._signal,
            "arguments_done": self._arguments_done,
            "status": self._status,
            "lived_seconds": self._lived_seconds,
        }

    def _remember(self, memory: Mapping[str, Any]) -> None:
        if memory["terminal_size"] is not None:
            self.terminal_size = TerminalSize(**memory["terminal_size"])
        self._ring.extend(ProcessOutput(stream, bytes.fromhex(data)) for stream, data in memory["ring"])
        self._ring_bytes = sum(len(output.data) for output in self._ring)
        self._input.extend(bytes.fromhex(piece) for piece in memory["input"])
        self._line = bytes.fromhex(memory["line"])
        self._input_ended = memory["input_ended"]
        self._signal = memory["signal"]
        self._arguments_done = memory["arguments_done"]
        self._status = memory["status"]
        self._lived_before_seconds = memory["lived_seconds"]

    @property
    def _lived_seconds(self) -> float:
        """How long it has run, while its guest moved."""
        return self._lived_before_seconds + self._movement.moved_seconds - self._moved_at_begin

    @property
    def summary(self) -> ProcessSummary:
        spec = self.spec
        return ProcessSummary(
            self.pid, spec.tag, spec.arguments, spec.working_directory, self.terminal_size is not None
        )

    @property
    def kept_output(self) -> bytes:
        """The newest that it has written."""
        return b"".join(output.data for output in self._ring)

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
            # What stands still sees its signals when it goes on, but for the one that nobody sees.
            if not self._movement.is_still or number == signal.SIGKILL:
                self._task.cancel()

    def go_on(self) -> None:
        """The guest moves again."""
        if self.ended is None and self._signal:
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
        if self.watcher is not None:
            self.watcher.written(data)
        for reader in self._readers:
            reader.push(output)
        for reader in list(self._readers):
            await reader.room.wait()

    async def _print(self, data: bytes, *, to_stderr: bool = False) -> None:
        await self._movement.wait()
        if self.spec.terminal is not None:
            await self._write("pty", data.replace(b"\n", b"\r\n"))
        else:
            await self._write("stderr" if to_stderr else "stdout", data)

    async def _read(self) -> bytes:
        """The next piece of input, empty at its end."""
        await self._movement.wait()
        while not self._input:
            if self._input_ended:
                return b""
            self._input_arrived.clear()
            await self._input_arrived.wait()
            await self._movement.wait()
        return self._input.popleft()

    # The program.

    async def _run(self) -> None:
        name = self.spec.arguments[0].rpartition("/")[2]
        await self._movement.wait()
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
        if self.watcher is not None:
            self.watcher.ended()
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
        if await self._next_argument(0):
            await self._print((" ".join(words) + ending).encode(errors="surrogateescape"))

    async def cat(self) -> None:
        for index, name in enumerate(self.spec.arguments[1:] or ("-",)):
            if name == "-":
                while index >= self._arguments_done and (piece := await self._read()):
                    await self._print(piece)
                await self._next_argument(index)
            elif await self._next_argument(index):
                path = self._files.resolve(name.encode(errors="surrogateescape"), self.spec.user)
                try:
                    content = self._files.read(path)
                except AtelierError as error:
                    self._status = 1
                    await self.say(error.message)
                else:
                    await self._print(content)
        raise _Exit(self._status)

    async def _next_argument(self, index: int) -> bool:
        """Whether the argument at ``index`` is still to be dealt with, which it counts as from now on. Until the
        program waits again it takes this step and no other, so that a dump never falls in between."""
        await self._movement.wait()
        is_next = index == self._arguments_done
        self._arguments_done = max(self._arguments_done, index + 1)
        return is_next

    async def sleep(self) -> None:
        try:
            seconds = sum(float(word) for word in self.spec.arguments[1:])
        except ValueError:
            await self.say("seconds are wanted")
            raise _Exit(1) from None
        while (left := seconds - self._lived_seconds) > 0:
            await asyncio.sleep(left)
            await self._movement.wait()

    async def exit(self) -> None:
        words = self.spec.arguments[1:]
        raise _Exit(int(words[0]) & 0xFF if words and words[0].isdecimal() else 0)

    async def shell(self) -> None:
        """Words apart by spaces, no quotes; ``-c`` is passed over, as all other arguments are."""
        while True:
            if await self._next_argument(0):
                await self._print(b"$ ")
            piece = await self._read()
            self._arguments_done = 0
            if not piece:
                raise _Exit(self._status)
            for line in piece.splitlines():
                await self._obey(line.split())

    async def _obey(self, words: list[bytes]) -> None:
        self._status = 0
        match words:
            case [b"echo", *rest]:
                await self._print(b" ".join(rest) + b"\n")
            case [b"exit", *rest]:
                raise _Exit(int(rest[0]) & 0xFF if rest and rest[0].isdigit() else 0)
            case [name, *_]:
                self._status = 127
                await self._print(b"%b: not found; the shell of a fake guest knows echo and exit\n" % name)
            case _:
                pass


async def _true(process: FakeProcess) -> None:
    del process


async def _false(process: FakeProcess) -> None:
    del process
    raise _Exit(1)


async def _serve(process: FakeProcess) -> None:
    if listening_port(process.spec.arguments) is None:
        await _unknown(process)
    await asyncio.Event().wait()


def listening_port(arguments: tuple[str, ...]) -> int | None:
    """The port on which a program would listen."""
    match arguments:
        case (_, "-m", "http.server", port, *_) if port.isdecimal():
            return int(port)
        case _:
            return None


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
    "python3": _serve,
    "sh": FakeProcess.shell,
    "bash": FakeProcess.shell,
}
