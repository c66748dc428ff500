"""Work inside a running sandbox: who may enter, and what takes more than one call to the guest.

Called by the routes for processes and files. Holds no state: terminals and processes live in the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from atelier.drivers.guest.interface import GuestDriver
from atelier.lifecycle.activity import Activity
from atelier.model.errors import AtelierError, InvalidRequestError, NotFoundError, PreconditionError
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, ProcessSpec, ProcessStarted, TerminalSize
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState
from atelier.model.terminal import TerminalEvent, TerminalSession

_INPUT_PIECE_BYTES = 64 * 1024
_HINTS = {
    SandboxState.CREATING: "wait until it is running",
    SandboxState.STARTING: "wait until it is running",
    SandboxState.STOPPING: "wait until it is stopped, then start it",
    SandboxState.PAUSING: "wait until it is paused; what is asked of it then wakes it",
    SandboxState.PAUSED: "resume it: atelier resume",
    SandboxState.RESUMING: "wait until it is running",
    SandboxState.DESTROYING: "it is being removed; create another one",
}
LOGIN_SHELL = ("/bin/bash", "-l")
MAX_PATH_BYTES = 4096
"""PATH_MAX of the guest's kernel. Source: linux/limits.h."""


@dataclass(frozen=True, slots=True)
class CollectedRun:
    """All that a program wrote, up to the limit of each stream."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    error: str


@dataclass(slots=True)
class _Collector:
    limit_bytes: int
    data: bytearray = field(default_factory=bytearray)
    truncated: bool = False

    def add(self, piece: bytes) -> None:
        room = self.limit_bytes - len(self.data)
        self.truncated = self.truncated or len(piece) > room
        self.data += piece[:room]


class GuestSession:
    """One running sandbox, entered. ``driver`` methods take ``sandbox_id`` first."""

    def __init__(self, sandbox_id: str, driver: GuestDriver, activity: Activity) -> None:
        self.sandbox_id = sandbox_id
        self.driver = driver
        self._activity = activity

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """The sandbox counts as used for as long as the block runs."""
        return self._activity.in_use(self.sandbox_id)

    async def stream(self, spec: ProcessSpec) -> AsyncGenerator[ProcessEvent]:
        """Start a process and yield its events; closing the iterator detaches and leaves the process alone."""
        async with self.driver.start_process(self.sandbox_id, spec) as events:
            # In a terminal it is what is typed that counts.
            with contextlib.nullcontext() if spec.terminal is not None else self.in_use():
                async for event in events:
                    yield event

    async def attach(self, pid: int, *, terminal: bool = False) -> AsyncGenerator[ProcessEvent]:
        """The newest kept output of a process that runs, then what follows."""
        async with self.driver.connect_process(self.sandbox_id, pid) as events:
            with contextlib.nullcontext() if terminal else self.in_use():
                async for event in events:
                    yield event

    async def type_into(self, pid: int, data: bytes) -> None:
        """Input into a terminal."""
        self._activity.touch(self.sandbox_id)
        await self.driver.send_input(self.sandbox_id, pid, data, terminal=True)

    # Terminals that live on. Only what is typed counts as use: a forgotten window keeps no sandbox awake.

    async def view(self, terminal: str, size: TerminalSize) -> AsyncGenerator[TerminalEvent]:
        """What is shown in a window of ``size``, until the program ends."""
        async with self.driver.terminals.attach(self.sandbox_id, terminal, size) as events:
            async for event in events:
                yield event

    async def type_into_terminal(self, terminal: str, data: bytes) -> None:
        self._activity.touch(self.sandbox_id)
        await self.driver.terminals.write(self.sandbox_id, terminal, data)

    async def find_terminal(self, terminal: str) -> TerminalSession:
        """Raises NotFoundError."""
        for found in await self.driver.terminals.list(self.sandbox_id):
            if found.id == terminal:
                return found
        raise NotFoundError(f"there is no terminal {terminal!r}", code="terminal_not_found")

    async def run(self, spec: ProcessSpec, input_bytes: bytes | None, output_limit_bytes: int) -> CollectedRun:
        """Run a program to its end and collect what it writes.

        If the caller goes away (cancellation), the program is killed: nobody would ever read its result.
        """
        with self.in_use():
            return await self._run(spec, input_bytes, output_limit_bytes)

    async def _run(self, spec: ProcessSpec, input_bytes: bytes | None, output_limit_bytes: int) -> CollectedRun:
        stdout, stderr = _Collector(output_limit_bytes), _Collector(output_limit_bytes)
        pid = 0
        feeding: asyncio.Task[None] | None = None
        try:
            async with self.driver.start_process(self.sandbox_id, spec) as events:
                async for event in events:
                    match event:
                        case ProcessStarted():
                            pid = event.pid
                            if input_bytes is not None:
                                feeding = asyncio.create_task(self._feed(pid, input_bytes))
                        case ProcessOutput():
                            (stderr if event.stream == "stderr" else stdout).add(event.data)
                        case ProcessEnded():
                            return CollectedRun(
                                event.exit_code,
                                bytes(stdout.data),
                                bytes(stderr.data),
                                stdout.truncated,
                                stderr.truncated,
                                event.error,
                            )
            raise PreconditionError(
                f"the stream of process {pid} in sandbox {self.sandbox_id} ended before the process",
                code="stream_broken",
                hint="the sandbox may have stopped; look at its state and console",
            )
        except asyncio.CancelledError:
            if pid:
                with contextlib.suppress(AtelierError):
                    await self.driver.send_signal(self.sandbox_id, pid, signal.SIGKILL)
            raise
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, pid: int, data: bytes) -> None:
        # A program may end without reading all of its input: that is its own affair, as in a shell's pipe.
        with contextlib.suppress(AtelierError):
            for start in range(0, len(data), _INPUT_PIECE_BYTES):
                await self.driver.send_input(self.sandbox_id, pid, data[start : start + _INPUT_PIECE_BYTES])
            await self.driver.close_input(self.sandbox_id, pid)


class GuestSessions:
    """Opens sessions. ``get_sandbox`` finds a sandbox by id or name, or raises NotFoundError; ``wake`` resumes a paused
    one and returns its row when that has ended."""

    def __init__(
        self,
        get_sandbox: Callable[[str], Sandbox],
        wake: Callable[[Sandbox], Awaitable[Sandbox]],
        driver: GuestDriver,
        activity: Activity,
    ) -> None:
        self._get_sandbox = get_sandbox
        self._wake = wake
        self._driver = driver
        self._activity = activity

    async def enter(self, sandbox: str, *, is_use: bool = True) -> GuestSession:
        """``is_use``: it counts as use of the sandbox, and wakes a paused one.

        Raises NotFoundError, CapacityError, or PreconditionError when the sandbox does not run.
        """
        row = self._get_sandbox(sandbox)
        if is_use and row.state in (SandboxState.PAUSED, SandboxState.RESUMING):
            row = await self._wake(row)
        if row.state is not SandboxState.RUNNING:
            raise PreconditionError(
                f"sandbox {row.name} is {row.state}" + (f": {row.failure_message}" if row.failure_message else ""),
                hint=_HINTS.get(row.state, f"start it: atelier start {row.name}"),
            )
        if is_use:
            self._activity.touch(row.id)
        return GuestSession(row.id, self._driver, self._activity)


def check_path(path: bytes) -> bytes:
    """Return a path that a guest may be asked for, or raise InvalidRequestError."""
    if not path or len(path) > MAX_PATH_BYTES or b"\0" in path:
        raise InvalidRequestError(
            "the path is empty, has a NUL byte or is longer than 4096 bytes",
            code="invalid_path",
            hint="give a path like /home/user/file, or one relative to the user's home folder",
        )
    return path
