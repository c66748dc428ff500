"""The part of ``Sandbox`` and ``AsyncSandbox`` that is about their lives: state, stop, start, resize, time limits, end.

``Orders`` says once what is asked and how long it is waited for, as generators of calls and pauses; the two classes
below carry that out, blocking and on asyncio. ``sandbox.py`` builds the public classes on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Generator
from datetime import datetime

from atelier.client import calls, lifecycle_calls
from atelier.client.call import Call
from atelier.client.connection import AsyncConnection, AsyncConnectionLease, Connection, ConnectionLease
from atelier.client.lifecycle_calls import KEEP, Keep
from atelier.client.sandbox_failures import SandboxFailedError, is_stuck, not_gone_in_time, not_in_time
from atelier.model.errors import NotFoundError
from atelier.model.states import UNDER_WAY, SandboxState, StopReason
from atelier.schemas.errors import ErrorBody
from atelier.schemas.sandboxes import Sandbox as SandboxDetails

DEFAULT_WAIT_SECONDS = 300.0
_POLL_SECONDS = 0.5

Steps = Generator[Call[SandboxDetails] | float, SandboxDetails | None, SandboxDetails]
"""Calls to send, whose answers come back, and pauses in seconds. Ends with the sandbox as it is then."""


def until_settled(
    order: Call[SandboxDetails], target: SandboxState | None, timeout_seconds: float, *, wait: bool = True
) -> Steps:
    """Give the order and, unless ``wait`` is false, wait until nothing is under way. Raises SandboxFailedError when the
    sandbox is not in ``target`` then (None: any), or is stuck on its way; TimeoutExceededError."""
    deadline = time.monotonic() + timeout_seconds
    details = yield order
    assert details is not None
    while wait and details.state in UNDER_WAY and not is_stuck(details):
        if time.monotonic() > deadline:
            raise not_in_time(details, timeout_seconds)
        yield _POLL_SECONDS
        details = yield calls.get_sandbox(details.id)
        assert details is not None
    if wait and (is_stuck(details) or details.state is not (target or details.state)):
        raise SandboxFailedError(details)
    return details


class Orders:
    """What both kinds of handle share. ``details`` is the sandbox as last seen; ``refresh`` asks again."""

    details: SandboxDetails

    @property
    def id(self) -> str:
        return self.details.id

    @property
    def name(self) -> str:
        return self.details.name

    @property
    def state(self) -> SandboxState:
        """As last seen; ``refresh`` asks again."""
        return self.details.state

    @property
    def stop_reason(self) -> StopReason | None:
        """Why it is stopped; None in any other state."""
        return self.details.stop_reason

    @property
    def expires_at(self) -> datetime | None:
        """When it is destroyed; None: never."""
        return self.details.expires_at

    @property
    def auto_stop_after_idle_seconds(self) -> int | None:
        """It is stopped when nobody has used it for so long; None: never."""
        return self.details.auto_stop_after_idle_seconds

    @property
    def failure(self) -> ErrorBody | None:
        """Why it failed, or what is stuck with it."""
        return self.details.failure

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self.id}) {self.state}>"

    def _start(self, wait: bool, seconds: float) -> Steps:
        call = lifecycle_calls.start_sandbox(self.id, wait_seconds=seconds if wait else 0)
        return until_settled(call, SandboxState.RUNNING, seconds, wait=wait)

    def _stop(self, grace_seconds: float | None, wait: bool, seconds: float) -> Steps:
        waiting = seconds if wait else 0
        call = lifecycle_calls.stop_sandbox(self.id, grace_seconds=grace_seconds, wait_seconds=waiting)
        return until_settled(call, SandboxState.STOPPED, seconds, wait=wait)

    def _restart(self, grace_seconds: float | None, wait: bool, seconds: float) -> Steps:
        waiting = seconds if wait else 0
        call = lifecycle_calls.restart_sandbox(self.id, grace_seconds=grace_seconds, wait_seconds=waiting)
        return until_settled(call, SandboxState.RUNNING, seconds, wait=wait)

    def _resize(self, disk_mib: int, wait: bool, seconds: float) -> Steps:
        call = lifecycle_calls.resize_sandbox(self.id, disk_mib, wait_seconds=seconds if wait else 0)
        return until_settled(call, None, seconds, wait=wait)

    def _retry(self, wait: bool, seconds: float) -> Steps:
        call = lifecycle_calls.retry_sandbox(self.id, wait_seconds=seconds if wait else 0)
        return until_settled(call, None, seconds, wait=wait)

    def _set_time_limits(
        self,
        expires_at: datetime | Keep | None,
        expires_in_seconds: float | None,
        auto_stop_after_idle_seconds: int | Keep | None,
    ) -> Call[SandboxDetails]:
        if expires_in_seconds is not None:
            given = None if expires_at is KEEP else expires_at
            expires_at = lifecycle_calls.moment_of_expiry(given, expires_in_seconds)
        return lifecycle_calls.change_sandbox(
            self.id, expires_at=expires_at, auto_stop_after_idle_seconds=auto_stop_after_idle_seconds
        )


class SandboxLife(Orders):
    _lease: ConnectionLease

    def refresh(self) -> SandboxDetails:
        self.details = self._lease.connection.send(calls.get_sandbox(self.id))
        return self.details

    def start(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """Boot the stopped or failed sandbox from its disk and, unless ``wait`` is false, return when it runs.

        Raises SandboxFailedError when it failed again, ConflictError when it cannot be started now, CapacityError.
        """
        return self._carry_out(self._start(wait, timeout_seconds))

    def stop(
        self,
        *,
        grace_seconds: float | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> SandboxDetails:
        """Shut the running sandbox down; its disk, name and labels stay. A guest that has not ended after
        ``grace_seconds`` (None: half a minute) is cut off: ``stop_reason`` is then ``forced``.

        Raises ConflictError when it does not run.
        """
        return self._carry_out(self._stop(grace_seconds, wait, timeout_seconds))

    def restart(
        self,
        *,
        grace_seconds: float | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> SandboxDetails:
        """Stop the running sandbox and start it again. Raises what both of these raise."""
        return self._carry_out(self._restart(grace_seconds, wait, timeout_seconds))

    def resize(
        self, *, disk_mib: int, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS
    ) -> SandboxDetails:
        """Grow the disk, and the file system on it (of a stopped sandbox at its next start). It cannot shrink:
        InvalidRequestError (``disk_cannot_shrink``)."""
        return self._carry_out(self._resize(disk_mib, wait, timeout_seconds))

    def retry(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """Try again what is stuck (``failure`` says what), once what was in the way is mended."""
        return self._carry_out(self._retry(wait, timeout_seconds))

    def set_time_limits(
        self,
        *,
        expires_at: datetime | Keep | None = KEEP,
        expires_in_seconds: float | None = None,
        auto_stop_after_idle_seconds: int | Keep | None = KEEP,
    ) -> SandboxDetails:
        """Change when the sandbox is destroyed (a moment, or so long from now by this machine's clock), and after how
        long without use it is stopped. What is left out stays; None takes a limit away."""
        call = self._set_time_limits(expires_at, expires_in_seconds, auto_stop_after_idle_seconds)
        self.details = self._lease.connection.send(call)
        return self.details

    def destroy(self, *, wait: bool = True) -> None:
        """Destroy the sandbox, whatever its state; fine if it is gone already."""
        with contextlib.suppress(NotFoundError):
            gone = self._lease.connection.send(calls.delete_sandbox(self.id, wait=wait))
            if wait and not gone:
                raise not_gone_in_time(self.name)

    def _carry_out(self, steps: Steps) -> SandboxDetails:
        self.details = carry_out(self._lease.connection, steps)
        return self.details


class AsyncSandboxLife(Orders):
    """The same on asyncio."""

    _lease: AsyncConnectionLease

    async def refresh(self) -> SandboxDetails:
        self.details = await self._lease.connection.send(calls.get_sandbox(self.id))
        return self.details

    async def start(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """See ``Sandbox.start``."""
        return await self._carry_out(self._start(wait, timeout_seconds))

    async def stop(
        self,
        *,
        grace_seconds: float | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> SandboxDetails:
        """See ``Sandbox.stop``."""
        return await self._carry_out(self._stop(grace_seconds, wait, timeout_seconds))

    async def restart(
        self,
        *,
        grace_seconds: float | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> SandboxDetails:
        """See ``Sandbox.restart``."""
        return await self._carry_out(self._restart(grace_seconds, wait, timeout_seconds))

    async def resize(
        self, *, disk_mib: int, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS
    ) -> SandboxDetails:
        """See ``Sandbox.resize``."""
        return await self._carry_out(self._resize(disk_mib, wait, timeout_seconds))

    async def retry(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """See ``Sandbox.retry``."""
        return await self._carry_out(self._retry(wait, timeout_seconds))

    async def set_time_limits(
        self,
        *,
        expires_at: datetime | Keep | None = KEEP,
        expires_in_seconds: float | None = None,
        auto_stop_after_idle_seconds: int | Keep | None = KEEP,
    ) -> SandboxDetails:
        """See ``Sandbox.set_time_limits``."""
        call = self._set_time_limits(expires_at, expires_in_seconds, auto_stop_after_idle_seconds)
        self.details = await self._lease.connection.send(call)
        return self.details

    async def destroy(self, *, wait: bool = True) -> None:
        """Destroy the sandbox, whatever its state; fine if it is gone already."""
        with contextlib.suppress(NotFoundError):
            gone = await self._lease.connection.send(calls.delete_sandbox(self.id, wait=wait))
            if wait and not gone:
                raise not_gone_in_time(self.name)

    async def _carry_out(self, steps: Steps) -> SandboxDetails:
        self.details = await carry_out_async(self._lease.connection, steps)
        return self.details


def carry_out(connection: Connection, steps: Steps) -> SandboxDetails:
    answer: SandboxDetails | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        if isinstance(step, Call):
            answer = connection.send(step)
        else:
            time.sleep(step)


async def carry_out_async(connection: AsyncConnection, steps: Steps) -> SandboxDetails:
    answer: SandboxDetails | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = None
        if isinstance(step, Call):
            answer = await connection.send(step)
        else:
            await asyncio.sleep(step)
