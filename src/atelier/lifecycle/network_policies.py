"""What a sandbox may reach: written down first, then brought into force, and given again wherever that is in doubt.

Called by ``sandboxes`` and the steps of its sagas (a slot is taken with the policy of that moment), by
``services/networks.py`` (changes while it runs) and by a loop of the manager's. A policy that is written down comes into
force whatever happens in between: it is marked in the row until the network driver has taken it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.network.interface import NetworkDriver
from atelier.lifecycle.background import BackgroundTasks
from atelier.model.errors import (
    AtelierError,
    ConflictError,
    NotFoundError,
    PreconditionError,
    TimeoutExceededError,
    TransientError,
)
from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import CLOSED_POLICY, OPEN_POLICY, NetworkPolicy
from atelier.model.states import SandboxState
from atelier.telemetry.logs import log_context

NETWORK_CHANGED = "sandbox.network_changed"

_logger = logging.getLogger(__name__)

_ENFORCE_SECONDS = 20.0
"""How long the driver may take with one policy; it gives up by itself before."""
_AT_ONCE = 8
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Failures:
    """Of one sandbox, one after the other."""

    pause_seconds: float
    again_at: float


class NetworkPolicies:
    """``clock`` is monotonic and counts the pauses between two tries."""

    def __init__(
        self,
        database: Database,
        network: NetworkDriver,
        background: BackgroundTasks,
        *,
        enforce_seconds: float = _ENFORCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._network = network
        self._background = background
        self._enforce_seconds = enforce_seconds
        self._clock = clock
        self._sandboxes = SandboxRepository()
        self._networks = SandboxNetworkRepository()
        self._outbox = Outbox(database)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._doubts: dict[str, int] = {}
        self._doubt_count = 0
        self._failures: dict[str, _Failures] = {}

    def check(self, policy: NetworkPolicy) -> None:
        """Raises PreconditionError (``network_closed``) where this host cannot hold a sandbox to this policy."""
        if not self._network.enforces_policies and policy not in (OPEN_POLICY, CLOSED_POLICY):
            raise PreconditionError(
                "the sandboxes of this host have no way out, so there is no network to limit",
                code="network_closed",
                hint="atelier doctor says what is missing for one",
            )

    async def take_slot(self, sandbox_id: str) -> NetworkAttachment:
        """The sandbox's slot, with the policy that the row has at this moment."""
        async with self._lock(sandbox_id):
            with self._database.read() as connection:
                lease = self._sandboxes.get_lease(connection, sandbox_id)
                policy = self._networks.get(connection, sandbox_id).policy
            seen = self._doubts.get(sandbox_id)
            attachment = await self._network.ensure_slot(sandbox_id, lease, policy)
            await self._mark_in_force(sandbox_id, policy, seen)
        return attachment

    async def change(self, sandbox_id: str, edit: Callable[[NetworkPolicy], NetworkPolicy]) -> None:
        """``edit`` makes the new policy from the present one, inside the transaction, so that two callers lose nothing of
        each other's. Returns when it is in force, for open connections too; for a sandbox without a slot when it is
        written down.

        Raises NotFoundError, ConflictError (``invalid_state``), PreconditionError (``network_closed``), what ``edit``
        raises; TransientError (``network_policy_pending``) when it is written down and not in force yet.
        """

        def write(connection: Connection) -> str:
            sandbox = self._sandboxes.get(connection, sandbox_id)
            if sandbox.state is SandboxState.DESTROYING:
                raise ConflictError(
                    f"cannot change the network of sandbox {sandbox.name}: it is being destroyed", code="invalid_state"
                )
            present = self._networks.get(connection, sandbox_id).policy
            changed = edit(present)
            self.check(changed)
            # Also where nothing changes: who gives the same order again wants to know that it is in force.
            self._networks.set_policy(connection, sandbox_id, changed, is_pending=True)
            if changed != present:
                payload = {"name": sandbox.name, **_summary(changed)}
                self._outbox.append(connection, NETWORK_CHANGED, sandbox_id, payload)
            return sandbox.name

        async def carry_out() -> None:
            name = await self._database.write(write)
            # A person is waiting: the pause after earlier failures is for the loop.
            self._failures.pop(sandbox_id, None)
            try:
                await self._enforce(sandbox_id)
            except NotFoundError:
                raise  # it was destroyed meanwhile
            except AtelierError as error:
                raise TransientError(
                    f"the network policy of sandbox {name} is stored and not yet in force: {error.message}",
                    code="network_policy_pending",
                    hint=f"it is tried again until it is; atelier network show {name} tells",
                ) from error

        await self._background.unless_interrupted(carry_out())

    def is_in_force(self, sandbox_id: str, *, is_pending: bool) -> bool:
        """``is_pending``: what the row says."""
        return not is_pending and sandbox_id not in self._doubts

    def doubt_all(self) -> None:
        """What holds the network has begun anew, or this manager has: every policy is to be given again."""
        self._doubt_count += 1
        with self._database.read() as connection:
            leased = self._networks.list_leased(connection)
        self._doubts = dict.fromkeys(leased, self._doubt_count)
        self._failures.clear()

    async def enforce_pending(self) -> None:
        """Bring into force what is not, or is in doubt; what fails is tried again after a pause that grows. The body of a
        background loop."""
        with self._database.read() as connection:
            pending = {*self._networks.list_pending(connection), *self._doubts}
        self._failures = {each: failures for each, failures in self._failures.items() if each in pending}
        now = self._clock()
        due = [each for each in pending if each not in self._failures or self._failures[each].again_at <= now]
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(sandbox_id: str) -> None:
            async with places:
                with log_context(sandbox_id=sandbox_id):
                    await self._try_again(sandbox_id)

        await asyncio.gather(*(one(sandbox_id) for sandbox_id in due))

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _try_again(self, sandbox_id: str) -> None:
        try:
            await self._enforce(sandbox_id)
        except NotFoundError:
            self._doubts.pop(sandbox_id, None)
        except AtelierError as error:
            pause_seconds = self._pause(sandbox_id)
            _logger.warning("its network policy is not in force (again in %g s): %s", pause_seconds, error)
        except Exception:
            self._pause(sandbox_id)
            _logger.exception("its network policy is not in force, by a defect")
        else:
            self._failures.pop(sandbox_id, None)

    def _pause(self, sandbox_id: str) -> float:
        before = self._failures.get(sandbox_id)
        pause_seconds = min(before.pause_seconds * 2, _LONGEST_PAUSE_SECONDS) if before else _FIRST_PAUSE_SECONDS
        self._failures[sandbox_id] = _Failures(pause_seconds, self._clock() + pause_seconds)
        return pause_seconds

    async def _enforce(self, sandbox_id: str) -> None:
        """Raises what the driver raises, NotFoundError when the sandbox is gone, TimeoutExceededError."""
        try:
            async with asyncio.timeout(self._enforce_seconds), self._lock(sandbox_id):
                with self._database.read() as connection:
                    stored = self._networks.get(connection, sandbox_id)
                seen = self._doubts.get(sandbox_id)
                if stored.lease is not None:
                    await self._give(sandbox_id, stored.policy)
                await self._mark_in_force(sandbox_id, stored.policy, seen)
        except TimeoutError as error:
            raise TimeoutExceededError(
                f"the network did not take it within {self._enforce_seconds:g} s", code="network_timeout"
            ) from error

    async def _give(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        try:
            await self._network.set_policy(sandbox_id, policy)
        except NotFoundError as error:
            # It is about to take its slot, with the policy that is written down; or has had none since the host's boot.
            if error.code != "no_network_slot":
                raise

    async def _mark_in_force(self, sandbox_id: str, policy: NetworkPolicy, doubt: int | None) -> None:
        """``doubt``: the one there was before the driver was called; a later one stays."""

        def write(connection: Connection) -> None:
            # Another may have been written meanwhile; who wrote it waits for the lock.
            if self._networks.get(connection, sandbox_id).policy == policy:
                self._networks.mark_in_force(connection, sandbox_id)

        with self._database.read() as connection:
            is_pending = self._networks.get(connection, sandbox_id).is_pending
        if is_pending:
            await self._database.write(write)
        if self._doubts.get(sandbox_id) == doubt:
            self._doubts.pop(sandbox_id, None)

    @asynccontextmanager
    async def _lock(self, sandbox_id: str) -> AsyncGenerator[None]:
        """One at a time gives the driver a sandbox's policy, so that the newest is the last."""
        lock = self._locks.setdefault(sandbox_id, asyncio.Lock())
        async with lock:
            yield


def _summary(policy: NetworkPolicy) -> dict[str, object]:
    """For the event: whoever wants to know all entries asks for them."""
    return {
        "egress_mode": policy.egress.mode.value,
        "networks": len(policy.egress.networks),
        "domains": len(policy.egress.domains),
        "download_kbit_per_second": policy.download_kbit_per_second,
        "upload_kbit_per_second": policy.upload_kbit_per_second,
    }
