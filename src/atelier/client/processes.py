"""Programs in a sandbox, as the SDK shows them: streamed executions and what can be done to running processes.

Made by ``sandbox.py``. Events are the values of ``model.guest``: ProcessStarted, ProcessOutput, ProcessEnded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType

from atelier.client import calls
from atelier.client.call import LineStream
from atelier.client.connection import AsyncConnectionLease, ConnectionLease
from atelier.model.errors import TransientError
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessStarted
from atelier.schemas.processes import Process


def _broke_off(pid: int) -> TransientError:
    return TransientError(
        f"the stream of process {pid} broke off before it ended",
        code="connection_lost",
        hint="the process may still run: sandbox.processes.attach(pid) shows its output again",
    )


class Execution:
    """One program that was started (or attached to). Iterate it for its events; as a context manager it detaches at
    the end, which does not end the program. ``pid`` is the process's id in the sandbox."""

    def __init__(self, lease: ConnectionLease, sandbox: str, stream: LineStream[ProcessEvent], pid: int = 0) -> None:
        self._lease = lease
        self._sandbox = sandbox
        self._lines = lease.connection.lines(stream)
        self._first: ProcessEvent | None = None
        self._ended: ProcessEnded | None = None
        self.pid = pid
        try:
            self._first = next(self._lines, None)
        except BaseException:
            self._lines.close()
            raise
        if isinstance(self._first, ProcessStarted):
            self.pid = self._first.pid

    def __iter__(self) -> Iterator[ProcessEvent]:
        if self._first is not None:
            first, self._first = self._first, None
            self._note(first)
            yield first
        for event in self._lines:
            self._note(event)
            yield event
        if self._ended is None:
            raise _broke_off(self.pid)

    def _note(self, event: ProcessEvent) -> None:
        if isinstance(event, ProcessEnded):
            self._ended = event

    def wait(self) -> ProcessEnded:
        """Read (and drop) the rest of the output; return how the program ended."""
        if self._ended is None:
            for _ in self:
                pass
        if self._ended is None:
            raise _broke_off(self.pid)
        return self._ended

    def write_stdin(self, data: bytes) -> None:
        """Needs ``stdin=True`` at the start. Returns when the program's pipe has taken all of it."""
        self._lease.connection.send(calls.send_input(self._sandbox, self.pid, data))

    def close_stdin(self) -> None:
        self._lease.connection.send(calls.close_input(self._sandbox, self.pid))

    def send_signal(self, signal: str | int = "SIGTERM") -> None:
        """To the program and its process group."""
        self._lease.connection.send(calls.send_signal(self._sandbox, self.pid, signal))

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Execution:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncExecution:
    """The same on asyncio; made by ``AsyncSandbox.exec``, which awaits the start."""

    def __init__(
        self, lease: AsyncConnectionLease, sandbox: str, stream: LineStream[ProcessEvent], pid: int = 0
    ) -> None:
        self._lease = lease
        self._sandbox = sandbox
        self._lines = lease.connection.lines(stream)
        self._first: ProcessEvent | None = None
        self._ended: ProcessEnded | None = None
        self.pid = pid

    async def begin(self) -> AsyncExecution:
        """Wait until the program has been started. Called once, by whoever made this object."""
        try:
            self._first = await anext(self._lines, None)
        except BaseException:
            await self._lines.aclose()
            raise
        if isinstance(self._first, ProcessStarted):
            self.pid = self._first.pid
        return self

    async def __aiter__(self) -> AsyncIterator[ProcessEvent]:
        if self._first is not None:
            first, self._first = self._first, None
            self._note(first)
            yield first
        async for event in self._lines:
            self._note(event)
            yield event
        if self._ended is None:
            raise _broke_off(self.pid)

    def _note(self, event: ProcessEvent) -> None:
        if isinstance(event, ProcessEnded):
            self._ended = event

    async def wait(self) -> ProcessEnded:
        """Read (and drop) the rest of the output; return how the program ended."""
        if self._ended is None:
            async for _ in self:
                pass
        if self._ended is None:
            raise _broke_off(self.pid)
        return self._ended

    async def write_stdin(self, data: bytes) -> None:
        """Needs ``stdin=True`` at the start. Returns when the program's pipe has taken all of it."""
        await self._lease.connection.send(calls.send_input(self._sandbox, self.pid, data))

    async def close_stdin(self) -> None:
        await self._lease.connection.send(calls.close_input(self._sandbox, self.pid))

    async def send_signal(self, signal: str | int = "SIGTERM") -> None:
        """To the program and its process group."""
        await self._lease.connection.send(calls.send_signal(self._sandbox, self.pid, signal))

    async def close(self) -> None:
        await self._lines.aclose()

    async def __aenter__(self) -> AsyncExecution:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Processes:
    """``sandbox.processes``: what was started through the API and still runs."""

    def __init__(self, lease: ConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    def list(self) -> list[Process]:
        return self._lease.connection.send(calls.list_processes(self._sandbox)).items

    def attach(self, pid: int) -> Execution:
        """The newest kept output of a running process, then what follows."""
        return Execution(self._lease, self._sandbox, calls.attach_process(self._sandbox, pid), pid)

    def send_signal(self, pid: int, signal: str | int = "SIGTERM") -> None:
        self._lease.connection.send(calls.send_signal(self._sandbox, pid, signal))


class AsyncProcesses:
    """The same on asyncio."""

    def __init__(self, lease: AsyncConnectionLease, sandbox: str) -> None:
        self._lease = lease
        self._sandbox = sandbox

    async def list(self) -> list[Process]:
        return (await self._lease.connection.send(calls.list_processes(self._sandbox))).items

    async def attach(self, pid: int) -> AsyncExecution:
        """The newest kept output of a running process, then what follows."""
        return await AsyncExecution(self._lease, self._sandbox, calls.attach_process(self._sandbox, pid), pid).begin()

    async def send_signal(self, pid: int, signal: str | int = "SIGTERM") -> None:
        await self._lease.connection.send(calls.send_signal(self._sandbox, pid, signal))
