"""The memory of paused sandboxes on disk: a file each, and beside it the tools image that the memory belongs to.

Used by the sagas that pause and resume. A file without a row is never deleted by itself: an older database may have been
restored, and the newer one may come back.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from atelier.host.checksums import file_checksum
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder, refusal_as_error
from atelier.model.errors import HostError
from atelier.model.machine import MemoryStream
from atelier.model.saved_machine import SavedMemory

_MEMORY_SUFFIX = ".memory"
_TOOLS_SUFFIX = ".tools"


class SavedMemories:
    """Files ``<sandbox id>.memory`` and ``<sandbox id>.tools`` in ``folder``, which is the manager's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stream(self, sandbox_id: str) -> MemoryStream:
        return MemoryStream(self._folder / f"{sandbox_id}{_MEMORY_SUFFIX}")

    def tools(self, sandbox_id: str) -> Path:
        return self._folder / f"{sandbox_id}{_TOOLS_SUFFIX}"

    async def prepare(self, sandbox_id: str, tools: Path) -> None:
        """Make room for a memory: nothing of an earlier one, and ``tools`` kept for when it comes back.

        Raises HostError (``tools_image_missing``), DiskFullError.
        """
        ensure_private_folder(self._folder)
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
        self.stream(sandbox_id).path.unlink(missing_ok=True)

    async def remove(self, sandbox_id: str) -> None:
        self.remove_stream(sandbox_id)
        self.tools(sandbox_id).unlink(missing_ok=True)

    async def checksum(self, sandbox_id: str) -> str:
        """Of the memory. Raises HostError (``saved_memory_missing``)."""
        path = self.stream(sandbox_id).path
        try:
            with refusal_as_error(f"reading {path}"):
                return await asyncio.to_thread(file_checksum, path)
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

    async def list_sandboxes(self) -> list[str]:
        """Of which a memory is kept, sorted."""
        if not self._folder.is_dir():
            return []
        return sorted(file.stem for file in self._folder.glob(f"*{_MEMORY_SUFFIX}"))


_REMEDY = "boot the sandbox from its disk instead, which gives the memory up: atelier resume --from-disk"


def _missing(path: Path) -> HostError:
    return HostError(f"the saved memory is gone: {path}", code="saved_memory_missing", hint=_REMEDY)


def _damaged(path: Path, how: str) -> HostError:
    return HostError(f"the saved memory is damaged: {path}: {how}", code="saved_memory_damaged", hint=_REMEDY)
