"""The memory of paused sandboxes on disk: a file each, and beside it the tools image that the memory belongs to.

Used by the sagas that pause and resume. A file without a row is never deleted by itself: an older database may have been
restored, and the newer one may come back.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from atelier.host.file_copies import sha256_of_file
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder, occupied_bytes, refusal_as_error
from atelier.host.threads import run_in_thread
from atelier.model.errors import HostError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import DataLayout
from atelier.model.machine import MemoryStream
from atelier.model.saved_machine import SavedMemory


class SavedMemories:
    """Where ``layout`` says; the folder is the manager's own."""

    def __init__(self, layout: DataLayout) -> None:
        self._layout = layout

    def stream(self, sandbox_id: str) -> MemoryStream:
        return MemoryStream(self._layout.saved_memory(sandbox_id))

    def tools(self, sandbox_id: str) -> Path:
        return self._layout.saved_tools(sandbox_id)

    async def prepare(self, sandbox_id: str, tools: Path) -> None:
        """Make room for a memory: nothing of an earlier one, and ``tools`` kept for when it comes back.

        Raises HostError (``tools_image_missing``), DiskFullError.
        """
        ensure_private_folder(self._layout.paused)
        self.remove_stream(sandbox_id)
        try:
            await asyncio.to_thread(ensure_pinned, tools, self.tools(sandbox_id))
        except FileNotFoundError as error:
            raise HostError(
                f"the tools image of sandbox {sandbox_id} is gone: {tools}",
                code="tools_image_missing",
                hint="it cannot be paused; stop it instead (atelier stop), which keeps its disk",
            ) from error

    def remove_stream(self, sandbox_id: str) -> None:
        """The tools image's second name stays: the machine needs it for its next pause, whatever becomes of the
        cache."""
        remove_saved(self.stream(sandbox_id))

    async def remove(self, sandbox_id: str) -> None:
        self.remove_stream(sandbox_id)
        self.tools(sandbox_id).unlink(missing_ok=True)

    async def used_bytes(self, sandbox_id: str) -> int:
        """What the memory occupies on disk."""
        return occupied_bytes(*_files(self.stream(sandbox_id)))

    def list(self) -> list[str]:
        """Ids of the sandboxes of which anything is kept here."""
        ids = {path.name.partition(".")[0] for path in self._layout.paused.glob("*")}
        return sorted(sandbox_id for sandbox_id in ids if is_sandbox_id(sandbox_id))

    async def checksum(self, sandbox_id: str) -> str:
        """Of the memory. Raises HostError (``saved_memory_missing``)."""
        path = self.stream(sandbox_id).path
        try:
            with refusal_as_error(f"reading {path}"):
                return await run_in_thread(lambda given_up: sha256_of_file(path, given_up=given_up))
        except FileNotFoundError as error:
            raise _missing(path) from error

    async def check(self, sandbox_id: str, saved: SavedMemory, boot_id: str) -> SavedMemory:
        """That the memory is there and whole; how it is known now. All of it is read only where the host was booted
        since it was last known to be whole: ``boot_id`` names the present boot.

        Raises HostError (``saved_memory_missing``, ``saved_memory_damaged``).
        """
        path = self.stream(sandbox_id).path
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise _missing(path) from error
        if size_bytes != saved.size_bytes:
            raise _damaged(path, f"it has {size_bytes} bytes of {saved.size_bytes}")
        if not self.tools(sandbox_id).exists():
            raise _missing(self.tools(sandbox_id))
        if saved.checksum and saved.boot_id != boot_id:
            return await self.verify(sandbox_id, saved, boot_id)
        return saved

    async def verify(self, sandbox_id: str, saved: SavedMemory, boot_id: str) -> SavedMemory:
        """Read all of it. Raises HostError (``saved_memory_missing``, ``saved_memory_damaged``)."""
        if await self.checksum(sandbox_id) != saved.checksum:
            raise _damaged(self.stream(sandbox_id).path, "its checksum is another")
        return replace(saved, boot_id=boot_id)


def remove_saved(stream: MemoryStream) -> None:
    """And what a manager that died while it was being written has left of it."""
    for path in _files(stream):
        path.unlink(missing_ok=True)


def _files(stream: MemoryStream) -> tuple[Path, Path]:
    return stream.path, stream.path.with_name(stream.path.name + ".new")


_REMEDY = "boot the sandbox from its disk instead, which gives the memory up: atelier resume --from-disk"


def _missing(path: Path) -> HostError:
    return HostError(f"the saved memory is gone: {path}", code="saved_memory_missing", hint=_REMEDY)


def _damaged(path: Path, how: str) -> HostError:
    return HostError(f"the saved memory is damaged: {path}: {how}", code="saved_memory_damaged", hint=_REMEDY)
