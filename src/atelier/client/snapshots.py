"""``Snapshot`` (blocking) and ``AsyncSnapshot`` (asyncio): handles on one snapshot each.

::

    from atelier import Sandbox

    ready = box.snapshot(name="ready")                 # the sandbox goes on
    other = Sandbox.create(snapshot=ready)             # and another begins there
    for each in box.fork(20): ...                      # or many, from where it is now

``Sandbox.snapshot`` takes one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

from atelier.client import snapshot_calls
from atelier.client.call import Call
from atelier.client.connection import AsyncConnection, AsyncConnectionLease, Connection, ConnectionLease
from atelier.client.environment import endpoint_of
from atelier.client.steps import POLL_SECONDS, Steps, carry_out, carry_out_async
from atelier.model.errors import AtelierError, NotFoundError, TimeoutExceededError
from atelier.model.snapshot import SnapshotState
from atelier.schemas.snapshots import Snapshot as SnapshotDetails
from atelier.schemas.snapshots import SnapshotPage

_PAGE = 500
_UNDER_WAY = (SnapshotState.TAKING, SnapshotState.BAKING)


class SnapshotFailedError(AtelierError):
    """A snapshot ended as ``failed``; its sandbox goes on. ``code`` and ``hint`` are those of the reason that the manager
    recorded; ``details`` is its row."""

    default_code = "snapshot_failed"

    def __init__(self, details: SnapshotDetails) -> None:
        cause = details.failure
        super().__init__(
            f"the snapshot {details.name} of {details.sandbox_name} "
            + (f"failed: {cause.message}" if cause else f"is {details.state} by now"),
            hint=(cause.hint if cause else "") or "nothing of it is left, and its name is free: try again",
            code=cause.code if cause else "",
        )
        self.details = details


def until_ready(order: Call[SnapshotDetails], timeout_seconds: float, *, wait: bool) -> Steps[SnapshotDetails]:
    """Give the order and, unless ``wait`` is false, wait until sandboxes can begin from the snapshot. Raises
    SnapshotFailedError, TimeoutExceededError."""
    deadline = time.monotonic() + timeout_seconds
    details = yield order
    assert details is not None
    while wait and details.state in _UNDER_WAY:
        if time.monotonic() > deadline:
            raise TimeoutExceededError(
                f"the snapshot {details.name} was not ready within {timeout_seconds:g} s",
                hint=f"it goes on: `atelier snapshots get {details.name}` shows it",
            )
        yield POLL_SECONDS
        details = yield snapshot_calls.get_snapshot(details.id)
        assert details is not None
    if wait and details.state is not SnapshotState.READY:
        raise SnapshotFailedError(details)
    return details


def _all(sandbox: str | None, labels: Mapping[str, str] | None) -> Steps[SnapshotPage]:
    """All pages as one."""
    found = SnapshotPage(items=[])
    cursor: str | None = None
    while True:
        page = yield snapshot_calls.list_snapshots(limit=_PAGE, cursor=cursor, sandbox=sandbox, labels=labels)
        assert page is not None
        found.items.extend(page.items)
        cursor = page.next_cursor
        if not cursor:
            return found


class _Described:
    """What both kinds of handle share. ``details`` is the snapshot as last seen; ``refresh`` asks again."""

    details: SnapshotDetails

    @property
    def id(self) -> str:
        return self.details.id

    @property
    def name(self) -> str:
        return self.details.name

    @property
    def state(self) -> SnapshotState:
        return self.details.state

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self.id}) {self.state}>"


class Snapshot(_Described):
    def __init__(self, details: SnapshotDetails, lease: ConnectionLease) -> None:
        self.details = details
        self._lease = lease

    @classmethod
    def connect(
        cls, snapshot: str, *, api_url: str = "", api_key: str = "", connection: Connection | None = None
    ) -> Snapshot:
        """A handle on an existing snapshot, by id or name. Raises NotFoundError."""
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return cls(lease.connection.send(snapshot_calls.get_snapshot(snapshot)), lease)
        except BaseException:
            lease.close()
            raise

    @classmethod
    def list(
        cls,
        *,
        sandbox: str | None = None,
        labels: Mapping[str, str] | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: Connection | None = None,
    ) -> list[Snapshot]:
        """Handles on all snapshots that are ready or damaged (of a sandbox, with labels), oldest first."""
        endpoint = endpoint_of(connection, api_url, api_key)
        lease = ConnectionLease(endpoint, connection)
        try:
            found = carry_out(lease.connection, _all(sandbox, labels))
        finally:
            lease.close()
        return [cls(each, ConnectionLease(endpoint, connection)) for each in found.items]

    def refresh(self) -> SnapshotDetails:
        self.details = self._lease.connection.send(snapshot_calls.get_snapshot(self.id))
        return self.details

    def delete(self) -> None:
        """Returns when nothing of it is left; fine if it is gone already. Raises ConflictError (``snapshot_in_use``) while
        a sandbox or another snapshot needs it."""
        with contextlib.suppress(NotFoundError):
            self._lease.connection.send(snapshot_calls.delete_snapshot(self.id))

    def close(self) -> None:
        """Close the connection; the snapshot stays."""
        self._lease.close()


class AsyncSnapshot(_Described):
    """The same on asyncio. A handle belongs to the event loop in which it was made."""

    def __init__(self, details: SnapshotDetails, lease: AsyncConnectionLease) -> None:
        self.details = details
        self._lease = lease

    @classmethod
    async def connect(
        cls, snapshot: str, *, api_url: str = "", api_key: str = "", connection: AsyncConnection | None = None
    ) -> AsyncSnapshot:
        """A handle on an existing snapshot, by id or name. Raises NotFoundError."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return cls(await lease.connection.send(snapshot_calls.get_snapshot(snapshot)), lease)
        except BaseException:
            await lease.close()
            raise

    @classmethod
    async def list(
        cls,
        *,
        sandbox: str | None = None,
        labels: Mapping[str, str] | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: AsyncConnection | None = None,
    ) -> list[AsyncSnapshot]:
        """See ``Snapshot.list``."""
        endpoint = endpoint_of(connection, api_url, api_key)
        lease = AsyncConnectionLease(endpoint, connection)
        try:
            found = await carry_out_async(lease.connection, _all(sandbox, labels))
        finally:
            await lease.close()
        return [cls(each, AsyncConnectionLease(endpoint, connection)) for each in found.items]

    async def refresh(self) -> SnapshotDetails:
        self.details = await self._lease.connection.send(snapshot_calls.get_snapshot(self.id))
        return self.details

    async def delete(self) -> None:
        """See ``Snapshot.delete``."""
        with contextlib.suppress(NotFoundError):
            await self._lease.connection.send(snapshot_calls.delete_snapshot(self.id))

    async def close(self) -> None:
        """Close the connection; the snapshot stays."""
        await self._lease.close()
