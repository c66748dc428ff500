"""What volumes and snapshot disks stand over: there from before the first file that names it until after the last.

Used by ``qcow2``, ``layers`` and ``snapshot_disks``. Owns ``bases`` and ``origins`` of ``DiskLayout``, and the layers of
volumes that are gone. Images and the disks of snapshots are kept under second names, so the image cache may be emptied
and a snapshot deleted at any time.

One manager at a time works on a data folder, so what is under way is known here and needs no lock on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from atelier.host.disk_files import find_backing, is_qcow2, missing_disk_file
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder
from atelier.host.threads import run_in_thread
from atelier.model.errors import HostError
from atelier.model.ids import SANDBOX_ID_LENGTH
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile


@dataclass(slots=True)
class _Use:
    """Of a pin: how many work with it now, of whom one at a time may make it."""

    count: int = 0
    pinning: asyncio.Lock = field(default_factory=asyncio.Lock)


class BackingFiles:
    def __init__(self, layout: DiskLayout) -> None:
        self._layout = layout
        self._in_use: dict[Path, _Use] = {}

    @asynccontextmanager
    async def pinned(self, source: DiskFile, pin: Path) -> AsyncGenerator[DiskFile]:
        """The file of ``source`` under the name ``pin``, in ``bases``, ``origins`` or ``layers``. It stays for as long
        as the block runs, and then as long as something stands over it.

        Raises HostError (``disk_file_missing``), DiskFullError.
        """
        use = self._in_use.setdefault(pin, _Use())
        use.count += 1
        try:
            async with use.pinning:
                ensure_private_folder(pin.parent)
                try:
                    await run_in_thread(lambda given_up: ensure_pinned(source.path, pin, given_up=given_up))
                except FileNotFoundError as error:
                    raise missing_disk_file(source.path) from error
            yield DiskFile(pin, source.format)
        except BaseException:
            self._release(pin)
            self.drop_unused()
            raise
        self._release(pin)

    def _release(self, pin: Path) -> None:
        self._in_use[pin].count -= 1
        if not self._in_use[pin].count:
            del self._in_use[pin]

    def drop_unused(self, *, of_sandbox: str = "") -> None:
        """Remove bases and origins that nothing stands over, and such layers of volumes that are gone, and of
        ``of_sandbox``. None goes while it cannot be told of every file what that stands over."""
        candidates = {path for path in self._candidates(of_sandbox) if not self._is_in_use(path)}
        if not candidates:
            return
        backings = dict(self._backings())
        if None in backings:
            return
        needed = [backing for path, backing in backings.items() if path not in candidates]
        while needed:
            backing = needed.pop()
            if backing in candidates:
                candidates.discard(backing)
                needed.append(backings.get(backing))
        for path in candidates:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in candidates}:
            # Not empty mostly, or needed in a moment.
            if not any(pin.parent == folder for pin in self._in_use):
                with suppress(OSError):
                    folder.rmdir()

    def _candidates(self, of_sandbox: str) -> Iterator[Path]:
        for folder in (self._layout.bases, self._layout.origins):
            yield from _entries(folder)
        for path in _entries(self._layout.layers):
            sandbox_id = path.name.lstrip(".")[:SANDBOX_ID_LENGTH]
            if sandbox_id == of_sandbox or not self._layout.volume(sandbox_id).exists():
                yield path

    def _is_in_use(self, path: Path) -> bool:
        """Also of the file that a pin is made as."""
        return path in self._in_use or any(pin.parent == path.parent and pin.name in path.name for pin in self._in_use)

    def _backings(self) -> Iterator[tuple[Path | None, Path | None]]:
        """Every disk file below the volumes' folder, folders that somebody else made there included, and what it stands
        over; an entry without a path for what cannot be looked into."""
        folders = [self._layout.root]
        while folders:
            seen: dict[int, Path | None] = {}
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(Path(entry.path))
                            continue
                        # Many names have few files: that of one snapshot's disk, for each sandbox that was made from it.
                        if entry.inode() not in seen:
                            seen[entry.inode()] = _find_backing(Path(entry.path))
                        yield Path(entry.path), seen[entry.inode()]
            except (OSError, HostError):
                yield None, None


def _find_backing(path: Path) -> Path | None:
    """What a disk file stands over; None also for a file that is none."""
    try:
        backing = find_backing(DiskFile(path, "qcow2"))
    except HostError:
        try:
            if is_qcow2(path):
                raise
        except FileNotFoundError:
            pass  # gone since it was listed
        return None
    return backing.path if backing else None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
