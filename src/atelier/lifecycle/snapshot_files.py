"""The files of snapshots beside their disks: memory, state, and the tools image that the memory belongs to.

Used by the sagas that take, bake and use snapshots. A folder each, named by the snapshot's id, the manager's own. A folder
without a row is never deleted by itself: an older database may have been restored.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from atelier.host.file_copies import sha256_of_file
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder, refusal_as_error
from atelier.host.threads import run_in_thread
from atelier.lifecycle.saved_memories import remove_saved
from atelier.model.errors import HostError
from atelier.model.layout import DataLayout
from atelier.model.machine import MemoryImage, MemoryStream

MEMORY, STATE = "memory", "state"


class SnapshotFiles:
    """Where ``layout`` says, one folder per snapshot."""

    def __init__(self, layout: DataLayout) -> None:
        self._layout = layout

    def stream(self, snapshot_id: str) -> MemoryStream:
        """What the machine was saved to; gone once it is baked."""
        return MemoryStream(self._layout.snapshot(snapshot_id) / "stream")

    def image(self, snapshot_id: str) -> MemoryImage:
        folder = self._layout.snapshot(snapshot_id)
        return MemoryImage(folder / MEMORY, folder / STATE)

    def tools(self, snapshot_id: str) -> Path:
        return self._layout.snapshot(snapshot_id) / "tools"

    async def prepare(self, snapshot_id: str, tools: Path) -> None:
        """Make the folder, with ``tools`` kept in it. Raises HostError (``tools_image_missing``), DiskFullError."""
        ensure_private_folder(self._layout.snapshot(snapshot_id))
        try:
            await asyncio.to_thread(ensure_pinned, tools, self.tools(snapshot_id))
        except FileNotFoundError as error:
            raise HostError(
                f"the tools image that the sandbox runs with is gone: {tools}",
                code="tools_image_missing",
                hint="restart the sandbox (atelier restart), which gives it the present one",
            ) from error

    async def keep_image(self, snapshot_id: str, source: MemoryImage) -> None:
        """Have memory and state of ``source`` as the snapshot's, in the folder that is there. Raises HostError
        (``snapshot_damaged``) where one is gone, DiskFullError."""
        image = self.image(snapshot_id)
        for there, here in ((source.memory, image.memory), (source.state, image.state)):
            try:
                await run_in_thread(partial(_pin, there, here))
            except FileNotFoundError as error:
                raise damaged(there, "it is gone") from error

    def remove_stream(self, snapshot_id: str) -> None:
        remove_saved(self.stream(snapshot_id))

    def remove_image(self, snapshot_id: str) -> None:
        image = self.image(snapshot_id)
        image.memory.unlink(missing_ok=True)
        image.state.unlink(missing_ok=True)

    async def remove(self, snapshot_id: str) -> None:
        with suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, self._layout.snapshot(snapshot_id))

    async def checksums(self, snapshot_id: str) -> dict[str, str]:
        """Of memory and state, by their names. Raises HostError (``snapshot_damaged``) where one is gone."""
        image = self.image(snapshot_id)
        return {
            MEMORY: await self._checksum(image.memory),
            STATE: await self._checksum(image.state),
        }

    async def check(self, snapshot_id: str, checksums: dict[str, str], *names: str) -> None:
        """That the files named (``MEMORY``, ``STATE``) are what was written. Raises HostError (``snapshot_damaged``)."""
        folder = self._layout.snapshot(snapshot_id)
        for name in names:
            if await self._checksum(folder / name) != checksums.get(name):
                raise damaged(folder / name, "its checksum is another")
        if not self.tools(snapshot_id).exists():
            raise damaged(self.tools(snapshot_id), "it is gone")

    async def memory_bytes(self, snapshot_id: str) -> int:
        """What memory and state really occupy on disk."""
        image = self.image(snapshot_id)
        # Source: stat(2): st_blocks counts 512 bytes each, whatever the file system's block size.
        return sum(path.stat().st_blocks * 512 for path in (image.memory, image.state))

    async def _checksum(self, path: Path) -> str:
        try:
            with refusal_as_error(f"reading {path}"):
                return await run_in_thread(lambda given_up: sha256_of_file(path, given_up=given_up))
        except FileNotFoundError as error:
            raise damaged(path, "it is gone") from error


def _pin(there: Path, here: Path, given_up: threading.Event) -> None:
    ensure_pinned(there, here, given_up=given_up)


def damaged(path: Path, how: str) -> HostError:
    return HostError(
        f"a file of the snapshot is damaged: {path}: {how}",
        code="snapshot_damaged",
        hint="the snapshot serves nobody any more; others are not touched; delete it, and take it anew",
    )
