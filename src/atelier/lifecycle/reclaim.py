"""Finds what bears this installation's name and has no row, and frees it: at the start and from a background loop.

Processes, sockets, run directories, slots and kept consoles are freed in DESIGN's order. **Volumes, memories and snapshots
never**: ``orphans`` tells of them. What bears another name is never touched: drivers list their own installation's.
"""

from __future__ import annotations

import logging

from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.orphans import Orphans
from atelier.model.errors import AtelierError
from atelier.model.layout import RunLayout

_logger = logging.getLogger(__name__)


class Reclaim:
    def __init__(
        self,
        *,
        vmm: VmmDriver,
        network: NetworkDriver,
        guests: GuestDriver,
        run: RunLayout,
        consoles: KeptConsoles,
        orphans: Orphans,
    ) -> None:
        self._vmm = vmm
        self._network = network
        self._guests = guests
        self._run = run
        self._consoles = consoles
        self.orphans = orphans

    async def free_orphans(self) -> list[str]:
        """Free all that is nobody's work; returns the ids of sandboxes of which something was freed. What cannot be freed now is
        logged and left for the next time."""
        # Resources first, rows after: a row is written before its resources are made and goes after them, so what has
        # no row by then had an owner that is gone.
        machines = set(await self._vmm.list_sandboxes(self._run.sandboxes))
        channels = set(await self._guests.list_channels())
        slots = set(await self._network.list_slots())
        consoles = set(await self._consoles.list_sandboxes())
        known = self.orphans.known_ids()
        freed: list[str] = []
        for sandbox_id in sorted((machines | channels | slots | consoles) - known):
            try:
                await self._free(sandbox_id)
            except AtelierError as error:
                _logger.error("what sandbox %s has left behind cannot be freed: %s", sandbox_id, error)
                continue
            _logger.warning("freed what sandbox %s had left behind", sandbox_id)
            freed.append(sandbox_id)
        await self.orphans.tell()
        return freed

    async def _free(self, sandbox_id: str) -> None:
        directory = self._run.vmm_directory(sandbox_id)
        await self._vmm.ensure_stopped(sandbox_id, directory, None)
        await self._guests.ensure_channel_absent(sandbox_id)
        await self._vmm.ensure_run_directory_absent(directory)
        await self._network.ensure_slot_absent(sandbox_id)
        await self._consoles.remove(sandbox_id)
