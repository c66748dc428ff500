"""The SDK's front door: ``Sandbox`` (blocking) and ``AsyncSandbox`` (asyncio), handles on one sandbox each.

::

    from atelier import Sandbox

    with Sandbox.create() as sandbox:                      # destroyed at the end of the block
        sandbox.files.write("hello.py", "print('hello')")
        print(sandbox.run(["python3", "hello.py"]).stdout)

The manager is found through ATELIER_API_URL and ATELIER_API_KEY, else the local token file. All errors are those of
``atelier.model.errors``, with ``code``, ``message`` and ``hint``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

from atelier.client import calls, snapshot_calls, terminal_calls
from atelier.client.calls import Command
from atelier.client.connection import AsyncConnection, AsyncConnectionLease, Connection, ConnectionLease
from atelier.client.environment import endpoint_of
from atelier.client.files import AsyncFiles, Files
from atelier.client.lifecycle_calls import moment_of_expiry
from atelier.client.network_calls import PolicyWish
from atelier.client.processes import AsyncExecution, AsyncProcesses, Execution, Processes
from atelier.client.sandbox_failures import program_failed
from atelier.client.sandbox_life import (
    DEFAULT_WAIT_SECONDS,
    AsyncSandboxLife,
    SandboxLife,
    settle,
    until_settled,
)
from atelier.client.snapshots import AsyncSnapshot, Snapshot
from atelier.client.steps import carry_out, carry_out_async
from atelier.client.terminals import AsyncTerminals, Terminals
from atelier.model.errors import AtelierError
from atelier.model.guest import ProcessEvent, TerminalSize
from atelier.model.ids import new_sandbox_name
from atelier.model.states import SandboxState
from atelier.schemas.processes import RunResult
from atelier.schemas.sandboxes import Sandbox as SandboxDetails
from atelier.schemas.sandboxes import SandboxMetrics

if TYPE_CHECKING:
    # Loaded on first use: most programs open no terminal, and WebSockets take their time to import.
    from atelier.client.terminal import AsyncTerminal, Terminal

T = TypeVar("T")
_PAGE = 500


class Sandbox(SandboxLife):
    """A handle on one sandbox. As a context manager it destroys the sandbox at the end if this handle created it
    (``destroy_on_exit``), else it only closes the connection."""

    def __init__(self, details: SandboxDetails, lease: ConnectionLease, *, destroy_on_exit: bool = False) -> None:
        self.details = details
        self.destroy_on_exit = destroy_on_exit
        self._lease = lease
        self.files = Files(lease, details.id)
        self.processes = Processes(lease, details.id)
        self.terminals = Terminals(lease, details.id)

    @classmethod
    def create(
        cls,
        *,
        name: str | None = None,
        image: str | None = None,
        vcpu_count: int | None = None,
        memory_mib: int | None = None,
        disk_mib: int | None = None,
        environment: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        expires_at: datetime | None = None,
        expires_in_seconds: float | None = None,
        auto_stop_after_idle_seconds: int | None = None,
        network: PolicyWish | None = None,
        snapshot: str | Snapshot | None = None,
        disk_only: bool = False,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
        api_url: str = "",
        api_key: str = "",
        connection: Connection | None = None,
    ) -> Sandbox:
        """Create a sandbox and, unless ``wait`` is false, return when it runs. What is left out, the manager chooses.
        It is destroyed at ``expires_at``, or after ``expires_in_seconds`` from now by this machine's clock, and stopped
        when nobody has used it for ``auto_stop_after_idle_seconds``; None: never. ``network``: what it may reach, as
        ``{"egress": {"mode": "list", "domains": ["github.com"]}}``; None: the internet, and nothing else.
        ``snapshot``: one to go on from, which then gives image, vCPUs and memory; ``disk_only``: boot from its disk.

        Raises SandboxFailedError when it failed (its row stays until it is destroyed), TimeoutExceededError after
        ``timeout_seconds`` (the creation goes on), ConflictError when the name is taken.
        """
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        # Named here, so that an interrupted request can be undone although its answer was never seen.
        asked_name = name or new_sandbox_name()
        call = calls.create_sandbox(
            name=asked_name, image=image, vcpu_count=vcpu_count, memory_mib=memory_mib, disk_mib=disk_mib,
            environment=environment, labels=labels, auto_stop_after_idle_seconds=auto_stop_after_idle_seconds,
            expires_at=moment_of_expiry(expires_at, expires_in_seconds), network=network,
            snapshot=snapshot if snapshot is None or isinstance(snapshot, str) else snapshot.id, disk_only=disk_only,
            wait_seconds=timeout_seconds if wait else 0,
        )  # fmt: skip
        try:
            try:
                steps = until_settled(call, SandboxState.RUNNING, timeout_seconds, wait=wait)
                details = carry_out(lease.connection, steps)
            except KeyboardInterrupt:
                if name is None:
                    with contextlib.suppress(AtelierError):
                        lease.connection.send(calls.delete_sandbox(asked_name, wait=False))
                raise
        except BaseException:
            lease.close()
            raise
        return cls(details, lease, destroy_on_exit=True)

    @classmethod
    def connect(
        cls, sandbox: str, *, api_url: str = "", api_key: str = "", connection: Connection | None = None
    ) -> Sandbox:
        """A handle on an existing sandbox, by id or name. Raises NotFoundError."""
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return cls(lease.connection.send(calls.get_sandbox(sandbox)), lease)
        except BaseException:
            lease.close()
            raise

    @classmethod
    def list(
        cls,
        *,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: Connection | None = None,
    ) -> list[Sandbox]:
        """Handles on all sandboxes (of a state, with labels), newest first. Each opens a connection when it is used."""
        endpoint = endpoint_of(connection, api_url, api_key)
        lease = ConnectionLease(endpoint, connection)
        found: list[Sandbox] = []
        cursor: str | None = None
        try:
            while True:
                call = calls.list_sandboxes(limit=_PAGE, cursor=cursor, state=state, labels=labels)
                page = lease.connection.send(call)
                found.extend(cls(each, ConnectionLease(endpoint, connection)) for each in page.items)
                cursor = page.next_cursor
                if not cursor:
                    return found
        finally:
            lease.close()

    def run(
        self,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        working_directory: str = "",
        user: str = "",
        timeout_seconds: float | None = None,
        input: str | bytes | None = None,
        encoding: Literal["utf-8", "base64"] = "utf-8",
        output_limit_bytes: int | None = None,
        check: bool = False,
    ) -> RunResult:
        """Run a program to its end and return what it wrote. A list is started as it is; a text goes to ``sh -c``.

        ``timeout_seconds`` ends the whole process group (``result.error`` is then ``timeout``). With ``check`` an exit
        code but 0 raises GuestError (``program_failed``).
        """
        call = calls.run_process(
            self.id, command, environment=environment, working_directory=working_directory, user=user,
            timeout_seconds=timeout_seconds, input=input, encoding=encoding, output_limit_bytes=output_limit_bytes,
        )  # fmt: skip
        result = self._lease.connection.send(call)
        if check and result.exit_code != 0:
            raise program_failed(command, result)
        return result

    def exec(
        self,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        working_directory: str = "",
        user: str = "",
        timeout_seconds: float | None = None,
        stdin: bool = False,
    ) -> Execution:
        """Start a program; iterate the result for its output as it comes (see ``Execution``)."""
        stream = calls.exec_process(
            self.id, command, environment=environment, working_directory=working_directory, user=user,
            timeout_seconds=timeout_seconds, stdin=stdin,
        )  # fmt: skip
        return Execution(self._lease, self.id, stream)

    def open_terminal(
        self,
        command: Command = (),
        *,
        size: TerminalSize = TerminalSize(80, 24),  # noqa: B008  frozen
        user: str = "",
        working_directory: str = "",
        pid: int | None = None,
    ) -> Terminal[ProcessEvent]:
        """A terminal with ``command`` (none: a login shell), or, with ``pid``, an open one again."""
        from atelier.client.terminal import Terminal

        socket = terminal_calls.one_shot_terminal(
            self.id, command, size=size, user=user, working_directory=working_directory, pid=pid
        )
        return Terminal(self._lease.endpoint, socket)

    def fork(
        self,
        count: int = 1,
        *,
        name_prefix: str | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> list[Sandbox]:
        """Make ``count`` sandboxes that go on from where this one is now, which goes on itself, and return handles when
        they run, or without ``wait`` when they are begun. They are named ``<name_prefix>-<n>``, after this one if it is
        left out, and have its sizes, network policy, time limits and labels, beside ``labels``. They share what is in
        its memory at this moment, secrets too.

        Raises CapacityError where not all fit (it says how many would; nothing is done), ConflictError when it does not
        run, SandboxFailedError when one of them failed (the others stay), TimeoutExceededError.
        """
        deadline = time.monotonic() + timeout_seconds
        call = snapshot_calls.fork_sandbox(
            self.id, count=count, name_prefix=name_prefix, labels=labels, wait=wait, timeout_seconds=timeout_seconds
        )
        connection = self._lease.connection
        forks = connection.send(call).items
        if wait:
            forks = [
                carry_out(connection, settle(each, SandboxState.RUNNING, deadline, timeout_seconds)) for each in forks
            ]
        return [Sandbox(each, self._lease.another(), destroy_on_exit=True) for each in forks]

    def read_console(self, *, limit_bytes: int | None = None) -> bytes:
        """The newest bytes of the serial console, as the guest wrote them, terminal escapes included."""
        return self._lease.connection.send(calls.read_console(self.id, limit_bytes=limit_bytes))

    def metrics(self) -> SandboxMetrics:
        return self._lease.connection.send(calls.get_metrics(self.id))

    def close(self) -> None:
        """Close the connection; the sandbox lives on."""
        self._lease.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.destroy_on_exit:
                self.destroy()
        finally:
            self.close()


class AsyncSandbox(AsyncSandboxLife):
    """The same on asyncio. A handle belongs to the event loop in which it was made."""

    def __init__(self, details: SandboxDetails, lease: AsyncConnectionLease, *, destroy_on_exit: bool = False) -> None:
        self.details = details
        self.destroy_on_exit = destroy_on_exit
        self._lease = lease
        self.files = AsyncFiles(lease, details.id)
        self.processes = AsyncProcesses(lease, details.id)
        self.terminals = AsyncTerminals(lease, details.id)

    @classmethod
    async def create(
        cls,
        *,
        name: str | None = None,
        image: str | None = None,
        vcpu_count: int | None = None,
        memory_mib: int | None = None,
        disk_mib: int | None = None,
        environment: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        expires_at: datetime | None = None,
        expires_in_seconds: float | None = None,
        auto_stop_after_idle_seconds: int | None = None,
        network: PolicyWish | None = None,
        snapshot: str | AsyncSnapshot | None = None,
        disk_only: bool = False,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
        api_url: str = "",
        api_key: str = "",
        connection: AsyncConnection | None = None,
    ) -> AsyncSandbox:
        """See ``Sandbox.create``. A cancelled creation of a sandbox without a given name is taken back."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        asked_name = name or new_sandbox_name()
        call = calls.create_sandbox(
            name=asked_name, image=image, vcpu_count=vcpu_count, memory_mib=memory_mib, disk_mib=disk_mib,
            environment=environment, labels=labels, auto_stop_after_idle_seconds=auto_stop_after_idle_seconds,
            expires_at=moment_of_expiry(expires_at, expires_in_seconds), network=network,
            snapshot=snapshot if snapshot is None or isinstance(snapshot, str) else snapshot.id, disk_only=disk_only,
            wait_seconds=timeout_seconds if wait else 0,
        )  # fmt: skip
        try:
            try:
                steps = until_settled(call, SandboxState.RUNNING, timeout_seconds, wait=wait)
                details = await carry_out_async(lease.connection, steps)
            except asyncio.CancelledError:
                if name is None:
                    with contextlib.suppress(AtelierError):
                        await _to_the_end(lease.connection.send(calls.delete_sandbox(asked_name, wait=False)))
                raise
        except BaseException:
            await lease.close()
            raise
        return cls(details, lease, destroy_on_exit=True)

    @classmethod
    async def connect(
        cls, sandbox: str, *, api_url: str = "", api_key: str = "", connection: AsyncConnection | None = None
    ) -> AsyncSandbox:
        """A handle on an existing sandbox, by id or name. Raises NotFoundError."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return cls(await lease.connection.send(calls.get_sandbox(sandbox)), lease)
        except BaseException:
            await lease.close()
            raise

    @classmethod
    async def list(
        cls,
        *,
        state: str | None = None,
        labels: Mapping[str, str] | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: AsyncConnection | None = None,
    ) -> list[AsyncSandbox]:
        """Handles on all sandboxes (of a state, with labels), newest first. Each opens a connection when it is used."""
        endpoint = endpoint_of(connection, api_url, api_key)
        lease = AsyncConnectionLease(endpoint, connection)
        found: list[AsyncSandbox] = []
        cursor: str | None = None
        try:
            while True:
                call = calls.list_sandboxes(limit=_PAGE, cursor=cursor, state=state, labels=labels)
                page = await lease.connection.send(call)
                found.extend(cls(each, AsyncConnectionLease(endpoint, connection)) for each in page.items)
                cursor = page.next_cursor
                if not cursor:
                    return found
        finally:
            await lease.close()

    async def run(
        self,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        working_directory: str = "",
        user: str = "",
        timeout_seconds: float | None = None,
        input: str | bytes | None = None,
        encoding: Literal["utf-8", "base64"] = "utf-8",
        output_limit_bytes: int | None = None,
        check: bool = False,
    ) -> RunResult:
        """See ``Sandbox.run``."""
        call = calls.run_process(
            self.id, command, environment=environment, working_directory=working_directory, user=user,
            timeout_seconds=timeout_seconds, input=input, encoding=encoding, output_limit_bytes=output_limit_bytes,
        )  # fmt: skip
        result = await self._lease.connection.send(call)
        if check and result.exit_code != 0:
            raise program_failed(command, result)
        return result

    async def exec(
        self,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        working_directory: str = "",
        user: str = "",
        timeout_seconds: float | None = None,
        stdin: bool = False,
    ) -> AsyncExecution:
        """Start a program; iterate the result for its output as it comes (see ``Execution``)."""
        stream = calls.exec_process(
            self.id, command, environment=environment, working_directory=working_directory, user=user,
            timeout_seconds=timeout_seconds, stdin=stdin,
        )  # fmt: skip
        return await AsyncExecution(self._lease, self.id, stream).begin()

    async def open_terminal(
        self,
        command: Command = (),
        *,
        size: TerminalSize = TerminalSize(80, 24),  # noqa: B008  frozen
        user: str = "",
        working_directory: str = "",
        pid: int | None = None,
    ) -> AsyncTerminal[ProcessEvent]:
        """A terminal with ``command`` (none: a login shell), or, with ``pid``, an open one again."""
        from atelier.client.terminal import AsyncTerminal

        socket = terminal_calls.one_shot_terminal(
            self.id, command, size=size, user=user, working_directory=working_directory, pid=pid
        )
        return await AsyncTerminal.open(self._lease.endpoint, socket)

    async def fork(
        self,
        count: int = 1,
        *,
        name_prefix: str | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> list[AsyncSandbox]:
        """See ``Sandbox.fork``."""
        deadline = time.monotonic() + timeout_seconds
        call = snapshot_calls.fork_sandbox(
            self.id, count=count, name_prefix=name_prefix, labels=labels, wait=wait, timeout_seconds=timeout_seconds
        )
        connection = self._lease.connection
        forks = (await connection.send(call)).items
        if wait:
            forks = [
                await carry_out_async(connection, settle(each, SandboxState.RUNNING, deadline, timeout_seconds))
                for each in forks
            ]
        return [AsyncSandbox(each, self._lease.another(), destroy_on_exit=True) for each in forks]

    async def read_console(self, *, limit_bytes: int | None = None) -> bytes:
        """The newest bytes of the serial console, as the guest wrote them, terminal escapes included."""
        return await self._lease.connection.send(calls.read_console(self.id, limit_bytes=limit_bytes))

    async def metrics(self) -> SandboxMetrics:
        return await self._lease.connection.send(calls.get_metrics(self.id))

    async def close(self) -> None:
        """Close the connection; the sandbox lives on."""
        await self._lease.close()

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.destroy_on_exit:
                await _to_the_end(self.destroy())
        finally:
            await self.close()


async def _to_the_end(work: Coroutine[object, object, T]) -> T:
    """Await ``work`` even if this task is cancelled meanwhile: a sandbox must not outlive its block for that."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what is reported
        raise
