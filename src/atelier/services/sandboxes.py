"""Sandboxes: create, find, list, destroy, console."""

from __future__ import annotations

import asyncio

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.images.interface import ImageDriver
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.ids import new_sandbox_name, validate_name
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

_NAME_TRIES = 5


class SandboxService:
    def __init__(self, database: Database, images: ImageDriver, lifecycle: SandboxLifecycle) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._images = images
        self._lifecycle = lifecycle

    async def create(self, name: str | None, spec: SandboxSpec) -> Sandbox:
        """Begin to create a sandbox; returns its row in state ``creating``.

        Raises InvalidRequestError (name), NotFoundError (``image_not_found``), ConflictError (``name_taken``),
        CapacityError.
        """
        recipes = await self._images.list_recipes()
        if spec.image not in recipes:
            raise NotFoundError(
                f"there is no image {spec.image!r}",
                code="image_not_found",
                hint=f"known images: {', '.join(sorted(recipes))}",
            )
        if name is not None:
            return await self._lifecycle.start_create(validate_name(name), spec)
        for _ in range(_NAME_TRIES - 1):
            try:
                return await self._lifecycle.start_create(new_sandbox_name(), spec)
            except ConflictError:
                continue
        return await self._lifecycle.start_create(new_sandbox_name(), spec)

    async def wait_settled(self, sandbox_id: str, timeout_seconds: float) -> Sandbox:
        """The row once it is no longer ``creating``, or as it is after ``timeout_seconds``. Raises NotFoundError when
        it was destroyed meanwhile."""
        settled = await self._lifecycle.wait_settled(sandbox_id, timeout_seconds)
        return settled if settled is not None else self.get(sandbox_id)

    def get(self, reference: str) -> Sandbox:
        """By id or name. Raises NotFoundError (``sandbox_not_found``)."""
        with self._database.read() as connection:
            return self._sandboxes.get(connection, reference)

    def list_page(
        self, limit: int, cursor: str, state: SandboxState | None, labels: dict[str, str]
    ) -> tuple[list[Sandbox], str | None]:
        """Newest first, with the cursor of the next page. Raises InvalidRequestError (``invalid_cursor``)."""
        with self._database.read() as connection:
            return self._sandboxes.list_page(connection, limit, cursor or None, state, labels)

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
        """The newest bytes of the serial console; of a failed sandbox, those that were kept."""
        return await self._lifecycle.console(self.get(reference), limit_bytes)
