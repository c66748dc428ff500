"""What volumes and snapshot disks stand over: there from before the first file that names it until after the last.

Used by ``qcow2``, ``layers`` and ``snapshot_disks``. Owns ``bases`` and ``origins`` of ``DiskLayout``, and the layers of
volumes that are gone. Images and the disks of snapshots are kept under second names, so the image cache may be emptied
and a snapshot deleted at any time.

A VMM that was broken out of can write what it likes into the header of its own volume and layers. So a name has to be
earned: these may stand over layers of the same sandbox (its id is in their names) and images; the disk of a snapshot
that it was made from is reached under such a name, too. Only snapshot disks, which no VMM writes, may name others'.

One manager at a time works on a data folder, so what is under way is known here and needs no lock on disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from atelier.host.disk_files import find_backing, is_qcow2, missing_disk_file
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder
from atelier.host.threads import run_in_thread
from atelier.model.errors import HostError
from atelier.model.ids import SANDBOX_ID_LENGTH
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile

LONGEST_CHAIN = 8
"""Files of one disk, the one that is written to included."""
_CONTENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]*-[0-9a-f]{16}\.ext4")
"""How an image's file is named in the cache."""


class BackingFiles:
    def __init__(self, layout: DiskLayout) -> None:
        self._layout = layout
        self._in_use: Counter[Path] = Counter()
        self._pinning = asyncio.Lock()

    @asynccontextmanager
    async def pinned(self, source: DiskFile, pin: Path) -> AsyncGenerator[DiskFile]:
        """The file of ``source`` under the name ``pin``, in ``bases``, ``origins`` or ``layers``. It stays for as long
        as the block runs, and then as long as something stands over it.

        Raises HostError (``disk_file_missing``), DiskFullError.
        """
        self._in_use[pin] += 1
        try:
            async with self._pinning:
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
        self._in_use[pin] -= 1
        if not self._in_use[pin]:
            del self._in_use[pin]

    def chain_below(self, file: DiskFile, owner: str) -> tuple[DiskFile, ...]:
        """What ``file`` stands over, nearest first. ``owner``: the sandbox whose volume or layer it is; empty for the
        disk of a snapshot.

        Raises HostError (``disk_file_missing``, ``disk_file_damaged``).
        """
        chain: list[DiskFile] = []
        lower = file
        while found := find_backing(lower):
            if len(chain) == LONGEST_CHAIN - 1:
                raise HostError(f"{file.path} has a chain of more than {LONGEST_CHAIN} files", code="disk_file_damaged")
            self._check(found, owner)
            if self._layout.is_origin(found.path):
                owner = ""
            chain.append(found)
            lower = found
        if chain and self._layout.is_layer(chain[-1].path):
            raise HostError(f"{file.path} stands over no image in the end", code="disk_file_damaged")
        return tuple(chain)

    def _check(self, file: DiskFile, owner: str) -> None:
        try:
            found = file.path.lstat()
        except FileNotFoundError as error:
            raise missing_disk_file(file.path) from error
        folder, name = file.path.parent, file.path.name
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        is_read_only = not found.st_mode & 0o222
        if owner and folder == self._layout.layers:
            # One that is just being frozen may still be written to.
            earned = is_ours and file.format == "qcow2" and name.startswith(f"{owner}-")
        elif folder == self._layout.origins:
            earned = is_ours and is_read_only and not owner
        else:
            # Volumes stood over the cache itself before images were kept.
            earned = is_ours and is_read_only and (folder == self._layout.bases or bool(_CONTENT_NAME.fullmatch(name)))
        if not earned:
            raise HostError(
                f"{file.path} is named as what a disk stands over, and is none of its layers and no image's file",
                code="disk_file_damaged",
                hint="the disk was tampered with; do not use it",
            )

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
        unreadable: list[OSError] = []
        for folder, _, names in os.walk(self._layout.root, onerror=unreadable.append):
            for name in names:
                path = Path(folder, name)
                try:
                    if is_qcow2(path):
                        backing = find_backing(DiskFile(path, "qcow2"))
                        yield path, backing.path if backing else None
                except (OSError, HostError):
                    yield None, None
        if unreadable:
            yield None, None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
