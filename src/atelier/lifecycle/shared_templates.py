"""Brings templates into the cache that all installations share, and from there into this one.

Used by ``origins``, before a create boots, and by ``templates``, when one is ready. An adopted template is a row with files
of this installation's, as one that was made here; the cache may be emptied at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial

from atelier.db.engine import Connection, Database
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.lifecycle import snapshot_adopt
from atelier.lifecycle.background import BackgroundTasks
from atelier.lifecycle.snapshot_bake import bake_saga_id
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.lifecycle.snapshot_rows import SnapshotRows
from atelier.lifecycle.snapshots import Snapshots
from atelier.lifecycle.template_cache import CachedTemplate, TemplateCache
from atelier.model.errors import AtelierError, NotFoundError
from atelier.model.ids import new_id, new_sandbox_id
from atelier.model.image import Image
from atelier.model.machine import BootFiles, MachineStamp
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.saga.executor import Executor

_logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 5.0
"""As long as a boot takes: a create then boots, and the next one has the template."""
_AGAIN_AFTER_SECONDS = 600.0
_DAMAGE = ("snapshot_damaged", "disk_file_damaged", "disk_file_missing")
_UNDER_WAY = (SnapshotState.TAKING, SnapshotState.BAKING)


class SharedTemplates:
    """``cache`` None: nothing is shared. ``now`` is the clock of the rows."""

    def __init__(
        self,
        *,
        cache: TemplateCache | None,
        database: Database,
        executor: Executor[Connection],
        background: BackgroundTasks,
        rows: SnapshotRows,
        files: SnapshotFiles,
        snapshots: Snapshots,
        storage: StorageDriver,
        images: ImageDriver,
        now: Callable[[], datetime],
    ) -> None:
        self._cache = cache
        self._database = database
        self._executor = executor
        self._background = background
        self._rows = rows
        self._files = files
        self._snapshots = snapshots
        self._storage = storage
        self._images = images
        self._now = now
        self._adopting: dict[str, asyncio.Future[bool]] = {}
        self._not_before: dict[str, float] = {}

    async def put(self, template: Snapshot) -> None:
        """Share one that is ready. A failure is logged: this installation has it anyhow."""
        if self._cache is None:
            return
        try:
            images = {image.id for image in await self._images.list_images()}
            keep_disk = partial(self._storage.export_snapshot_disk, template.id)
            await self._cache.put(template, self._files.image(template.id), keep_disk, images)
        except (AtelierError, FileNotFoundError) as error:
            _logger.warning("the template %s is not shared: %s", template.name, error)

    async def adopt(
        self, key: str, host_id: str, image: Image, boot: BootFiles, stamp: MachineStamp, *, is_awaited: bool
    ) -> bool:
        """Have the cache's template of this key as this installation's, for machines with ``stamp``; whether there is a
        ready one now. ``is_awaited``: by somebody who could boot as well, so this takes no longer than that; what then
        is not through goes on without the caller."""
        if self._cache is None:
            return False
        work = self._adopting.get(key)
        if work is None:
            adopting = self._adopt(self._cache, key, host_id, image, boot, stamp)
            work = asyncio.ensure_future(self._background.unless_interrupted(adopting))
            self._adopting[key] = work
            work.add_done_callback(lambda _: self._adopting.pop(key))
        await asyncio.wait({work}, timeout=_PATIENCE_SECONDS if is_awaited else None)
        return work.done() and not work.cancelled() and work.result()

    async def _adopt(
        self, cache: TemplateCache, key: str, host_id: str, image: Image, boot: BootFiles, stamp: MachineStamp
    ) -> bool:
        now = asyncio.get_running_loop().time()
        if self._not_before.get(key, 0.0) > now:
            return False
        template = await asyncio.to_thread(cache.find, key)
        if template is None:
            return False
        if difference := template.machine.stamp.difference(stamp):
            await asyncio.to_thread(cache.remove, key, f"it does not fit this host's machines: {difference}")
            return False
        snapshot = await self._begin(cache, template, host_id, image, boot)
        if snapshot is None:
            return False
        try:
            settled = await self._snapshots.wait_settled(snapshot.id, None)
        except NotFoundError:
            return False
        assert settled is not None, "waited without limit"
        if settled.state is SnapshotState.READY:
            _logger.info("the template %s comes from the cache", snapshot.name)
            cache.note_use(key)
            self._background.spawn(self._snapshots.drop_superseded(settled), "drop superseded templates")
            return True
        if settled.failure_code in _DAMAGE:
            await asyncio.to_thread(cache.remove, key, settled.failure_message)
        else:
            self._not_before[key] = now + _AGAIN_AFTER_SECONDS
            _logger.warning("the template %s of the cache is not used: %s", key, settled.failure_message)
        try:
            await self._snapshots.delete(settled.id)
        except AtelierError as error:
            _logger.warning("something of a template stays for now: %s", error)
        return False

    async def _begin(
        self, cache: TemplateCache, template: CachedTemplate, host_id: str, image: Image, boot: BootFiles
    ) -> Snapshot | None:
        """None where one of this key is under way already."""
        now = self._now()
        snapshot = Snapshot(
            id=new_sandbox_id(),
            name=f"template-{new_id(8)}",
            host_id=host_id,
            state=SnapshotState.BAKING,
            purpose=SnapshotPurpose.TEMPLATE,
            sandbox_id=template.sandbox_id,
            sandbox_name=template.sandbox_name,
            image=template.image,
            image_id=template.image_id,
            vcpu_count=template.vcpu_count,
            memory_mib=template.memory_mib,
            disk_mib=template.disk_mib,
            file_system_mib=template.file_system_mib,
            machine=replace(template.machine, tools=boot.tools),
            created_at=now,
            updated_at=now,
            template_key=template.key,
        )
        saga_id = bake_saga_id(snapshot.id)
        inputs = {
            "entry": str(cache.entry(template.key)),
            "image": str(image.path),
            "tools": str(boot.tools),
            "checksums": template.checksums,
        }

        def insert(connection: Connection) -> bool:
            present = self._rows.repository.list_in(connection, _UNDER_WAY, [SnapshotPurpose.TEMPLATE])
            if any(each.template_key == template.key for each in present):
                return False
            self._rows.begin(connection, snapshot)
            self._executor.insert(connection, snapshot_adopt.KIND, saga_id, snapshot.id, inputs)
            return True

        if not await self._database.write(insert):
            return None
        self._executor.start(saga_id)
        return snapshot
