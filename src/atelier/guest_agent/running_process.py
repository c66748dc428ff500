"""A program that was started: reads its output, feeds its readers and the ring, writes its input, sees its end.

Made by ``process``. While readers are attached, the slowest one's pace holds the program back; without any, the ring
keeps the newest output. The end is told only after all that the program itself had written before. What it leaves
behind in the background may go on writing: that is read and thrown away, so that it is not ended by SIGPIPE.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from atelier.guest_agent.event_stream import HIGH_BYTES, EventStream, data_envelope
from atelier.guest_agent.output_ring import OutputRing
from atelier.guest_agent.spawn import Spawned, set_terminal_size
from atelier.guest_protocol.connect import ConnectError, encode_envelope, encode_json

_READ_BYTES: Final = 64 * 1024
_SETTLE_SECONDS: Final = 0.25
"""How long after its exit a program's output may stay open for the children that it left before the end is told."""


class _OutputPipe:
    """One of stdout, stderr, pty: the agent's end."""

    __slots__ = ("_descriptor", "_is_reading", "_loop", "_process", "name", "unread_bytes")

    def __init__(self, process: RunningProcess, name: str, descriptor: int) -> None:
        self._process = process
        self._loop = process.loop
        self._descriptor = descriptor
        self._is_reading = False
        self.name = name
        self.unread_bytes = 0
        """What the program had written before its exit and has not been read since."""
        self.resume()

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._descriptor)

    def resume(self) -> None:
        if not self._is_reading and self._descriptor >= 0:
            self._is_reading = True
            self._loop.add_reader(self._descriptor, self.read)

    def read(self) -> bool:
        """Read once; False when there is nothing more now."""
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # EIO: a terminal whose other side has been closed by all
            data = b""
        if not data:
            self.close()
            self._process.output_closed()
            return False
        self.unread_bytes = max(0, self.unread_bytes - len(data))
        self._process.output_read(self.name, data)
        return True

    def count_unread(self) -> None:
        if self._descriptor >= 0:
            import fcntl
            import termios

            self.unread_bytes = int.from_bytes(fcntl.ioctl(self._descriptor, termios.FIONREAD, bytes(4)), "little")

    def close(self) -> None:
        if self._descriptor >= 0:
            self.pause()
            os.close(self._descriptor)
            self._descriptor = -1


class RunningProcess:
    """``config`` is the ProcessConfig as it was asked for. ``on_end`` is called once, when the end has been told to the
    readers; ``on_read`` whenever one has taken all, the end included; ``on_output`` with each piece that the ring has
    just taken."""

    def __init__(
        self,
        spawned: Spawned,
        config: dict[str, Any],
        tag: str | None,
        on_end: Callable[[RunningProcess], None],
        on_read: Callable[[RunningProcess], None],
        on_output: Callable[[bytes], None] | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = spawned.pid
        self.config = config
        self.tag = tag
        self.is_terminal = spawned.terminal >= 0
        self._on_end = on_end
        self._on_read = on_read
        self._on_output = on_output
        self.ring = OutputRing()
        self._readers: list[EventStream] = []
        self._input = spawned.terminal if self.is_terminal else spawned.stdin
        self._input_lock: asyncio.Lock | None = None
        self._kill_timer: asyncio.TimerHandle | None = None
        self._settle_timer: asyncio.TimerHandle | None = None
        self._time_limit_seconds = 0.0
        self._ran_out_of_time = False
        self._exit_status: int | None = None
        self._end_event: bytes | None = None
        self.end: dict[str, Any] | None = None
        """The EndEvent, once it has ended and all that it wrote was passed on."""
        self._is_paused = False
        self._pidfd = os.pidfd_open(self.pid)
        self.loop.add_reader(self._pidfd, self._exited)
        if self.is_terminal:
            # Input and output get a descriptor each: either may be closed, or waited for, without the other.
            self._outputs = [_OutputPipe(self, "pty", os.dup(spawned.terminal))]
        else:
            self._outputs = [
                _OutputPipe(self, "stdout", spawned.stdout),
                _OutputPipe(self, "stderr", spawned.stderr),
            ]

    # Readers.

    def attach(self, keepalive_seconds: float, *, replay: bool) -> EventStream:
        """A new reader: the start event, with ``replay`` the ring's output, then what follows until the end."""
        stream = EventStream(keepalive_seconds, self._look_at_readers, self._detach, self._taken)
        start: dict[str, object] = {"pid": self.pid}
        if replay and self.ring.lost_bytes:
            start["lostBytes"] = str(self.ring.lost_bytes)
        stream.push(encode_envelope(encode_json({"event": {"start": start}})))
        if replay:
            for name, data in self.ring:
                stream.push(data_envelope(name, data))
        if self._end_event is not None:
            self._tell_end(stream)
            return stream
        self._readers.append(stream)
        self._look_at_readers()
        return stream

    def _detach(self, stream: EventStream) -> None:
        if stream in self._readers:
            self._readers.remove(stream)
            self._look_at_readers()

    def _taken(self) -> None:
        if self._end_event is not None:
            self._on_read(self)

    @property
    def kept_bytes(self) -> int:
        """How much output the ring holds."""
        return len(self.ring)

    def _look_at_readers(self) -> None:
        """Hold the program back while one of its readers is too far behind."""
        is_behind = any(reader.pending_bytes >= HIGH_BYTES for reader in self._readers)
        if is_behind == self._is_paused:
            return
        self._is_paused = is_behind
        for output in self._outputs:
            if is_behind:
                output.pause()
            else:
                output.resume()
        if not is_behind and self._exit_status is not None:
            self._finish_when_complete()

    def output_read(self, name: str, data: bytes) -> None:
        """Called by an output that has read ``data``."""
        if self._end_event is not None:
            return
        self.ring.append(name, data)
        if self._on_output is not None:
            self._on_output(data)
        if self._readers:
            envelope = data_envelope(name, data)
            for reader in self._readers:
                reader.push(envelope)
            self._look_at_readers()
        if self._exit_status is not None:
            self._finish_when_complete()

    def output_closed(self) -> None:
        """Called by an output that has come to its end."""
        if self._exit_status is not None:
            self._finish_when_complete()

    # The end.

    def set_time_limit(self, seconds: float) -> None:
        """Kill the whole process group after ``seconds``."""
        self._time_limit_seconds = seconds
        self._kill_timer = self.loop.call_later(seconds, self._run_out_of_time)

    def _run_out_of_time(self) -> None:
        self._ran_out_of_time = True
        self.send_signal(signal.SIGKILL)

    def _exited(self) -> None:
        self.loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        try:
            self._exit_status = os.waitpid(self.pid, os.WNOHANG)[1]
        except ChildProcessError:
            self._exit_status = 0  # somebody else has reaped it: the status is lost
        for output in self._outputs:
            output.count_unread()
            if not self._is_paused and output.is_open and output.read() and output.is_open:
                output.read()  # most often the end, seen without another turn of the loop
        self._close_input()
        self._finish_when_complete()

    def _finish_when_complete(self) -> None:
        """Tell the end once all that the program wrote has been passed on, and its children had time to finish."""
        if self._end_event is not None:
            return
        if any(output.is_open for output in self._outputs):
            if self._settle_timer is None:
                self._settle_timer = self.loop.call_later(_SETTLE_SECONDS, self._settled)
            return
        self._finish()

    def _settled(self) -> None:
        if self._end_event is not None:
            return
        if any(output.is_open and output.unread_bytes for output in self._outputs):
            # A slow reader has not taken it all yet.
            self._settle_timer = self.loop.call_later(_SETTLE_SECONDS, self._settled)
            return
        self._finish()

    def _finish(self) -> None:
        if self._settle_timer is not None:
            self._settle_timer.cancel()
        assert self._exit_status is not None
        end = end_event(self._exit_status)
        if self._ran_out_of_time:
            end["error"] = "timeout"
        self.end = end
        self._end_event = encode_envelope(encode_json({"event": {"end": end}}))
        readers, self._readers = self._readers, []
        for reader in readers:
            self._tell_end(reader)
        for output in self._outputs:
            output.resume()  # what comes now is thrown away
        self._on_end(self)

    def _tell_end(self, reader: EventStream) -> None:
        assert self._end_event is not None
        reader.push(self._end_event)
        if self._ran_out_of_time:
            reader.end(
                ConnectError("deadline_exceeded", f"the process's limit of {self._time_limit_seconds:g} s is over")
            )
        else:
            reader.end()

    # What is asked of it.

    def send_signal(self, number: int) -> None:
        """To the whole process group. Raises ConnectError ``not_found`` when it has ended already."""
        if self._exit_status is not None:
            raise ConnectError("not_found", f"process {self.pid} has ended")
        groups = {self.pid}
        if self.is_terminal and number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP) and self._input >= 0:
            # An interactive shell gives each job a group of its own; the one in the foreground must go too.
            with suppress(OSError):
                groups.add(os.tcgetpgrp(self._input))
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number)

    def resize(self, columns: int, rows: int) -> None:
        if not self.is_terminal:
            raise ConnectError("failed_precondition", f"process {self.pid} has no terminal")
        if self._input >= 0:
            set_terminal_size(self._input, columns, rows)

    async def write_input(self, data: bytes, *, to_terminal: bool) -> None:
        """Write all of ``data``; waits while the program does not read. Raises ConnectError."""
        if to_terminal != self.is_terminal:
            kind = "a terminal: send pty input" if self.is_terminal else "no terminal: send stdin input"
            raise ConnectError("failed_precondition", f"process {self.pid} has {kind}")
        if self._input_lock is None:
            self._input_lock = asyncio.Lock()
        async with self._input_lock:
            rest = memoryview(data)
            while rest:
                if self._input < 0:
                    raise ConnectError("failed_precondition", f"the input of process {self.pid} is not open")
                try:
                    rest = rest[os.write(self._input, rest) :]
                except (BlockingIOError, InterruptedError):
                    await self._input_has_room()
                except OSError as error:
                    raise ConnectError(
                        "failed_precondition", f"process {self.pid} takes no more input: {error.strerror}"
                    ) from None

    async def _input_has_room(self) -> None:
        room: asyncio.Future[None] = self.loop.create_future()
        descriptor = self._input
        self._input_room = room

        def has_room() -> None:
            if not room.done():
                room.set_result(None)

        self.loop.add_writer(descriptor, has_room)
        try:
            await room
        finally:
            self._input_room = None
            if self._input == descriptor:
                self.loop.remove_writer(descriptor)

    _input_room: asyncio.Future[None] | None = None

    async def close_stdin(self) -> None:
        """End-of-file for the program, after what is being written. Raises ConnectError for a terminal."""
        if self.is_terminal:
            raise ConnectError("failed_precondition", "a terminal's input is closed by sending Ctrl+D (0x04)")
        if self._input_lock is None:
            self._input_lock = asyncio.Lock()
        async with self._input_lock:
            self._close_input()

    def _close_input(self) -> None:
        if self._input < 0:
            return
        room = self._input_room
        if room is not None:
            self.loop.remove_writer(self._input)
            if not room.done():
                room.set_result(None)
        os.close(self._input)
        self._input = -1


def end_event(status: int) -> dict[str, Any]:
    """The EndEvent of a wait status, worded as E2B's (Go's) is: exit code -1 after a signal, whose number is ours."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        words = f"signal: {_signal_words(number)}{' (core dumped)' if os.WCOREDUMP(status) else ''}"
        return {"exitCode": -1, "exited": False, "status": words, "error": words, "signal": number}
    code = os.waitstatus_to_exitcode(status)
    words = f"exit status {code}"
    event: dict[str, Any] = {"exitCode": code, "exited": True, "status": words}
    if code:
        event["error"] = words
    return event


def _signal_words(number: int) -> str:
    return (signal.strsignal(number) or f"signal {number}").lower()
