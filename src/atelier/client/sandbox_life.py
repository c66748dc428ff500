"""The part of ``Sandbox`` and ``AsyncSandbox`` that is about their lives: state, stop, start, resize, time limits, network,
end.

``Orders`` says once what is asked and how long it is waited for; the two classes below carry that out, blocking and on
asyncio. ``sandbox.py`` builds the public classes on them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

from atelier.client import calls, lifecycle_calls, network_calls, snapshot_calls
from atelier.client.call import KEEP, Call, Keep
from atelier.client.connection import AsyncConnectionLease, ConnectionLease
from atelier.client.network_calls import PolicyWish
from atelier.client.previews import AsyncSandboxPorts, SandboxPorts
from atelier.client.sandbox_failures import SandboxFailedError, is_stuck, not_gone_in_time, not_in_time
from atelier.client.snapshots import AsyncSnapshot, Snapshot, until_ready
from atelier.client.steps import POLL_SECONDS, Steps, carry_out, carry_out_async
from atelier.model.errors import NotFoundError
from atelier.model.network_policy import EgressMode
from atelier.model.states import UNDER_WAY, SandboxState, StopReason
from atelier.schemas.errors import ErrorBody
from atelier.schemas.networks import SandboxNetwork
from atelier.schemas.sandboxes import Sandbox as SandboxDetails
from atelier.schemas.snapshots import Snapshot as SnapshotDetails

DEFAULT_WAIT_SECONDS = 300.0
_Life: TypeAlias = Steps[SandboxDetails]


def until_settled(
    order: Call[SandboxDetails], target: SandboxState | None, timeout_seconds: float, *, wait: bool = True
) -> _Life:
    """Give the order and, unless ``wait`` is false, ``settle``."""
    deadline = time.monotonic() + timeout_seconds
    details = yield order
    assert details is not None
    return (yield from settle(details, target, deadline, timeout_seconds)) if wait else details


def settle(details: SandboxDetails, target: SandboxState | None, deadline: float, timeout_seconds: float) -> _Life:
    """Wait until nothing is under way, until ``deadline`` of the monotonic clock, which lay ``timeout_seconds`` ahead when
    the order was given. Raises SandboxFailedError when the sandbox is not in ``target`` then (None: any), or is stuck on
    its way; TimeoutExceededError."""
    while details.state in UNDER_WAY and not is_stuck(details):
        if time.monotonic() > deadline:
            raise not_in_time(details, timeout_seconds)
        yield POLL_SECONDS
        answer = yield calls.get_sandbox(details.id)
        assert answer is not None
        details = answer
    if is_stuck(details) or details.state is not (target or details.state):
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

    def _start(self, wait: bool, seconds: float) -> _Life:
        call = lifecycle_calls.start_sandbox(self.id, wait_seconds=seconds if wait else 0)
        return until_settled(call, SandboxState.RUNNING, seconds, wait=wait)

    def _stop(self, grace_seconds: float | None, wait: bool, seconds: float) -> _Life:
        waiting = seconds if wait else 0
        call = lifecycle_calls.stop_sandbox(self.id, grace_seconds=grace_seconds, wait_seconds=waiting)
        return until_settled(call, SandboxState.STOPPED, seconds, wait=wait)

    def _restart(self, grace_seconds: float | None, wait: bool, seconds: float) -> _Life:
        waiting = seconds if wait else 0
        call = lifecycle_calls.restart_sandbox(self.id, grace_seconds=grace_seconds, wait_seconds=waiting)
        return until_settled(call, SandboxState.RUNNING, seconds, wait=wait)

    def _pause(self, wait: bool, seconds: float) -> _Life:
        call = lifecycle_calls.pause_sandbox(self.id, wait_seconds=seconds if wait else 0)
        return until_settled(call, SandboxState.PAUSED, seconds, wait=wait)

    def _resume(self, from_disk: bool, wait: bool, seconds: float) -> _Life:
        waiting = seconds if wait else 0
        call = lifecycle_calls.resume_sandbox(self.id, from_disk=from_disk, wait_seconds=waiting)
        return until_settled(call, SandboxState.RUNNING, seconds, wait=wait)

    def _snapshot(
        self, name: str | None, labels: Mapping[str, str] | None, keep_last: int | None, wait: bool, seconds: float
    ) -> Steps[SnapshotDetails]:
        call = snapshot_calls.take_snapshot(
            self.id, name=name, labels=labels, keep_last=keep_last, wait_seconds=seconds if wait else 0
        )
        return until_ready(call, seconds, wait=wait)

    def _resize(self, disk_mib: int, wait: bool, seconds: float) -> _Life:
        call = lifecycle_calls.resize_sandbox(self.id, disk_mib, wait_seconds=seconds if wait else 0)
        return until_settled(call, None, seconds, wait=wait)

    def _retry(self, wait: bool, seconds: float) -> _Life:
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


class SandboxLife(Orders, SandboxPorts):
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

    def pause(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """Put the running sandbox on disk, its memory included: its processes stand still until ``resume`` and know
        nothing of it, and it takes no memory meanwhile. The next use of it resumes it by itself.

        Raises SandboxFailedError when it could not be paused and runs on, ConflictError when it does not run.
        """
        return self._carry_out(self._pause(wait, timeout_seconds))

    def resume(
        self, *, from_disk: bool = False, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS
    ) -> SandboxDetails:
        """Let the paused sandbox go on where it stood. ``from_disk``: boot it from its disk and give its memory up.

        Raises SandboxFailedError when it could not be resumed (it is paused still) or has failed, ConflictError when it
        is not paused, CapacityError.
        """
        return self._carry_out(self._resume(from_disk, wait, timeout_seconds))

    def snapshot(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        keep_last: int | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> Snapshot:
        """Save the running sandbox, memory and disk, under ``name`` (None: one is made), and return when sandboxes can
        begin from it; this one goes on. With ``keep_last`` older snapshots of it go, so that so many are left.

        Raises SnapshotFailedError, ConflictError when it does not run, TimeoutExceededError (it goes on).
        """
        steps = self._snapshot(name, labels, keep_last, wait, timeout_seconds)
        return Snapshot(carry_out(self._lease.connection, steps), self._lease.another())

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

    def network(self) -> SandboxNetwork:
        """What it may reach, its address, and what has passed."""
        return self._lease.connection.send(network_calls.get_network(self.id))

    def set_network(self, policy: PolicyWish) -> SandboxNetwork:
        """Replace its network policy as a whole: ``{"egress": {"mode": "none"}}``. Returns when it is in force, for open
        connections too.

        Raises TransientError (``network_policy_pending``) when it is stored and the network has not taken it yet: that
        is tried again until it has.
        """
        return self._lease.connection.send(network_calls.set_network(self.id, policy))

    def change_network(
        self,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        egress_mode: EgressMode | str | None = None,
        download_kbit_per_second: int | Keep | None = KEEP,
        upload_kbit_per_second: int | Keep | None = KEEP,
    ) -> SandboxNetwork:
        """Change the egress mode (``all``, ``list``, ``none``), then take entries from the list, then add some, and set
        rates, in one piece. What is left out stays; None lifts a rate.
        """
        call = network_calls.change_network(
            self.id, allow=allow, deny=deny, egress_mode=egress_mode,
            download_kbit_per_second=download_kbit_per_second, upload_kbit_per_second=upload_kbit_per_second,
        )  # fmt: skip
        return self._lease.connection.send(call)

    def allow(self, *entries: str) -> SandboxNetwork:
        """Let it reach networks (``10.1.0.0/16``) and domains (``github.com``, ``*.github.com``)."""
        return self.change_network(allow=entries)

    def deny(self, *entries: str) -> SandboxNetwork:
        """Take back what was allowed; open connections to it end. Raises NotFoundError for what is not listed."""
        return self.change_network(deny=entries)

    def destroy(self, *, wait: bool = True) -> None:
        """Destroy the sandbox, whatever its state; fine if it is gone already."""
        with contextlib.suppress(NotFoundError):
            gone = self._lease.connection.send(calls.delete_sandbox(self.id, wait=wait))
            if wait and not gone:
                raise not_gone_in_time(self.name)

    def _carry_out(self, steps: _Life) -> SandboxDetails:
        self.details = carry_out(self._lease.connection, steps)
        return self.details


class AsyncSandboxLife(Orders, AsyncSandboxPorts):
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

    async def pause(self, *, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS) -> SandboxDetails:
        """See ``Sandbox.pause``."""
        return await self._carry_out(self._pause(wait, timeout_seconds))

    async def resume(
        self, *, from_disk: bool = False, wait: bool = True, timeout_seconds: float = DEFAULT_WAIT_SECONDS
    ) -> SandboxDetails:
        """See ``Sandbox.resume``."""
        return await self._carry_out(self._resume(from_disk, wait, timeout_seconds))

    async def snapshot(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        keep_last: int | None = None,
        wait: bool = True,
        timeout_seconds: float = DEFAULT_WAIT_SECONDS,
    ) -> AsyncSnapshot:
        """See ``Sandbox.snapshot``."""
        steps = self._snapshot(name, labels, keep_last, wait, timeout_seconds)
        return AsyncSnapshot(await carry_out_async(self._lease.connection, steps), self._lease.another())

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

    async def network(self) -> SandboxNetwork:
        """See ``Sandbox.network``."""
        return await self._lease.connection.send(network_calls.get_network(self.id))

    async def set_network(self, policy: PolicyWish) -> SandboxNetwork:
        """See ``Sandbox.set_network``."""
        return await self._lease.connection.send(network_calls.set_network(self.id, policy))

    async def change_network(
        self,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        egress_mode: EgressMode | str | None = None,
        download_kbit_per_second: int | Keep | None = KEEP,
        upload_kbit_per_second: int | Keep | None = KEEP,
    ) -> SandboxNetwork:
        """See ``Sandbox.change_network``."""
        call = network_calls.change_network(
            self.id, allow=allow, deny=deny, egress_mode=egress_mode,
            download_kbit_per_second=download_kbit_per_second, upload_kbit_per_second=upload_kbit_per_second,
        )  # fmt: skip
        return await self._lease.connection.send(call)

    async def allow(self, *entries: str) -> SandboxNetwork:
        """See ``Sandbox.allow``."""
        return await self.change_network(allow=entries)

    async def deny(self, *entries: str) -> SandboxNetwork:
        """See ``Sandbox.deny``."""
        return await self.change_network(deny=entries)

    async def destroy(self, *, wait: bool = True) -> None:
        """Destroy the sandbox, whatever its state; fine if it is gone already."""
        with contextlib.suppress(NotFoundError):
            gone = await self._lease.connection.send(calls.delete_sandbox(self.id, wait=wait))
            if wait and not gone:
                raise not_gone_in_time(self.name)

    async def _carry_out(self, steps: _Life) -> SandboxDetails:
        self.details = await carry_out_async(self._lease.connection, steps)
        return self.details
