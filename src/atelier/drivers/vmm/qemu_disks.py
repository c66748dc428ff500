"""The disks of a running QEMU: found by their serial, and put under a fresh overlay while the guest writes to them.

Called by the QEMU driver. A block node bears a name made of its file's inode, so a machine tells which file it writes to
whatever that is called by then. Source: QEMU qapi/block-core.json (query-block, blockdev-snapshot).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import cast

from atelier.drivers.vmm.qemu_arguments import OpenDisk, overlay_options
from atelier.drivers.vmm.qmp import JsonObject, QmpConnection
from atelier.drivers.vmm.run_folder import opened
from atelier.model.errors import VmmError
from atelier.model.machine import Disk, DiskFile
from atelier.model.machine_limits import DiskRate

_DEVICE_NODE = "device-"


def open_disk(disk: Disk, stack: contextlib.ExitStack) -> OpenDisk:
    """Its files, open until the stack ends; all but a writable disk's top for reading only. Raises VmmError."""
    top = stack.enter_context(opened(disk.top.path, os.O_RDONLY if disk.read_only else os.O_RDWR))
    backing = [stack.enter_context(opened(file.path)) for file in disk.backing]
    found = os.fstat(top)
    return OpenDisk(disk, (top, *backing), _node_name(disk.serial, found), is_device=stat.S_ISBLK(found.st_mode))


async def find_disk(control: QmpConnection, serial: str) -> tuple[str, int]:
    """Block node and size in bytes of the disk with this serial. Raises VmmError if there is none."""
    _, node = await _find_device(control, serial)
    name, size_bytes = node.get("node-name"), _object(node.get("image")).get("virtual-size")
    if isinstance(name, str) and isinstance(size_bytes, int):
        return name, size_bytes
    raise VmmError(f"QEMU does not say how large the disk {serial} is")


def is_device(node: str) -> bool:
    """Whether the block node is a device of the host's, which QEMU cannot grow."""
    return node.startswith(_DEVICE_NODE)


async def limit_disk(control: QmpConnection, serial: str, rate: DiskRate) -> None:
    """Source: QEMU qapi/block.json (block_set_io_throttle): 0 is no limit, and total excludes what is of one direction."""
    path, _ = await _find_device(control, serial)
    total = {"bps": rate.bytes_per_second or 0, "iops": rate.operations_per_second or 0}
    apart: JsonObject = {"bps_rd": 0, "bps_wr": 0, "iops_rd": 0, "iops_wr": 0}
    await control.execute("block_set_io_throttle", {"id": path, **total, **apart})


async def _find_device(control: QmpConnection, serial: str) -> tuple[str, JsonObject]:
    """The device's path in QEMU's object tree, and what is inserted in it. Raises VmmError if there is none."""
    for device in _objects(await control.execute("query-block")):
        path = device.get("qdev")
        if not isinstance(path, str):
            continue
        if await control.execute("qom-get", {"path": path, "property": "serial"}) == serial:
            return path, _object(device.get("inserted"))
    raise VmmError(f"the machine has no disk {serial}")


async def writes_to(control: QmpConnection, serial: str, file: DiskFile) -> bool:
    """Whether the file is this disk's top. Raises VmmError."""
    try:
        found = file.path.stat()
    except FileNotFoundError:
        return False
    return (await find_disk(control, serial))[0] == _node_name(serial, found)


class DiskSwitch:
    """Lets the guest's writes to one disk go to ``top``, an empty qcow2 file over the disk's present top. All but the change
    itself is made ready before, since the machine stands still for that."""

    def __init__(self, serial: str, top: DiskFile) -> None:
        self._serial = serial
        self._top = top
        self._present = self._node = ""
        self._set_id: object = None
        self._is_due = False

    async def prepare(self, control: QmpConnection) -> None:
        """Raises VmmError; nothing is left then."""
        self._present, _ = await find_disk(control, self._serial)
        with opened(self._top.path, os.O_RDWR) as descriptor:
            self._node = _node_name(self._serial, os.fstat(descriptor))
            if self._present == self._node:
                return
            if self._top.format != "qcow2":
                raise VmmError(f"a {self._top.format} file cannot stand over a disk")
            # A manager that died halfway may have left them.
            await _forget_nodes(control, self._node)
            added = _object(await control.execute("add-fd", {}, descriptors=[descriptor]))
            self._set_id = added.get("fdset-id")
        self._is_due = True
        try:
            for options in overlay_options(self._node, f"/dev/fdset/{self._set_id}"):
                await control.execute("blockdev-add", options)
        except VmmError:
            await self.forget(control)
            raise

    async def carry_out(self, control: QmpConnection) -> None:
        """Nothing if it took place. Raises VmmError."""
        if self._is_due:
            await control.execute("blockdev-snapshot", {"node": self._present, "overlay": self._node})
            self._is_due = False

    async def forget(self, control: QmpConnection) -> None:
        """Of what was made ready and not carried out nothing stays."""
        if self._is_due:
            self._is_due = False
            await _forget_nodes(control, self._node)
            with contextlib.suppress(VmmError):
                await control.execute("remove-fd", {"fdset-id": self._set_id})


async def _forget_nodes(control: QmpConnection, node: str) -> None:
    for name in (node, f"{node}-file"):
        with contextlib.suppress(VmmError):
            await control.execute("blockdev-del", {"node-name": name})


def _node_name(serial: str, found: os.stat_result) -> str:
    """At most 23 characters, since QEMU takes 31 and its file's node and those below it bear endings. A device is known by
    its number, however often the node that leads to it is made anew."""
    if stat.S_ISBLK(found.st_mode):
        return _DEVICE_NODE + _digest(f"{serial} {found.st_rdev}")
    return "disk-" + _digest(f"{serial} {found.st_dev} {found.st_ino}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _objects(value: object) -> Iterator[JsonObject]:
    for item in cast("list[object]", value) if isinstance(value, list) else []:
        yield _object(item)


def _object(value: object) -> JsonObject:
    return cast("JsonObject", value) if isinstance(value, dict) else {}
