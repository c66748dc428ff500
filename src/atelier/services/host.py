"""This host as a whole: what is left without an owner, and the end of the manager. Called by the routes for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from atelier.lifecycle.fleet import SandboxFleet
from atelier.lifecycle.orphans import Orphans
from atelier.model.orphan import Orphan, OrphanKind

SandboxesAtEnd = Literal["keep", "stop", "destroy"]
"""What becomes of the sandboxes when the manager ends."""


class HostService:
    """``end_manager`` has the manager's program end, once what is under way has been answered."""

    def __init__(self, orphans: Orphans, fleet: SandboxFleet, end_manager: Callable[[], None]) -> None:
        self._orphans = orphans
        self._fleet = fleet
        self._end_manager = end_manager

    async def list_orphans(self) -> list[Orphan]:
        return await self._orphans.list()

    async def remove_orphan(self, kind: OrphanKind, orphan_id: str) -> None:
        """Raises NotFoundError (``orphan_not_found``), ConflictError (``not_an_orphan``)."""
        await self._orphans.remove(kind, orphan_id)

    async def shut_down(self, sandboxes: SandboxesAtEnd) -> tuple[list[str], list[str]]:
        """Stop or destroy the sandboxes first, if told to, then end the manager. Returns (names of those that were
        stopped or destroyed, names of those that go on)."""
        changed: list[str] = []
        if sandboxes == "stop":
            changed = await self._fleet.stop_all()
        elif sandboxes == "destroy":
            changed = await self._fleet.destroy_all()
        self._end_manager()
        return changed, self._fleet.list_running_names()
