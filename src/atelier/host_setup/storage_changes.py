"""Where the sandboxes' disks are: a file that is a disk, for trials; a volume group; a thin pool in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from atelier.host.lvm import PROFILE
from atelier.host_setup.changes import KEPT, THERE, Look, Note, UndoOptions, foreign, missing
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record
from atelier.model.errors import HostError

_PROFILE_FILE = f"/etc/lvm/profile/{PROFILE}.profile"
_SPARE_BYTES = 1 << 30
"""What the file system that a loop file lies in keeps for others."""


@dataclass(frozen=True, slots=True)
class LoopFileChange:
    path: str
    size_gib: int

    kind: ClassVar[str] = "loop file"

    @property
    def key(self) -> str:
        return self.path

    async def look(self, host: Host, own: Record | None) -> Look:
        file = host.path(self.path)
        if not file.exists():
            room = shutil.disk_usage(_existing_parent(file)).free
            if room < self.size_gib * (1 << 30) + _SPARE_BYTES:
                return foreign(
                    f"{self.path} of {self.size_gib} GiB has no room: {room >> 30} GiB are free there",
                    "a smaller host.loop_size_gib, or another place: host.loop_file",
                )
            return missing(f"make {self.path}, a disk of {self.size_gib} GiB")
        if own is None:
            return foreign(
                f"{self.path} is there, and not of Atelier's making", f"look what it is, or: mv {self.path}{{,.before}}"
            )
        return THERE if await loop_device(host, self.path) else missing(f"attach {self.path}")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        note({"path": self.path})
        file = host.path(self.path)
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not file.exists() or file.stat().st_size != self.size_gib << 30:
            # One that was begun is nothing yet: the volume group comes after it.
            with file.open("ab") as opened:
                file.chmod(0o600)
                opened.truncate(self.size_gib << 30)
        if not await loop_device(host, self.path):
            await host.run("losetup", "--find", "--nooverlap", self.path)


async def undo_loop_file(host: Host, record: Record, options: UndoOptions) -> str:
    if not options.data:
        return f"{KEPT}{record['path']}"
    if device := await loop_device(host, record["path"]):
        await host.run("losetup", "--detach", device)
    host.path(record["path"]).unlink(missing_ok=True)
    return ""


async def loop_device(host: Host, path: str) -> str:
    """Empty: it is attached to none."""
    listed = await host.ask("losetup", "--noheadings", "--output", "NAME", "--associated", path)
    return (listed or "").split()[0] if (listed or "").split() else ""


@dataclass(frozen=True, slots=True)
class VolumeGroupChange:
    """``device``: a disk or partition, or the file that is one; empty: somebody has made the group already."""

    name: str
    device: str = ""
    is_loop: bool = False

    kind: ClassVar[str] = "volume group"

    @property
    def key(self) -> str:
        return self.name

    async def look(self, host: Host, own: Record | None) -> Look:
        groups = await host.ask("vgs", "--noheadings", "--options", "vg_name")
        if self.name in (groups or "").split():
            if own is None and self.device:
                return foreign(
                    f"there is a volume group {self.name} already, not of Atelier's making",
                    "leave out host.storage_device and host.loop_file to use it as it is, or choose another name: "
                    "storage.volume_group",
                )
            return THERE
        if self.is_loop:
            return missing(f"make the volume group {self.name} in {self.device}")
        if not self.device:
            if groups is None and await host.ask("vgs", "--version") is None:
                return missing(f"look for the volume group {self.name}, when lvm2 is installed")
            return foreign(
                f"this host has no volume group {self.name}",
                f"make one: vgcreate {self.name} /dev/<an empty disk>; or say host.storage_device, or host.loop_file",
            )
        return await self._look_at_device(host)

    async def _look_at_device(self, host: Host) -> Look:
        if not host.is_block_device(Path(self.device)):
            return foreign(f"{self.device} is no disk", "lsblk lists them")
        used = await host.ask("lsblk", "--noheadings", "--list", "--output", "NAME,FSTYPE,MOUNTPOINTS", self.device)
        rows = [line.split() for line in (used or "").splitlines() if line.strip()]
        signatures = (await host.ask("wipefs", "--no-act", "--parsable", self.device) or "").splitlines()
        if len(rows) > 1 or any(len(row) > 1 for row in rows) or any(not line.startswith("#") for line in signatures):
            holds = "; ".join(" ".join(row) for row in rows) or "signatures of a file system"
            return foreign(
                f"{self.device} is not empty ({holds})",
                f"look what is on it: lsblk -f {self.device}; choose another; or, if all of it may be lost: wipefs --all {self.device}",
            )
        return missing(f"make the volume group {self.name} on {self.device}, all of it")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        device = await loop_device(host, self.device) if self.is_loop else self.device
        if not device:
            raise HostError(
                f"the volume group {self.name} cannot be made: {self.device or 'its disk'} is not there",
                code="volume_group_missing",
                hint="atelier host storage",
            )
        note({"name": self.name, "device": device, "loop_file": self.device if self.is_loop else ""})
        await host.run("vgcreate", "--quiet", self.name, device)


async def undo_volume_group(host: Host, record: Record, options: UndoOptions) -> str:
    name: str = record["name"]
    if not options.data:
        return f"{KEPT}the volume group {name}"
    volumes = await host.ask("lvs", "--noheadings", "--options", "lv_name", name)
    if volumes is not None:
        if volumes.split():
            return f"{KEPT}the volume group {name}: others have volumes in it: {', '.join(volumes.split())}"
        await host.run("vgremove", "--quiet", name)
    device = await loop_device(host, record["loop_file"]) if record["loop_file"] else record["device"]
    if device and await host.ask("pvs", "--noheadings", "--options", "pv_name", device) is not None:
        await host.run("pvremove", "--quiet", device)
    return ""


@dataclass(frozen=True, slots=True)
class ThinPoolChange:
    """One that is there is used as it is, and stays when Atelier goes."""

    group: str
    name: str

    kind: ClassVar[str] = "thin pool"

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    async def look(self, host: Host, own: Record | None) -> Look:
        listed = await host.ask("lvs", "--noheadings", "--options", "lv_name,lv_attr", self.group)
        for line in (listed or "").splitlines():
            words = line.split()
            if words and words[0] == self.name:
                if not words[1].startswith("t"):
                    return foreign(f"{self.key} is there, and no thin pool", "choose another name: storage.thin_pool")
                return THERE
        return missing(f"make the thin pool {self.key}")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        has_profile = host.path(_PROFILE_FILE).exists() and not (own and own["profile"])
        note({"group": self.group, "name": self.name, "profile": "" if has_profile else _PROFILE_FILE})
        await host.ensure_thin_pool(self.group, self.name)


async def undo_thin_pool(host: Host, record: Record, options: UndoOptions) -> str:
    group, name = record["group"], record["name"]
    if not options.data:
        return f"{KEPT}the thin pool {group}/{name}"
    listed = await host.ask("lvs", "--noheadings", "--options", "lv_name,pool_lv", group) or ""
    rows = [line.split() for line in listed.splitlines() if line.strip()]
    within = [row[0] for row in rows if row[1:] == [name]]
    if others := [each for each in within if not each.startswith("at-")]:
        return f"{KEPT}the thin pool {group}/{name}: others have volumes in it: {', '.join(others)}"
    if any(row[0] == name for row in rows):
        # Its volumes go with it.
        await host.run("lvremove", "--quiet", "--yes", f"{group}/{name}")
    if record["profile"]:
        host.path(record["profile"]).unlink(missing_ok=True)
    return ""


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())
