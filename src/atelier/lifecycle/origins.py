"""What a new sandbox begins from: the snapshot that was asked for, a template that fits, or its image, which boots.

Used by the first step of creates. A template only saves time: where none fits, or the one that does is damaged, the image
is booted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from atelier.db.engine import Database
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.saga_values import boot_files_to_json, restore_to_json
from atelier.lifecycle.snapshot_checks import SnapshotChecks
from atelier.lifecycle.snapshot_files import damaged
from atelier.model.errors import AtelierError
from atelier.model.image import BuildProgress, Image
from atelier.model.machine import BootFiles, Disk, MachineStamp
from atelier.model.sandbox import DEFAULT_DISK_MIB, Sandbox, SandboxPurpose
from atelier.model.snapshot import Snapshot

_logger = logging.getLogger(__name__)

_TEMPLATE_FORMAT = 2
"""To be raised when a fresh guest comes out otherwise without a change of its files: another kernel argument, say."""


class AdoptTemplate(Protocol):
    """``SharedTemplates.adopt``."""

    async def __call__(
        self, key: str, host_id: str, image: Image, boot: BootFiles, stamp: MachineStamp, *, is_awaited: bool
    ) -> bool: ...


@dataclass(frozen=True, slots=True)
class Origins:
    """``uses_templates``: False boots every sandbox that no snapshot was asked for."""

    database: Database
    images: ImageDriver
    storage: StorageDriver
    network: NetworkDriver
    vmm: VmmDriver
    checks: SnapshotChecks
    adopt: AdoptTemplate
    uses_templates: bool

    async def find(self, sandbox: Sandbox, report: Callable[[BuildProgress], None]) -> dict[str, Any]:
        """The output of the step ``image``, as ``SandboxSteps`` reads it.

        Raises NotFoundError, ConflictError (``snapshot_not_ready``, ``snapshot_incompatible``), HostError
        (``snapshot_damaged``), and what the image driver raises.
        """
        boot = await self.images.ensure_boot_files(report)
        if sandbox.snapshot_id is not None:
            with self.database.read() as connection:
                snapshot = self.checks.rows.repository.get(connection, sandbox.snapshot_id)
            if sandbox.disk_only:
                await self.checks.check_whole(snapshot)
                return await self._from_disk(snapshot, sandbox, boot)
            await self.checks.check_usable(snapshot, boot)
            return await self._from_snapshot(snapshot, boot)
        image = await self.images.ensure_image(sandbox.spec.image, report)
        if (template := await self._find_fitting(sandbox, image, boot)) is not None:
            return await self._from_snapshot(template, boot)
        return {
            "image_id": image.id,
            "path": str(image.path),
            "format": "raw",
            "size_mib": image.size_mib,
            "disk_mib": sandbox.spec.disk_mib,
            "boot": boot_files_to_json(boot),
        }

    async def check_fits(self, snapshot: Snapshot) -> None:
        """That a machine of this host could be restored from it, before a sandbox is begun that would fail.

        Raises ConflictError (``snapshot_not_ready``, ``snapshot_incompatible``), and what the image driver raises.
        """
        await self.checks.check_fits(snapshot, await self.images.ensure_boot_files(lambda _: None))

    async def template_key(self, sandbox: Sandbox, image: Image, boot: BootFiles) -> str:
        """What a template must have in common with the machines that are restored from it."""
        stamp = (await self.vmm.stamp(boot, self.network.attachment_kind)).to_json()
        # Measured anew at each boot of the host, and compared with some tolerance when it counts.
        del stamp["tsc_khz"]
        parts = {
            "format": _TEMPLATE_FORMAT,
            "image": image.id,
            "tools": boot.tools_id,
            "kernel": boot.kernel.name,
            "initramfs": boot.initramfs.name,
            "vcpu_count": sandbox.spec.vcpu_count,
            "memory_mib": sandbox.spec.memory_mib,
            "disk_mib": template_disk_mib(image),
            "stamp": stamp,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    async def _find_fitting(self, sandbox: Sandbox, image: Image, boot: BootFiles) -> Snapshot | None:
        if not self.uses_templates or sandbox.spec.disk_mib < template_disk_mib(image):
            return None
        if sandbox.purpose is SandboxPurpose.TEMPLATE:
            return None  # it is to be one itself: a guest that booted
        key = await self.template_key(sandbox, image, boot)
        return await self.find_template(key, sandbox, image, boot, is_awaited=True)

    async def find_template(
        self, key: str, sandbox: Sandbox, image: Image, boot: BootFiles, *, is_awaited: bool
    ) -> Snapshot | None:
        """For sandboxes like this one: this installation's, else the one that all share, if that would do.
        ``is_awaited``: by a create, which would rather boot than wait for long."""
        if (template := await self._find_usable(key, boot)) is not None:
            return template
        stamp = await self.vmm.stamp(boot, self.network.attachment_kind)
        if not await self.adopt(key, sandbox.host_id, image, boot, stamp, is_awaited=is_awaited):
            return None
        return await self._find_usable(key, boot)

    async def _find_usable(self, key: str, boot: BootFiles) -> Snapshot | None:
        """None where there is none, or the one that there is would not do."""
        with self.database.read() as connection:
            template = self.checks.rows.repository.find_template(connection, key)
        if template is None:
            return None
        try:
            await self.checks.check_usable(template, boot)
        except AtelierError as error:
            _logger.warning("the template %s is not used: %s", template.name, error)
            return None
        return template

    async def _from_snapshot(self, snapshot: Snapshot, boot: BootFiles) -> dict[str, Any]:
        disk = await self._find_disk(snapshot)
        machine = snapshot.machine
        boot = replace(
            boot,
            tools=self.checks.files.tools(snapshot.id),
            tools_id=machine.tools_id,
            kernel_release=machine.kernel_release,
        )
        return {
            "image_id": snapshot.image_id,
            "path": str(disk.top.path),
            "format": disk.top.format,
            "size_mib": snapshot.file_system_mib,
            "disk_mib": snapshot.disk_mib,
            "boot": boot_files_to_json(boot),
            "restore": restore_to_json(self.checks.files.image(snapshot.id)),
        }

    async def _from_disk(self, snapshot: Snapshot, sandbox: Sandbox, boot: BootFiles) -> dict[str, Any]:
        """A machine of today's make, which boots; its disk has its size from the beginning on."""
        disk = await self._find_disk(snapshot)
        return {
            "image_id": snapshot.image_id,
            "path": str(disk.top.path),
            "format": disk.top.format,
            "size_mib": snapshot.file_system_mib,
            "disk_mib": sandbox.spec.disk_mib,
            "boot": boot_files_to_json(boot),
        }

    async def _find_disk(self, snapshot: Snapshot) -> Disk:
        disk = await self.storage.find_snapshot_disk(snapshot.id)
        if disk is None:
            raise damaged(self.checks.files.image(snapshot.id).memory.parent, "its disk is gone")
        return disk


def template_disk_mib(image: Image) -> int:
    """How large a template's disk is: the usual one, whose file system is then grown already."""
    return max(DEFAULT_DISK_MIB, image.size_mib)
