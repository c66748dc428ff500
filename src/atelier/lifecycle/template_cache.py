"""Templates that all installations of this user share: a folder each in the image cache, named by the template's key.

Used by ``shared_templates``. A folder that has its name is whole and never changes; it goes as a whole, too. Memory and
state are second names of one installation's files where both lie on one file system. What is read here is verified by who
takes it (``snapshot_adopt``), not by who finds it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atelier.host.file_lock import hold_lock
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import ensure_private_folder, refusal_as_error, sync_folder, write_atomically
from atelier.host.threads import run_in_thread
from atelier.lifecycle.snapshot_files import MEMORY, STATE
from atelier.model.layout import CacheLayout
from atelier.model.machine import MemoryImage
from atelier.model.saved_machine import MachineRecord
from atelier.model.snapshot import Snapshot

_logger = logging.getLogger(__name__)

DISK = "disk"
_DESCRIPTION = "template.json"
_FORMAT = 1
"""Of the folder and the description; one of another is as none."""
_MOST = 8
"""Some 150 MB each: a few images and sizes of one installation, or one of each of several. Beyond, the one goes that was
used the longest ago."""
_SUPERSEDED_SECONDS = 24 * 3600.0
"""One like it with another image build, kernel, tools image or QEMU may serve another installation, of another version:
it goes when nobody has used it for so long."""
_BUILDING, _REMOVED = ".building-", ".removed-"


@dataclass(frozen=True, slots=True)
class CachedTemplate:
    """What a snapshot's row must say, and ``checksums`` of the files by their names (``MEMORY``, ``STATE``, ``DISK``)."""

    key: str
    sandbox_id: str
    sandbox_name: str
    image: str
    image_id: str
    vcpu_count: int
    memory_mib: int
    disk_mib: int
    file_system_mib: int
    machine: MachineRecord
    checksums: dict[str, str]

    @property
    def kind(self) -> tuple[object, ...]:
        """What creates have in common of which only the newest template serves any."""
        return (self.image, self.vcpu_count, self.memory_mib, self.machine.stamp.network_kind)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "machine": self.machine.to_json(), "format": _FORMAT}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CachedTemplate:
        """Raises KeyError, TypeError, ValueError."""
        values = dict(value)
        if values.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        machine = MachineRecord.from_json(values.pop("machine"))
        return cls(**values, machine=machine)


def image_in(entry: Path) -> MemoryImage:
    return MemoryImage(entry / MEMORY, entry / STATE)


class TemplateCache:
    """Where ``layout`` says. Several managers may use it at once."""

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout

    def entry(self, key: str) -> Path:
        return self._layout.template(key)

    def find(self, key: str) -> CachedTemplate | None:
        """One that cannot be read goes."""
        entry = self.entry(key)
        try:
            found = _read(entry)
            if found.key != key:
                raise ValueError(f"it is the template {found.key}")
        except FileNotFoundError:
            if not entry.exists():
                return None
            self.remove(key, "it has no description")
        except (OSError, KeyError, TypeError, ValueError) as error:
            self.remove(key, f"its description cannot be read: {error}")
        else:
            return found
        return None

    async def put(
        self,
        template: Snapshot,
        image: MemoryImage,
        keep_disk: Callable[[Path], Awaitable[str]],
        images: Collection[str],
    ) -> None:
        """Keep a template that is ready, with memory and state as in ``image``; one of its key that is there stays.
        ``keep_disk(target)`` has its disk as ``target`` and returns the checksum of that. Of the others those go that
        can serve nobody any more: ``images`` are the ids of all that there are.

        Raises DiskFullError, HostError, FileNotFoundError where a file is gone, and what ``keep_disk`` raises.
        """
        ensure_private_folder(self._layout.templates)
        async with hold_lock(self._layout.templates_lock):
            newest = await asyncio.to_thread(self.find, template.template_key)
            if newest is None:
                newest = await self._make(template, image, keep_disk)
            await asyncio.to_thread(self._tidy, newest, images)

    async def _make(
        self, template: Snapshot, image: MemoryImage, keep_disk: Callable[[Path], Awaitable[str]]
    ) -> CachedTemplate:
        with refusal_as_error(f"keeping a template in {self._layout.templates}"):
            work = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=self._layout.templates))
            try:
                made = await self._fill(work, template, image, keep_disk)
                work.rename(self.entry(made.key))
                await asyncio.to_thread(sync_folder, self._layout.templates)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return made

    async def _fill(
        self, work: Path, template: Snapshot, image: MemoryImage, keep_disk: Callable[[Path], Awaitable[str]]
    ) -> CachedTemplate:
        disk_checksum = await keep_disk(work / DISK)
        kept = image_in(work)
        await run_in_thread(lambda given_up: ensure_pinned(image.state, kept.state, given_up=given_up))
        await run_in_thread(lambda given_up: ensure_pinned(image.memory, kept.memory, given_up=given_up))
        description = CachedTemplate(
            key=template.template_key,
            sandbox_id=template.sandbox_id,
            sandbox_name=template.sandbox_name,
            image=template.image,
            image_id=template.image_id,
            vcpu_count=template.vcpu_count,
            memory_mib=template.memory_mib,
            disk_mib=template.disk_mib,
            file_system_mib=template.file_system_mib,
            machine=template.machine,
            checksums={**template.checksums, DISK: disk_checksum},
        )
        write_atomically(work / _DESCRIPTION, json.dumps(description.to_json(), indent=2).encode(), mode=0o400)
        await asyncio.to_thread(sync_folder, work)
        return description

    def note_use(self, key: str) -> None:
        """It is among the last to go."""
        with suppress(OSError):
            os.utime(self.entry(key))

    def remove(self, key: str, why: str) -> None:
        """Nothing where it is gone already. Who holds its files already keeps them."""
        away = self._layout.templates / f"{_REMOVED}{key}-{os.getpid()}-{time.monotonic_ns()}"
        with suppress(FileNotFoundError):
            self.entry(key).rename(away)
            _logger.warning("the template %s is removed from the cache: %s", key, why)
            shutil.rmtree(away, ignore_errors=True)

    def _tidy(self, newest: CachedTemplate, images: Collection[str]) -> None:
        """Under the lock: remove what serves nobody, what is too much, and what the killed have left."""
        for left_over in (*self._layout.templates.glob(f"{_BUILDING}*"), *self._layout.templates.glob(f"{_REMOVED}*")):
            shutil.rmtree(left_over, ignore_errors=True)
        kept = 1
        for entry, used_at in self._entries():
            found = self.find(entry.name)
            if found is None or found.key == newest.key:
                continue
            if found.image_id not in images:
                self.remove(found.key, f"its image {found.image_id} is gone")
            elif found.kind == newest.kind and used_at < time.time() - _SUPERSEDED_SECONDS:
                self.remove(found.key, f"the template {newest.key} has taken its place")
            elif kept == _MOST:
                self.remove(found.key, f"{_MOST} others were used since")
            else:
                kept += 1

    def _entries(self) -> Iterator[tuple[Path, float]]:
        """Each with the time of its last use, the latest first."""
        found: list[tuple[float, Path]] = []
        for entry in self._layout.templates.iterdir():
            with suppress(FileNotFoundError):
                if entry.is_dir() and not entry.name.startswith("."):
                    found.append((entry.stat().st_mtime, entry))
        yield from ((entry, used_at) for used_at, entry in sorted(found, reverse=True))


def _read(entry: Path) -> CachedTemplate:
    return CachedTemplate.from_json(json.loads((entry / _DESCRIPTION).read_bytes()))
