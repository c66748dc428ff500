"""Sandboxes: create, find, list, stop, start, pause, resume, resize, destroy, console."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.images.interface import ImageDriver
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.ids import new_sandbox_name, validate_name
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

_NAME_TRIES = 5
_WAKE_SECONDS = 60.0
"""How long somebody waits for a paused sandbox to run again."""


class SandboxService:
    def __init__(self, database: Database, images: ImageDriver, lifecycle: SandboxLifecycle) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._images = images
        self._lifecycle = lifecycle

    async def create(
        self,
        name: str | None,
        spec: SandboxSpec,
        policy: NetworkPolicy = OPEN_POLICY,
        *,
        snapshot_id: str | None = None,
        disk_only: bool = False,
    ) -> Sandbox:
        """Begin to create a sandbox; returns its row in state ``creating``. ``snapshot_id``: it begins there, with the
        spec that ``SnapshotService.begin_from`` has made for it, or with ``disk_only`` boots from the disk there.

        Raises InvalidRequestError (name), NotFoundError (``image_not_found``, ``snapshot_not_found``), ConflictError
        (``name_taken``, ``snapshot_not_ready``), CapacityError, PreconditionError (``network_closed``).
        """
        if snapshot_id is None:
            await self._check_image(spec.image)
        chosen = None if name is None else validate_name(name)
        for tries_left in reversed(range(_NAME_TRIES)):
            try:
                return await self._lifecycle.start_create(
                    chosen or new_sandbox_name(), spec, policy, snapshot_id=snapshot_id, disk_only=disk_only
                )
            except ConflictError as error:
                if chosen or not tries_left or error.code != "name_taken":
                    raise
        raise AssertionError("the last try has returned or raised")

    async def _check_image(self, image: str) -> None:
        recipes = await self._images.list_recipes()
        if image not in recipes:
            raise NotFoundError(
                f"there is no image {image!r}",
                code="image_not_found",
                hint=f"known images: {', '.join(sorted(recipes))}",
            )

    async def wait_settled(self, sandbox_id: str, timeout_seconds: float) -> tuple[Sandbox, bool]:
        """The row once nothing is under way with it but what is stuck, and True; or as it is after
        ``timeout_seconds``, and False. Raises NotFoundError when it was destroyed meanwhile."""
        settled = await self._lifecycle.wait_settled(sandbox_id, timeout_seconds)
        return (settled, True) if settled is not None else (self.get(sandbox_id), False)

    def get(self, reference: str) -> Sandbox:
        """By id or name. Raises NotFoundError (``sandbox_not_found``)."""
        with self._database.read() as connection:
            return self._sandboxes.get(connection, reference)

    def list_page(
        self, limit: int, cursor: str, state: SandboxState | None, labels: dict[str, str], viewer_id: str | None
    ) -> tuple[list[Sandbox], str | None]:
        """What a user may see (None: everything), newest first, with the cursor of the next page. Raises InvalidRequestError (``invalid_cursor``)."""
        with self._database.read() as connection:
            return self._sandboxes.list_page(connection, limit, cursor or None, state, labels, viewer_id)

    async def start(self, reference: str) -> Sandbox:
        """Begin to boot a stopped or failed sandbox from its disk.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``), CapacityError.
        """
        return await self._lifecycle.start(self.get(reference).id)

    async def stop(self, reference: str, grace_seconds: float | None, *, then_start: bool = False) -> Sandbox:
        """Begin to stop a running sandbox, and to start it again if ``then_start``.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``).
        """
        sandbox_id = self.get(reference).id
        return await self._lifecycle.stop(sandbox_id, grace_seconds=grace_seconds, then_start=then_start)

    async def pause(self, reference: str) -> Sandbox:
        """Begin to put a running sandbox on disk, its memory included.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``).
        """
        return await self._lifecycle.pause(self.get(reference).id)

    async def resume(self, reference: str, *, from_disk: bool = False) -> Sandbox:
        """Begin to let a paused sandbox go on, or to boot it from its disk.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``), CapacityError.
        """
        return await self._lifecycle.resume(self.get(reference).id, from_disk=from_disk)

    async def wake(self, row: Sandbox) -> Sandbox:
        """Resume a paused sandbox because somebody uses it; its row when that has ended, well or not.

        Raises NotFoundError, CapacityError.
        """
        if row.state is SandboxState.PAUSED:
            with suppress(ConflictError):  # somebody else has resumed it meanwhile
                await self._lifecycle.resume(row.id)
        woken, _ = await self.wait_settled(row.id, _WAKE_SECONDS)
        return woken

    async def resize(self, reference: str, disk_mib: int) -> Sandbox:
        """Begin to grow the disk.

        Raises NotFoundError, InvalidRequestError (``disk_cannot_shrink``), ConflictError, CapacityError.
        """
        return await self._lifecycle.resize(self.get(reference).id, disk_mib)

    async def retry(self, reference: str) -> Sandbox:
        """Try again what is stuck. Raises NotFoundError, ConflictError (``nothing_stuck``)."""
        return await self._lifecycle.retry(self.get(reference).id)

    async def set_time_limits(self, reference: str, change: Callable[[SandboxSpec], SandboxSpec]) -> Sandbox:
        """Change ``expires_at`` and ``auto_stop_after_idle_seconds``; None: never. Raises NotFoundError,
        InvalidRequestError (``expiry_in_past``)."""
        return await self._lifecycle.set_time_limits(self.get(reference).id, change)

    async def destroy(self, reference: str, wait_seconds: float | None) -> bool:
        """Destroy whatever the sandbox is doing. True when nothing of it is left; False when that takes longer than
        ``wait_seconds`` (None: do not wait)."""
        row = self.get(reference)
        if wait_seconds is None:
            await self._lifecycle.destroy(row.id, wait=False)
            return False
        try:
            async with asyncio.timeout(wait_seconds):
                await self._lifecycle.destroy(row.id, wait=True)
        except TimeoutError:
            return False
        return True

    async def console(self, reference: str, limit_bytes: int) -> bytes:
        """The newest bytes of the serial console; of a stopped or failed sandbox, those of its last run."""
        return await self._lifecycle.console(self.get(reference), limit_bytes)
