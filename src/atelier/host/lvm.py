"""Thin logical volumes of one pool, by LVM's own programs. Needs root.

Called by the root side of the storage driver (``host_setup.storage_verbs``) and by ``atelier host``. Names come in
checked. LVM warns on stderr about thin pools that promise more than they have, and succeeds all the same: what counts is
the exit status. Source: lvmthin(7), lvmreport(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from atelier.host import command
from atelier.model.errors import CommandError, DiskFullError, HostError

_SECONDS = 300.0
_PACKAGE = "lvm2"
_FIELDS = "lv_name,lv_size,lv_attr,lv_tags,origin,pool_lv,data_percent,metadata_percent,lv_profile"
PROFILE = "atelier"
"""Name of the LVM profile by which a pool of ours is extended before it is full."""


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """``used_bytes``: what is mapped in the pool, shared with others or not, to within half of ``grain_bytes``."""

    name: str
    size_bytes: int
    tags: tuple[str, ...]
    origin: str
    used_bytes: int

    @property
    def grain_bytes(self) -> int:
        """LVM tells hundredths of a percent."""
        return self.size_bytes // 10_000


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Fractions are of what the pool has now; ``extensible_bytes``: what LVM will still give to it by itself."""

    size_bytes: int
    data_used: float
    metadata_used: float
    extensible_bytes: int


class ThinPool:
    """``group`` and ``pool`` as LVM knows them. Whoever holds the file ``lock`` (a descriptor) holds it until the last command
    has ended: each has it as its standard input, the one descriptor above which LVM closes what it did not open."""

    def __init__(self, group: str, pool: str, *, lock: int | None = None) -> None:
        self._group = group
        self._pool = pool
        self._lock = asyncio.subprocess.DEVNULL if lock is None else lock

    @property
    def remedy(self) -> str:
        """What a person does about a pool that is full."""
        pool = f"{self._group}/{self._pool}"
        return (
            f"destroy sandboxes or snapshots, or enlarge the pool: lvextend -L +10G {pool} (data), "
            f"lvextend --poolmetadatasize +64M {pool} (metadata); vgextend {self._group} brings another disk"
        )

    def device(self, name: str) -> Path:
        return Path("/dev") / self._group / name

    async def look(self) -> tuple[PoolUsage, dict[str, LogicalVolume]]:
        """The pool, and its thin volumes by name.

        Raises HostError (``volume_group_missing``, ``thin_pool_missing``, ``thin_pool_not_zeroing``).
        """
        rows = await self._report("lvs", f"{_FIELDS},vg_free")
        pool = self._pool_row(rows)
        usage = PoolUsage(
            size_bytes=int(pool["lv_size"]),
            data_used=_fraction(pool["data_percent"]),
            metadata_used=_fraction(pool["metadata_percent"]),
            extensible_bytes=int(pool["vg_free"]) if pool["lv_profile"] == PROFILE else 0,
        )
        return usage, {row["lv_name"]: _volume(row) for row in rows if row["pool_lv"] == self._pool}

    async def create(self, name: str, size_bytes: int) -> None:
        """An empty thin volume."""
        await self._run("lvcreate", "-V", f"{size_bytes}b", "-T", f"{self._group}/{self._pool}", "-n", name)

    async def snapshot(self, name: str, origin: str, *, read_only: bool, tags: Sequence[str]) -> None:
        """A thin snapshot, active on return: with ``-kn``. LVM marks thin snapshots to be skipped at activation unless
        told otherwise, and then there is no device, now or after a reboot."""
        tagging = [word for tag in tags for word in ("--addtag", tag)]
        permission = "r" if read_only else "rw"
        options = ["-s", "-kn", "-ay", "-p", permission, *tagging]
        await self._run("lvcreate", *options, "-n", name, f"{self._group}/{origin}")

    async def extend(self, name: str, size_bytes: int) -> None:
        """To at least this size, rounded up to the group's extents."""
        await self._run("lvextend", "-L", f"{size_bytes}b", f"{self._group}/{name}")

    async def rename(self, name: str, new_name: str) -> None:
        await self._run("lvrename", self._group, name, new_name)

    async def make_read_only(self, name: str) -> None:
        await self._run("lvchange", "-p", "r", f"{self._group}/{name}")

    async def set_tags(self, name: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        changes = [*(f"--addtag={tag}" for tag in add), *(f"--deltag={tag}" for tag in remove)]
        if changes:
            await self._run("lvchange", *changes, f"{self._group}/{name}")

    async def activate(self, name: str) -> None:
        """Have its device node, whatever flags it bears. Raises CommandError."""
        await self._run("lvchange", "-ay", "-K", f"{self._group}/{name}")

    async def remove(self, name: str) -> None:
        """Raises HostError (``volume_in_use``) while a process has it open."""
        try:
            await self._run("lvremove", "-y", f"{self._group}/{name}")
        except CommandError as error:
            if "in use" in error.message or "used by another device" in error.message:
                raise HostError(
                    f"the logical volume {self._group}/{name} is in use",
                    code="volume_in_use",
                    hint=f"end what has it open: lsblk {self.device(name)}; fuser -v {self.device(name)}",
                ) from error
            raise

    def _pool_row(self, rows: list[dict[str, str]]) -> dict[str, str]:
        for row in rows:
            if row["lv_name"] == self._pool:
                # Source: lvs(8): the first character of lv_attr is t for a thin pool, the eighth z if it zeroes blocks.
                if not row["lv_attr"].startswith("t"):
                    break
                if row["lv_attr"][7:8] != "z":
                    raise HostError(
                        f"the thin pool {self._group}/{self._pool} hands out blocks with what was in them before",
                        code="thin_pool_not_zeroing",
                        hint=f"lvchange -Zy {self._group}/{self._pool}",
                    )
                return row
        raise HostError(
            f"the volume group {self._group} has no thin pool {self._pool}",
            code="thin_pool_missing",
            hint=f"make one: atelier host storage, or lvcreate --type thin-pool -Zy -l 90%FREE -n {self._pool} {self._group}",
        )

    async def _run(self, *arguments: str) -> None:
        try:
            await self._command(*arguments, "--quiet")
        except CommandError as error:
            if any(words in error.message for words in ("free space", "reached threshold", "out of data space")):
                raise DiskFullError(
                    f"the thin pool {self._group}/{self._pool} has no room: {error.message}",
                    code="pool_full",
                    hint=self.remedy,
                ) from error
            raise

    async def _report(self, program: str, fields: str) -> list[dict[str, str]]:
        options = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
        try:
            done = await self._command(program, *options, self._group)
        except CommandError as error:
            if "not found" in error.message:
                raise HostError(
                    f"this host has no volume group {self._group}",
                    code="volume_group_missing",
                    hint=f"see vgs; make one: atelier host storage, or vgcreate {self._group} /dev/<an empty disk>",
                ) from error
            raise
        try:
            told = json.loads(done.stdout)
            return cast("list[dict[str, str]]", next(iter(told["report"][0].values())))
        except (ValueError, KeyError, IndexError, StopIteration) as error:
            raise HostError(f"{program} answered with what is no report: {done.stdout[:200]!r}") from error

    async def _command(self, *words: str) -> command.CommandResult:
        return await command.run(words, standard_input=self._lock, timeout_seconds=_SECONDS, package_hint=_PACKAGE)


def _volume(row: dict[str, str]) -> LogicalVolume:
    size = int(row["lv_size"])
    return LogicalVolume(
        name=row["lv_name"],
        size_bytes=size,
        tags=tuple(filter(None, row["lv_tags"].split(","))),
        origin=row["origin"],
        used_bytes=round(size * _fraction(row["data_percent"])),
    )


def _fraction(percent: str) -> float:
    """LVM leaves it empty for what is not active."""
    with contextlib.suppress(ValueError):
        return float(percent) / 100
    return 0.0
