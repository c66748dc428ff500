"""All sandboxes of this host at once: what the manager's program does with them at its end, and from its loops.

It goes through ``sandboxes`` for every change, so one that cannot be changed is logged and keeps nobody else waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import AtelierError, ConflictError, NotFoundError
from atelier.model.layout import RunLayout
from atelier.model.sandbox import Sandbox, SandboxPurpose
from atelier.model.states import UNDER_WAY, SandboxState

_logger = logging.getLogger(__name__)

_AT_ONCE = 16
_WITH_MACHINE = (
    SandboxState.CREATING,
    SandboxState.STARTING,
    SandboxState.RESUMING,
    SandboxState.RUNNING,
    SandboxState.PAUSING,
)
_ACTIVE = (*_WITH_MACHINE, SandboxState.STOPPING)


class SandboxFleet:
    """``console_bytes`` bounds the console file of a machine that runs."""

    def __init__(
        self,
        lifecycle: SandboxLifecycle,
        database: Database,
        vmm: VmmDriver,
        guests: GuestDriver,
        run: RunLayout,
        *,
        console_bytes: int = 1024 * 1024,
    ) -> None:
        self._lifecycle = lifecycle
        self._database = database
        self._sandboxes = SandboxRepository()
        self._vmm = vmm
        self._guests = guests
        self._run = run
        self._console_bytes = console_bytes

    async def destroy_all(self) -> list[str]:
        """Destroy every sandbox; returns the names of those that are gone. What is stuck is logged and stays. Warm pools
        are filled no more."""
        self._lifecycle.warm_pools.close()
        return await self._change_all((), self._lifecycle.destroy)

    async def stop_all(self) -> list[str]:
        """Stop every sandbox that runs or is about to; returns the names of those that are stopped. Those in warm pools
        are destroyed: nobody would start them again."""
        self._lifecycle.warm_pools.close()

        pooled = {each.id for each in self._list() if each.purpose is SandboxPurpose.POOL}

        async def stop(sandbox_id: str) -> None:
            if sandbox_id in pooled:
                with suppress(ConflictError):  # taken meanwhile
                    await self._lifecycle.destroy(sandbox_id, only=SandboxPurpose.POOL)
                    return
            settled = await self._lifecycle.wait_settled(sandbox_id, None)
            if settled is not None and settled.state is SandboxState.RUNNING:
                await self._lifecycle.stop(sandbox_id)
                await self._lifecycle.wait_settled(sandbox_id, None)

        tried = await self._change_all(_ACTIVE, stop)
        stopped = {sandbox.name for sandbox in self._list(SandboxState.STOPPED)}
        return [name for name in tried if name in stopped]

    def list_running_names(self) -> list[str]:
        """Of the sandboxes that go on when the manager ends."""
        return sorted(sandbox.name for sandbox in self._list(SandboxState.RUNNING))

    async def drain(self, timeout_seconds: float) -> None:
        """Wait until nothing is under way but what is stuck, no longer than this; the next start goes on with the
        rest."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while busy := [each.id for each in self._list(*UNDER_WAY) if not each.failure_code]:
                    waits = (self._lifecycle.wait_settled(each, None) for each in busy)
                    await asyncio.gather(*waits, return_exceptions=True)
        except TimeoutError:
            return

    async def trim_consoles(self) -> None:
        """Bound the consoles of the machines that run. The body of a background loop."""
        for sandbox in self._list(*_WITH_MACHINE):
            try:
                await self._vmm.trim_console(self._run.vmm_directory(sandbox.id), self._console_bytes)
            except AtelierError as error:
                _logger.warning("the console of %s cannot be trimmed: %s", sandbox.name, error)

    async def resume_after_full_disk(self) -> None:
        """Let machines go on that the host's full disk has halted. The body of a background loop."""
        for sandbox in self._list(*_WITH_MACHINE):
            try:
                if await self._vmm.resume_after_full_disk(self._run.vmm_directory(sandbox.id)):
                    _logger.warning("sandbox %s was halted: no space left on this host for its disk", sandbox.name)
            except AtelierError as error:
                _logger.debug("the machine of %s cannot be asked for its state: %s", sandbox.name, error)

    async def keep_clocks(self) -> None:
        """Keep the guests' clocks on the host's. The body of a background loop."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(sandbox: Sandbox) -> None:
            async with places:
                try:
                    await self._guests.synchronize_clock(sandbox.id)
                except AtelierError as error:
                    _logger.info("the clock of %s could not be set: %s", sandbox.name, error)

        await asyncio.gather(*(one(sandbox) for sandbox in self._list(SandboxState.RUNNING)))

    async def _change_all(
        self, states: tuple[SandboxState, ...], change: Callable[[str], Coroutine[Any, Any, None]]
    ) -> list[str]:
        places = asyncio.Semaphore(_AT_ONCE)
        changed: list[str] = []
        tried: set[str] = set()

        async def one(sandbox: Sandbox) -> None:
            async with places:
                try:
                    await change(sandbox.id)
                except NotFoundError:
                    return
                except AtelierError as error:
                    _logger.error("%s", error)
                    return
            changed.append(sandbox.name)

        while remaining := [each for each in self._list(*states) if each.id not in tried]:
            tried.update(each.id for each in remaining)
            await asyncio.gather(*(one(each) for each in remaining))
        return sorted(changed)

    def _list(self, *states: SandboxState) -> list[Sandbox]:
        """Of these states, or all."""
        with self._database.read() as connection:
            return self._sandboxes.list_in(connection, states)
