"""Guests that are not there: files in memory and a fixed few programs. For mock mode and tests; cheap by the thousand.

Made by ``manager.wiring`` in mock mode. Passes the same contract suite as the real driver. Faults come from ``faults``;
``boot_delay_seconds`` is how long a guest takes from ``ensure_channel`` until it answers, ``never_ready`` makes it
never do so. It starts no process and touches no file of the host. ``dump`` and ``load`` are for the fake VMM, which
writes a machine's memory into its files and restores it from there.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from atelier.drivers.faults import Faults
from atelier.drivers.guest.fake_files import FakeFiles
from atelier.drivers.guest.fake_processes import FakeMovement, FakeProcess, listening_port
from atelier.drivers.guest.fake_terminals import FakeTerminal, FakeTerminals
from atelier.model.errors import GuestUnreachableError, InvalidRequestError, NotFoundError, TimeoutExceededError
from atelier.model.guest import (
    FileEntry,
    GuestIdentity,
    GuestMetrics,
    ProcessEvent,
    ProcessSpec,
    ProcessSummary,
    TerminalSize,
)
from atelier.model.machine import GuestEndpoint

_PIECE_BYTES = 256 * 1024
_FIRST_PID = 100
_ENDED_KEPT = 16
_MIB = 1024 * 1024
_SERVED_WHILE_STILL = frozenset({"initialize", "metrics", "quiesce", "shut_down", "synchronize_clock", "thaw"})


@dataclass(slots=True)
class _Guest:
    """One fake guest. ``files`` is made when first needed."""

    answers_at: float
    token: str
    identity: GuestIdentity | None = None
    clock_offset_seconds: float = 0.0
    own_files: FakeFiles | None = None
    next_pid: int = _FIRST_PID
    running: dict[int, FakeProcess] = field(default_factory=dict[int, FakeProcess])
    ended: dict[int, FakeProcess] = field(default_factory=dict[int, FakeProcess])
    movement: FakeMovement = field(default_factory=FakeMovement)
    next_terminal: int = 0
    terminals: dict[str, FakeTerminal] = field(default_factory=dict[str, FakeTerminal])

    @property
    def files(self) -> FakeFiles:
        if self.own_files is None:
            self.own_files = FakeFiles()
        return self.own_files

    def start(self, spec: ProcessSpec) -> FakeProcess:
        process = FakeProcess(self.next_pid, spec, self.files, self.movement, self._note_end)
        self.running[process.pid] = process
        self.next_pid += 1
        return process

    def thaw(self) -> None:
        self.movement.go_on()
        for process in list(self.running.values()):
            process.go_on()

    def dump(self) -> bytes:
        """What a machine's memory and disk hold. Who the guest is goes along; a restored guest is told anew."""
        identity = self.identity
        content = {
            "hostname": identity.hostname if identity else "",
            "machine_id": identity.machine_id if identity else "",
            "environment": identity.environment if identity else {},
            "files": self.files.dump(),
            "next_pid": self.next_pid,
            "running": [process.dump() for process in self.running.values()],
            "is_still": self.movement.is_still,
            "next_terminal": self.next_terminal,
            "terminals": [each.dump() for each in self.terminals.values() if each.process.ended is None],
        }
        return json.dumps(content).encode()

    def load(self, memory: bytes) -> None:
        """Become what ``memory`` says; the token stays the new host's."""
        content = json.loads(memory)
        before, self.running, self.ended = self.running, {}, {}
        for process in before.values():
            process.send_signal(signal.SIGKILL)
        self.identity = GuestIdentity(
            content["hostname"], content["machine_id"], self.token, b"", 0, content["environment"]
        )
        self.own_files = FakeFiles.load(content["files"])
        self.next_pid = content["next_pid"]
        self.movement = FakeMovement(is_still=content["is_still"])
        for item in content["running"]:
            process = FakeProcess(
                item["pid"], _spec(item["spec"]), self.files, self.movement, self._note_end, memory=item
            )
            self.running[process.pid] = process
        self.next_terminal = content["next_terminal"]
        self.terminals = {
            item["id"]: FakeTerminal(item["id"], self.running[item["pid"]], item) for item in content["terminals"]
        }

    def _note_end(self, process: FakeProcess) -> None:
        if self.running.get(process.pid) is not process:
            return  # of the memory before this one
        del self.running[process.pid]
        self.ended[process.pid] = process
        if len(self.ended) > _ENDED_KEPT:
            del self.ended[next(iter(self.ended))]

    def process(self, pid: int, *, with_ended: bool = False) -> FakeProcess:
        process = self.running.get(pid) or (self.ended.get(pid) if with_ended else None)
        if process is None:
            raise NotFoundError(f"no process with the pid {pid} runs", code="process_not_found")
        return process


def _spec(dumped: dict[str, Any]) -> ProcessSpec:
    fields = dict(dumped)
    fields["arguments"] = tuple(dumped["arguments"])
    if dumped["terminal"] is not None:
        fields["terminal"] = TerminalSize(**dumped["terminal"])
    return ProcessSpec(**fields)


class FakeGuests:
    """GuestDriver without guests. A sandbox has one from ``ensure_channel`` to ``ensure_channel_absent``; what it
    holds is kept when its channel is offered again. Operations in ``faults`` bear the names of the methods.

    ``on_shut_down`` is called with the id of each sandbox whose guest has agreed to stop: there its machine can end.
    With ``ignores_shut_down`` guests agree and go on, as one that hangs on its way down."""

    def __init__(
        self, faults: Faults | None = None, *, boot_delay_seconds: float = 0.0, never_ready: bool = False
    ) -> None:
        self.faults = faults or Faults()
        self.boot_delay_seconds = boot_delay_seconds
        self.never_ready = never_ready
        self.on_shut_down: Callable[[str], None] | None = None
        self.ignores_shut_down = False
        self._guests: dict[str, _Guest] = {}
        self._restored: dict[str, bytes] = {}
        self.terminals = FakeTerminals(self._guest)

    @property
    def sandbox_ids(self) -> list[str]:
        """Whose channels are offered."""
        return list(self._guests)

    def identity(self, sandbox_id: str) -> GuestIdentity | None:
        """What ``initialize`` and ``rename`` have told it, for tests."""
        return self._guests[sandbox_id].identity

    def set_clock_offset(self, sandbox_id: str, seconds: float) -> None:
        """How far the guest's clock is ahead of the host's."""
        self._guests[sandbox_id].clock_offset_seconds = seconds

    async def close(self) -> None:
        """All guests end."""
        for sandbox_id in list(self._guests):
            await self._end(sandbox_id)

    def dump(self, sandbox_id: str) -> bytes:
        """What the guest's machine holds in its memory and on its disk. Raises GuestUnreachableError for one that does
        not exist."""
        guest = self._guests.get(sandbox_id)
        if guest is None:
            raise GuestUnreachableError(f"sandbox {sandbox_id} has no fake guest")
        return guest.dump()

    def load(self, sandbox_id: str, data: bytes) -> None:
        """The sandbox's machine was restored with this in it: its guest answers at once, and stands still if it did.
        Before ``ensure_channel`` it waits for that. ``data`` is what ``dump`` gave."""
        guest = self._guests.get(sandbox_id)
        if guest is None:
            self._restored[sandbox_id] = data
            return
        guest.load(data)
        guest.answers_at = asyncio.get_running_loop().time()

    async def _guest(self, sandbox_id: str, operation: str) -> _Guest:
        await self.faults.before(operation)
        guest = self._guests.get(sandbox_id)
        if guest is None or self.never_ready or asyncio.get_running_loop().time() < guest.answers_at:
            raise GuestUnreachableError(f"the fake guest of sandbox {sandbox_id} does not answer")
        if operation not in _SERVED_WHILE_STILL:
            await guest.movement.wait()
        return guest

    async def _end(self, sandbox_id: str) -> None:
        self._restored.pop(sandbox_id, None)
        guest = self._guests.pop(sandbox_id, None)
        if guest is not None:
            for terminal in guest.terminals.values():
                terminal.cut_off()
            for process in list(guest.running.values()):
                await process.close()

    # The channel.

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        await self.faults.before("ensure_channel")
        guest = self._guests.get(sandbox_id)
        if guest is None:
            answers_at = asyncio.get_running_loop().time() + self.boot_delay_seconds
            guest = self._guests[sandbox_id] = _Guest(answers_at, token)
        guest.token = token
        if (memory := self._restored.pop(sandbox_id, None)) is not None:
            self.load(sandbox_id, memory)

    async def ensure_channel_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_channel_absent")
        await self._end(sandbox_id)

    async def list_channels(self) -> list[str]:
        await self.faults.before("list_channels")
        return sorted(self._guests)

    async def wait_ready(self, sandbox_id: str, timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.faults.before("wait_ready")
                guest = self._guests.get(sandbox_id)
                if guest is None or self.never_ready:
                    await asyncio.Event().wait()
                else:
                    await asyncio.sleep(guest.answers_at - asyncio.get_running_loop().time())
        except TimeoutError as error:
            raise TimeoutExceededError(
                f"the guest agent of sandbox {sandbox_id} did not answer within {timeout_seconds:g} s",
                code="guest_not_ready",
            ) from error

    async def initialize(self, sandbox_id: str, identity: GuestIdentity) -> None:
        (await self._guest(sandbox_id, "initialize")).identity = identity

    async def rename(self, sandbox_id: str, hostname: str, environment: dict[str, str]) -> None:
        guest = await self._guest(sandbox_id, "rename")
        if guest.identity is not None:
            guest.identity = replace(guest.identity, hostname=hostname, environment=environment)

    async def quiesce(self, sandbox_id: str) -> None:
        (await self._guest(sandbox_id, "quiesce")).movement.stop()

    async def thaw(self, sandbox_id: str) -> None:
        (await self._guest(sandbox_id, "thaw")).thaw()

    async def synchronize_clock(self, sandbox_id: str) -> float:
        guest = await self._guest(sandbox_id, "synchronize_clock")
        offset_seconds, guest.clock_offset_seconds = guest.clock_offset_seconds, 0.0
        return offset_seconds

    async def shut_down(self, sandbox_id: str) -> None:
        guest = await self._guest(sandbox_id, "shut_down")
        if self.ignores_shut_down:
            return
        guest.thaw()
        for process in list(guest.running.values()):
            await process.close()
        if self.on_shut_down is not None:
            # The guest has agreed before its machine ends.
            asyncio.get_running_loop().call_soon(self.on_shut_down, sandbox_id)

    async def list_ports(self, sandbox_id: str) -> list[int]:
        guest = await self._guest(sandbox_id, "list_ports")
        ports = (listening_port(process.spec.arguments) for process in guest.running.values())
        return sorted({port for port in ports if port is not None})

    async def metrics(self, sandbox_id: str) -> GuestMetrics:
        guest = await self._guest(sandbox_id, "metrics")
        uptime = asyncio.get_running_loop().time() - guest.answers_at
        return GuestMetrics(1, 1.0, 512 * _MIB, 64 * _MIB, 4096 * _MIB, guest.files.used_bytes, uptime)

    # Processes.

    @asynccontextmanager
    async def _follow(self, process: FakeProcess, *, replay: bool) -> AsyncGenerator[AsyncIterator[ProcessEvent]]:
        reader = process.attach(replay=replay)
        try:
            yield reader.follow()
        finally:
            process.detach(reader)

    def start_process(
        self, sandbox_id: str, spec: ProcessSpec
    ) -> AbstractAsyncContextManager[AsyncIterator[ProcessEvent]]:
        if not spec.arguments:
            raise InvalidRequestError("a process needs a program to run")
        return self._start_process(sandbox_id, spec)

    @asynccontextmanager
    async def _start_process(self, sandbox_id: str, spec: ProcessSpec) -> AsyncGenerator[AsyncIterator[ProcessEvent]]:
        guest = await self._guest(sandbox_id, "start_process")
        async with self._follow(guest.start(spec), replay=False) as events:
            yield events

    @asynccontextmanager
    async def connect_process(self, sandbox_id: str, pid: int) -> AsyncGenerator[AsyncIterator[ProcessEvent]]:
        process = (await self._guest(sandbox_id, "connect_process")).process(pid, with_ended=True)
        async with self._follow(process, replay=True) as events:
            yield events

    async def list_processes(self, sandbox_id: str) -> list[ProcessSummary]:
        guest = await self._guest(sandbox_id, "list_processes")
        in_terminals = {terminal.process.pid for terminal in guest.terminals.values()}
        return [process.summary for pid, process in guest.running.items() if pid not in in_terminals]

    async def send_input(self, sandbox_id: str, pid: int, data: bytes, *, terminal: bool = False) -> None:
        await (await self._guest(sandbox_id, "send_input")).process(pid).send_input(data, terminal=terminal)

    async def close_input(self, sandbox_id: str, pid: int) -> None:
        (await self._guest(sandbox_id, "close_input")).process(pid).close_input()

    async def send_signal(self, sandbox_id: str, pid: int, signal_number: int) -> None:
        (await self._guest(sandbox_id, "send_signal")).process(pid).send_signal(signal_number)

    async def resize_terminal(self, sandbox_id: str, pid: int, size: TerminalSize) -> None:
        (await self._guest(sandbox_id, "resize_terminal")).process(pid).resize(size)

    # Files.

    async def _files(self, sandbox_id: str, operation: str) -> FakeFiles:
        return (await self._guest(sandbox_id, operation)).files

    async def stat(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry:
        files = await self._files(sandbox_id, "stat")
        return files.stat(files.resolve(path, user))

    async def list_directory(self, sandbox_id: str, path: bytes, user: str = "", depth: int = 1) -> list[FileEntry]:
        files = await self._files(sandbox_id, "list_directory")
        return files.list(files.resolve(path, user), depth)

    async def make_directory(self, sandbox_id: str, path: bytes, user: str = "") -> FileEntry:
        files = await self._files(sandbox_id, "make_directory")
        return files.make_directory(files.resolve(path, user))

    async def move(self, sandbox_id: str, source: bytes, destination: bytes, user: str = "") -> FileEntry:
        files = await self._files(sandbox_id, "move")
        return files.move(files.resolve(source, user), files.resolve(destination, user))

    async def remove(self, sandbox_id: str, path: bytes, user: str = "") -> None:
        files = await self._files(sandbox_id, "remove")
        files.remove(files.resolve(path, user))

    @asynccontextmanager
    async def read_file(
        self, sandbox_id: str, path: bytes, user: str = "", *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[tuple[int, AsyncIterator[bytes]]]:
        files = await self._files(sandbox_id, "read_file")
        content = files.read(files.resolve(path, user))
        end = len(content) if length is None else min(offset + length, len(content))
        yield len(content), _pieces(content, offset, end)

    async def write_file(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> FileEntry:
        guest = await self._guest(sandbox_id, "write_file")
        content = b"".join([chunk async for chunk in chunks])
        await guest.movement.wait()
        files = guest.files
        return files.write(files.resolve(path, user), content)

    @asynccontextmanager
    async def read_archive(self, sandbox_id: str, path: bytes, user: str = "") -> AsyncGenerator[AsyncIterator[bytes]]:
        files = await self._files(sandbox_id, "read_archive")
        content = files.pack(files.resolve(path, user))
        yield _pieces(content, 0, len(content))

    async def write_archive(self, sandbox_id: str, path: bytes, chunks: AsyncIterator[bytes], user: str = "") -> None:
        guest = await self._guest(sandbox_id, "write_archive")
        content = b"".join([chunk async for chunk in chunks])
        await guest.movement.wait()
        files = guest.files
        files.unpack(files.resolve(path, user), content)


async def _pieces(content: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    for position in range(start, end, _PIECE_BYTES):
        yield content[position : min(position + _PIECE_BYTES, end)]
