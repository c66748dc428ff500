"""Consoles that outlive their machine: a copy in the data folder for each sandbox that failed.

Called by ``sandbox_create`` and ``sandboxes``. What a guest wrote is hostile: the copy keeps its bytes, the row's text
keeps letters and line breaks only.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

from atelier.drivers.vmm.interface import VmmDriver
from atelier.model.errors import AtelierError
from atelier.model.layout import RunLayout

_logger = logging.getLogger(__name__)

TAIL_BYTES = 4096
_KEPT_BYTES = 256 * 1024

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console_text(data: bytes) -> str:
    """The end of a console as plain text: no terminal escapes, no control characters but line breaks and tabs."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).strip("\n")


class KeptConsoles:
    """Files ``<sandbox id>.log`` in ``folder``, mode 0600."""

    def __init__(self, folder: Path, run: RunLayout, vmm: VmmDriver) -> None:
        self._folder = folder
        self._run = run
        self._vmm = vmm

    async def keep(self, sandbox_id: str) -> str:
        """Copy the machine's console while its run directory still stands; return the end of it as text. A console
        that cannot be read or copied costs the copy, not the caller's work."""
        try:
            data = await self._vmm.console_tail(self._run.vmm_directory(sandbox_id), _KEPT_BYTES)
        except (AtelierError, OSError) as error:
            _logger.warning("the console of %s cannot be read: %s", sandbox_id, error)
            return ""
        if data:
            try:
                await asyncio.to_thread(self._save, sandbox_id, data)
            except OSError as error:
                _logger.warning("the console of %s cannot be kept: %s", sandbox_id, error)
        return console_text(data[-TAIL_BYTES:])

    async def read(self, sandbox_id: str, limit_bytes: int) -> bytes:
        """The end of a kept console; empty if there is none."""
        try:
            data = await asyncio.to_thread(self._file(sandbox_id).read_bytes)
        except FileNotFoundError:
            return b""
        return data[max(0, len(data) - limit_bytes) :]

    async def list_sandboxes(self) -> list[str]:
        """Of which a console is kept."""
        if not await asyncio.to_thread(self._folder.is_dir):
            return []
        return [file.stem for file in await asyncio.to_thread(lambda: list(self._folder.glob("*.log")))]

    async def remove(self, sandbox_id: str) -> None:
        await asyncio.to_thread(self._file(sandbox_id).unlink, missing_ok=True)

    def _save(self, sandbox_id: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(sandbox_id)
        file.touch(mode=0o600)
        file.write_bytes(data)

    def _file(self, sandbox_id: str) -> Path:
        return self._folder / f"{sandbox_id}.log"
