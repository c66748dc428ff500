"""The bases of an installation's volumes, kept beside them: a user may empty the image cache at any time.

Used by ``qcow2``. Owns ``<volumes folder>/bases``. A base is there from before the first volume that refers to it until
after the last, volumes that somebody put into folders below the volumes' own included. One manager at a time works on
a data folder, so what is under way is known here and needs no lock on disk.
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
from atelier.model.errors import HostError
from atelier.model.machine import DiskFile

_CONTENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]*-[0-9a-f]{16}\.ext4")
"""How an image's file is named in the cache."""


async def _pin(source: Path, pin: Path) -> None:
    pinning = asyncio.ensure_future(asyncio.to_thread(ensure_pinned, source, pin))
    try:
        await asyncio.shield(pinning)
    except asyncio.CancelledError:
        # A thread cannot be stopped, and the next one must find it ended.
        await asyncio.wait({pinning})
        raise
    except FileNotFoundError as error:
        raise missing_disk_file(source) from error


class PinnedBases:
    def __init__(self, volumes_dir: Path) -> None:
        self._volumes_dir = volumes_dir
        self._folder = volumes_dir / "bases"
        self._in_use: Counter[str] = Counter()
        self._pinning = asyncio.Lock()

    @asynccontextmanager
    async def pinned(self, base: DiskFile) -> AsyncGenerator[DiskFile]:
        """The kept file of ``base``. It stays for as long as the block runs, and then as long as a volume needs it.

        Raises HostError (``disk_file_missing``), DiskFullError.
        """
        pin = self._folder / base.path.name
        self._in_use[pin.name] += 1
        try:
            async with self._pinning:
                ensure_private_folder(self._folder)
                await _pin(base.path, pin)
            yield DiskFile(pin, base.format)
        except BaseException:
            self._release(pin.name)
            self.drop_unused()
            raise
        self._release(pin.name)

    def _release(self, name: str) -> None:
        self._in_use[name] -= 1
        if not self._in_use[name]:
            del self._in_use[name]

    def check(self, file: DiskFile) -> None:
        """That a file which a volume names as its base is one: pinned here, or an image of the cache, as it was before
        bases were pinned. A VMM that was broken out of can write what it likes into its own volume's header.

        Raises HostError (``disk_file_missing``, ``disk_file_damaged``).
        """
        try:
            found = file.path.lstat()
        except FileNotFoundError as error:
            raise missing_disk_file(file.path) from error
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o222
        if is_ours and (file.path.parent == self._folder or _CONTENT_NAME.fullmatch(file.path.name)):
            return
        raise HostError(
            f"{file.path} is named as the base of a volume and is no image's file",
            code="disk_file_damaged",
            hint="the volume was tampered with; do not use it",
        )

    def drop_unused(self) -> None:
        """Remove the bases that no volume refers to. None goes while a volume's base cannot be told."""
        try:
            unused = {entry.name for entry in self._folder.iterdir()} - self._in_use.keys()
        except FileNotFoundError:
            return
        for backing in self._references():
            if not unused or backing is None:
                return
            if backing.parent == self._folder:
                unused.discard(backing.name)
        for name in unused:
            (self._folder / name).unlink(missing_ok=True)
        if not self._in_use:
            # Not empty mostly: others are still needed.
            with suppress(OSError):
                self._folder.rmdir()

    def _references(self) -> Iterator[Path | None]:
        """The files that volumes, and bases, stand over; None for a volume, or a folder, that cannot be looked into."""
        unreadable: list[OSError] = []
        for folder, _, names in os.walk(self._volumes_dir, onerror=unreadable.append):
            for name in names:
                path = Path(folder, name)
                try:
                    if not is_qcow2(path):
                        continue
                    backing = find_backing(DiskFile(path, "qcow2"))
                except (OSError, HostError):
                    yield None
                    continue
                if backing is not None:
                    yield backing.path
        if unreadable:
            yield None
