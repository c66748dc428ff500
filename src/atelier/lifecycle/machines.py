"""Watches the machines of running sandboxes: finds them again after a start, and says so when one ends by itself.

Used by ``sandboxes``. One watcher per machine, woken by the kernel; what it may conclude stands in the row: a machine
that was ended on purpose is nobody's failure. It starts and ends no machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from atelier.db.engine import Connection, Database
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.transitions import Failure, Transitions
from atelier.model.errors import AtelierError
from atelier.model.layout import RunLayout
from atelier.model.machine import ProcessIdentity
from atelier.model.states import SandboxState
from atelier.telemetry.logs import log_context

_logger = logging.getLogger(__name__)

_WATCH_AGAIN_SECONDS = 5.0
_AT_ONCE = 16


class Machines:
    """``spawn`` runs work in the background; ``boot_again`` begins to start a sandbox whose machine went with a reboot
    of the host."""

    def __init__(
        self,
        *,
        database: Database,
        transitions: Transitions,
        vmm: VmmDriver,
        guests: GuestDriver,
        run: RunLayout,
        consoles: KeptConsoles,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        boot_again: Callable[[str], Awaitable[object]],
    ) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._transitions = transitions
        self._vmm = vmm
        self._guests = guests
        self._run = run
        self._consoles = consoles
        self._spawn = spawn
        self._boot_again = boot_again
        self._watched: dict[str, ProcessIdentity] = {}

    def watch(self, sandbox_id: str) -> None:
        """Watch the machine that the row names, if the sandbox runs and it is not watched yet."""
        with self._database.read() as connection:
            sandbox = self._sandboxes.find(connection, sandbox_id)
            identity = self._sandboxes.find_vmm_process(connection, sandbox_id)
        if sandbox is None or sandbox.state is not SandboxState.RUNNING or identity is None:
            return
        if self._watched.get(sandbox_id) != identity:
            self._watched[sandbox_id] = identity
            self._spawn(self._watch(sandbox_id, identity), f"watch {sandbox_id}")

    async def adopt(self, sandbox_ids: list[str]) -> None:
        """Take machines under watch again that outlived the last manager. One that went with a reboot of the host is
        booted again; one that is gone otherwise makes its sandbox ``failed``."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(sandbox_id: str) -> None:
            async with places:
                with log_context(sandbox_id=sandbox_id):
                    try:
                        await self._adopt(sandbox_id)
                    except AtelierError as error:
                        # The machine, if there is one, is left alone; the next round tries again.
                        _logger.error("sandbox %s could not be taken up: %s", sandbox_id, error)

        await asyncio.gather(*(one(each) for each in sandbox_ids if each not in self._watched))

    async def _adopt(self, sandbox_id: str) -> None:
        directory = self._run.vmm_directory(sandbox_id)
        identity = await self._vmm.find_process(sandbox_id, directory)
        with self._database.read() as connection:
            before = self._sandboxes.find_vmm_process(connection, sandbox_id)
            token = self._sandboxes.get_secrets(connection, sandbox_id).token
        if identity is None:
            await self._end(sandbox_id, before, "its virtual machine was gone when the manager looked for it")
            return
        await self._guests.ensure_channel(sandbox_id, self._vmm.guest_endpoint(directory), token)

        def note(connection: Connection) -> None:
            self._sandboxes.set_vmm_process(connection, sandbox_id, identity)

        if identity != before:
            await self._database.write(note)
        self.watch(sandbox_id)

    async def _watch(self, sandbox_id: str, identity: ProcessIdentity) -> None:
        try:
            while True:
                try:
                    await self._vmm.wait_ended(identity)
                    break
                except AtelierError as error:
                    _logger.warning("the machine of %s cannot be watched: %s", sandbox_id, error)
                await asyncio.sleep(_WATCH_AGAIN_SECONDS)
            await self._end(sandbox_id, identity, "its virtual machine ended by itself")
        except AtelierError as error:
            # Something else is under way with the sandbox; whoever supervises that has it watched again.
            _logger.info("the end of the machine of %s waits: %s", sandbox_id, error)
        finally:
            if self._watched.get(sandbox_id) == identity:
                del self._watched[sandbox_id]

    async def _end(self, sandbox_id: str, identity: ProcessIdentity | None, message: str) -> None:
        """There is no such machine any more."""
        if identity is not None and identity.boot_id != self._vmm.boot_id():
            _logger.info("sandbox %s is booted again after the host's reboot", sandbox_id)
            await self._boot_again(sandbox_id)
        else:
            await self._lose(sandbox_id, identity, message)

    async def _lose(self, sandbox_id: str, identity: ProcessIdentity | None, message: str) -> None:
        """The machine of a running sandbox is gone: say so, unless it was ended on purpose or is another by now. The
        volume stays."""

        def is_lost(connection: Connection) -> bool:
            sandbox = self._sandboxes.find(connection, sandbox_id)
            known = self._sandboxes.find_vmm_process(connection, sandbox_id)
            return sandbox is not None and sandbox.state is SandboxState.RUNNING and known == identity

        with self._database.read() as connection:
            if not is_lost(connection):
                return
        tail = await self._consoles.keep(sandbox_id)
        hint = f"the end of its console may say why; its disk is kept: atelier start {sandbox_id}"
        failure = Failure("vmm_ended", message, hint, tail)

        def fail(connection: Connection) -> bool:
            if not is_lost(connection):
                return False
            self._transitions.apply(connection, sandbox_id, SandboxState.FAILED, failure)
            self._sandboxes.set_vmm_process(connection, sandbox_id, None)
            return True

        if await self._database.write(fail):
            _logger.warning("sandbox %s failed: %s", sandbox_id, message)
