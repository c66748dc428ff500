"""Volumes as thin logical volumes: each a snapshot of its base, made in no time, that shares what neither has rewritten.

Used by the lifecycle on a production host. All that touches LVM is done by root's side (``privileges``); what is used
here are device nodes of this user's own. A disk has no files below it: freezing a volume makes a snapshot beside it, the
machine writes on to what it always wrote to, and whatever goes takes nothing from the others.

Nothing new is made in a pool that is nearly full, and from ``ALARM`` on the log says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from atelier.host.block_devices import checksum_of_disk, read_device, write_device
from atelier.host.disk_files import missing_disk_file
from atelier.host.files import disk_full_as_error
from atelier.host.sparse_files import write_sparsely
from atelier.host.threads import run_in_thread
from atelier.model.errors import ConflictError, HostError, InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id, is_snapshot_id
from atelier.model.lvm_names import LvmKind
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, SnapshotDisk, VolumeRequest

ALARM = 0.80
"""Of data or metadata; LVM extends a pool of ours from there on, as long as its group has room."""
_USABLE = 0.95
"""Of a pool's data: root's side makes nothing new above it."""
_MIB = 1024 * 1024

_logger = logging.getLogger(__name__)


class StoragePrivileges(Protocol):
    """Root's side: ``host.privilege.Privileges`` for the group ``storage``."""

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Volume:
    """As root's side tells it. ``own_bytes``: what it has mapped beyond what it was made from. ``freezing``: snapshots that
    it is being frozen for; ``checksum``: of a snapshot's disk, empty until it is made; ``whole``: it has its size;
    ``base_id``: of the base that it was made from, as long as there is one."""

    size_bytes: int
    used_bytes: int
    own_bytes: int
    freezing: tuple[str, ...]
    checksum: str
    path: Path
    whole: bool
    base_id: str


_Volumes = dict[tuple[LvmKind, str], _Volume]
"""By kind and id."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """``data_used``, ``metadata_used``: fractions. ``free_bytes``: what new blocks can still take."""

    size_bytes: int
    data_used: float
    metadata_used: float
    free_bytes: int


class LvmThinStorage:
    """Works with one call at a time on a volume, as every storage driver does."""

    def __init__(self, privileges: StoragePrivileges) -> None:
        self._privileges = privileges
        self._bases = asyncio.Lock()
        self._alarmed = False

    @property
    def name(self) -> str:
        return "lvm-thin"

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        sandbox_id = _check_sandbox(request.sandbox_id)
        # Held until it is made: a base that nothing is made from may go.
        async with self._bases:
            volumes = await self._volumes()
            if present := volumes.get((LvmKind.VOLUME, sandbox_id)):
                return await self._present(sandbox_id, present)
            kind, source_id, base_bytes = await self._ensure_source(request.base, volumes)
            size_bytes = request.size_mib * _MIB
            if size_bytes < base_bytes:
                needed = -(-base_bytes // _MIB)
                raise InvalidRequestError(
                    f"a disk of {request.size_mib} MiB is too small for the image, which needs {needed} MiB",
                    code="disk_too_small",
                    hint=f"ask for a disk of at least {needed} MiB",
                )
            made = await self._privileges.ask(
                "create_volume", id=sandbox_id, source_kind=kind, source_id=source_id, size_bytes=size_bytes
            )
        return _disk(Path(made["path"]))

    async def _ensure_source(self, base: DiskFile, volumes: _Volumes) -> tuple[LvmKind, str, int]:
        """What a volume over ``base`` is a snapshot of, and how large that is."""
        for (kind, found_id), volume in volumes.items():
            if kind is LvmKind.SNAPSHOT and volume.path == base.path:
                return kind, found_id, volume.size_bytes
        if base.format != "raw":
            raise HostError(f"{base.path} is no raw image", code="disk_format_unsupported")
        # The file's name tells its content; an image is never rewritten.
        base_id = hashlib.sha256(base.path.name.encode()).hexdigest()[:16]
        if present := volumes.get((LvmKind.BASE, base_id)):
            return LvmKind.BASE, base_id, present.size_bytes
        try:
            size_bytes = base.path.stat().st_size
        except FileNotFoundError as error:
            raise missing_disk_file(base.path) from error
        made = await self._privileges.ask("create_base", id=base_id, size_bytes=size_bytes)
        await self._fill(Path(made["path"]), base.path)
        await self._privileges.ask("finish_base", id=base_id)
        needed = {volume.base_id for volume in volumes.values()}
        for kind, found_id in volumes:
            # Of an image of before, which nothing was made from that is still there.
            if kind is LvmKind.BASE and found_id not in needed:
                await self._privileges.ask("remove", kind=kind, id=found_id)
        return LvmKind.BASE, base_id, size_bytes

    async def _fill(self, device: Path, source: Path) -> None:
        with disk_full_as_error(f"writing {source} to {device}"):
            await run_in_thread(lambda given_up: write_device(source, device, given_up=given_up))

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        found = (await self._volumes()).get((LvmKind.VOLUME, _check_sandbox(sandbox_id)))
        return await self._present(sandbox_id, found) if found else None

    async def _present(self, sandbox_id: str, found: _Volume) -> Disk:
        if not found.whole:
            # Its making, or its growing, was broken off.
            await self._privileges.ask("grow", id=sandbox_id, size_bytes=found.size_bytes)
        exposed = await self._privileges.ask("expose", kind=LvmKind.VOLUME, id=sandbox_id)
        return _disk(Path(exposed["path"]))

    @property
    def grows_open_volumes(self) -> bool:
        return True

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        volume = await self._volume(sandbox_id)
        _check_none_under_way(sandbox_id, volume)
        size_bytes = size_mib * _MIB
        if size_bytes < volume.size_bytes:
            raise InvalidRequestError(
                f"the disk has {volume.size_bytes // _MIB} MiB and cannot shrink to {size_mib} MiB",
                code="disk_cannot_shrink",
                hint="a disk only grows",
            )
        await self._privileges.ask("grow", id=sandbox_id, size_bytes=size_bytes)

    async def shorten_volume(self, sandbox_id: str) -> None:
        """It consists of one volume always."""
        _check_none_under_way(sandbox_id, await self._volume(sandbox_id))

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        await self._privileges.ask("remove", kind=LvmKind.VOLUME, id=_check_sandbox(sandbox_id))

    async def list_volumes(self) -> list[str]:
        return sorted(found for kind, found in await self._volumes() if kind is LvmKind.VOLUME)

    async def used_bytes(self, sandbox_id: str) -> int:
        found = (await self._volumes()).get((LvmKind.VOLUME, _check_sandbox(sandbox_id)))
        # Blocks of the base that were overwritten count as the base's: too little rather than too much.
        return found.own_bytes if found else 0

    async def free_bytes(self) -> int:
        return (await self.pool_state()).free_bytes

    async def pool_state(self) -> PoolState:
        """How full the pool is, which every sandbox of the host shares; told to the log when it becomes too full."""
        pool = (await self._privileges.ask("look"))["pool"]
        return self._pool_state(pool)

    def _pool_state(self, pool: Mapping[str, Any]) -> PoolState:
        size, extensible = int(pool["size_bytes"]), int(pool["extensible_bytes"])
        data_used, metadata_used = float(pool["data_used"]), float(pool["metadata_used"])
        free = max(0, int(size * (_USABLE - data_used))) + extensible
        state = PoolState(size, data_used, metadata_used, free)
        alarming = max(data_used, metadata_used) >= ALARM
        if alarming and not self._alarmed:
            _logger.error(
                "the thin pool is filling up: %.0f%% of its data and %.0f%% of its metadata are used; when it is full, no "
                "sandbox can write: destroy some, or enlarge the pool (atelier host storage)",
                *(100 * data_used, 100 * metadata_used),
            )
        self._alarmed = alarming
        return state

    async def begin_layer(self, sandbox_id: str, snapshot_id: str) -> DiskFile:
        _check_snapshot(snapshot_id)
        volume = await self._volume(sandbox_id)
        if snapshot_id not in volume.freezing:
            _check_none_under_way(sandbox_id, volume)
            await self._privileges.ask("begin_freezing", id=sandbox_id, snapshot_id=snapshot_id)
        exposed = await self._privileges.ask("expose", kind=LvmKind.VOLUME, id=sandbox_id)
        return DiskFile(Path(exposed["path"]), "raw")

    async def freeze_layer(self, sandbox_id: str, snapshot_id: str) -> None:
        _check_snapshot(snapshot_id)
        await self._privileges.ask("freeze", id=_check_sandbox(sandbox_id), snapshot_id=snapshot_id)

    async def end_layer(self, sandbox_id: str, snapshot_id: str, *, switched: bool) -> None:
        _check_snapshot(snapshot_id)
        found = (await self._volumes()).get((LvmKind.VOLUME, _check_sandbox(sandbox_id)))
        if found is None or snapshot_id not in found.freezing:
            return
        if switched:
            # Where it was not yet: no machine lives that could write to it, or nobody will use what is frozen.
            await self._privileges.ask("freeze", id=sandbox_id, snapshot_id=snapshot_id)
        await self._privileges.ask("end_freezing", id=sandbox_id, snapshot_id=snapshot_id, keep=switched)

    async def ensure_snapshot_disk(self, snapshot_id: str, sandbox_id: str) -> SnapshotDisk:
        _check_sandbox(sandbox_id)
        volumes = await self._volumes()
        volume = volumes.get((LvmKind.VOLUME, sandbox_id))
        if volume is not None and _check_snapshot(snapshot_id) in volume.freezing:
            _check_none_under_way(sandbox_id, volume)
        frozen = volumes.get((LvmKind.SNAPSHOT, _check_snapshot(snapshot_id)))
        if frozen is None:
            raise NotFoundError(f"no volume was frozen for snapshot {snapshot_id}", code="layer_not_found")
        if not frozen.checksum:
            disk = await self._expose_snapshot(snapshot_id)
            checksum = await self._checksum(disk.top.path, frozen.size_bytes)
            await self._privileges.ask("set_checksum", id=snapshot_id, checksum=checksum)
        return await self._snapshot_disk(snapshot_id)

    async def find_snapshot_disk(self, snapshot_id: str) -> Disk | None:
        found = await self._find_snapshot(snapshot_id)
        return await self._expose_snapshot(snapshot_id) if found else None

    async def verify_snapshot_disk(self, snapshot_id: str) -> None:
        found = await self._made_snapshot(snapshot_id)
        disk = await self._expose_snapshot(snapshot_id)
        if await self._checksum(disk.top.path, found.size_bytes) != found.checksum:
            raise HostError(
                f"the disk of snapshot {snapshot_id} is not what it was when it was made",
                code="disk_file_damaged",
                hint="delete the snapshot and take another; check the host's disk",
            )

    async def export_snapshot_disk(self, snapshot_id: str, target: Path) -> str:
        """A raw file with holes, whatever image or snapshot the disk was made from."""
        found = await self._made_snapshot(snapshot_id)
        disk = await self._expose_snapshot(snapshot_id)
        unfinished = target.with_name(f"{target.name}.new")
        try:
            with disk_full_as_error(f"writing {target}"):
                await run_in_thread(
                    lambda given_up: _write_file(
                        unfinished, partial(read_device, disk.top.path, found.size_bytes, given_up=given_up)
                    )
                )
                unfinished.rename(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return found.checksum

    async def import_snapshot_disk(self, snapshot_id: str, source: Path, base: DiskFile, checksum: str) -> SnapshotDisk:
        """``base`` needs not be there: an exported disk stands over nothing."""
        if await self._find_snapshot(snapshot_id) is None:
            try:
                size_bytes = source.stat().st_size
            except FileNotFoundError as error:
                raise missing_disk_file(source) from error
            if not size_bytes or await self._checksum(source, size_bytes) != checksum:
                raise HostError(f"{source} is not what was written there", code="disk_file_damaged")
            made = await self._privileges.ask("create_import", id=snapshot_id, size_bytes=size_bytes)
            await self._fill(Path(made["path"]), source)
            await self._privileges.ask("finish_import", id=snapshot_id, checksum=checksum)
        return await self._snapshot_disk(snapshot_id)

    async def ensure_snapshot_disk_absent(self, snapshot_id: str) -> None:
        for (kind, sandbox_id), volume in (await self._volumes()).items():
            if kind is LvmKind.VOLUME and _check_snapshot(snapshot_id) in volume.freezing:
                await self._privileges.ask("end_freezing", id=sandbox_id, snapshot_id=snapshot_id, keep=False)
        for kind in (LvmKind.SNAPSHOT, LvmKind.UNFINISHED_SNAPSHOT):
            await self._privileges.ask("remove", kind=kind, id=_check_snapshot(snapshot_id))

    async def snapshot_used_bytes(self, snapshot_id: str) -> int:
        found = await self._find_snapshot(snapshot_id)
        return found.used_bytes if found else 0

    async def list_snapshot_disks(self) -> list[str]:
        found: set[str] = set()
        for (kind, volume_id), volume in (await self._volumes()).items():
            if kind in (LvmKind.SNAPSHOT, LvmKind.UNFINISHED_SNAPSHOT):
                found.add(volume_id)
            found.update(volume.freezing)
        return sorted(found)

    async def _volumes(self) -> _Volumes:
        told = await self._privileges.ask("look")
        self._pool_state(told["pool"])
        return {
            (LvmKind(each["kind"]), each["id"]): _Volume(
                size_bytes=int(each["size_bytes"]),
                used_bytes=int(each["used_bytes"]),
                own_bytes=int(each["own_bytes"]),
                freezing=tuple(each["freezing"]),
                checksum=each["checksum"],
                path=Path(each["path"]),
                whole=bool(each["whole"]),
                base_id=each["base_id"],
            )
            for each in told["volumes"]
        }

    async def _volume(self, sandbox_id: str) -> _Volume:
        found = (await self._volumes()).get((LvmKind.VOLUME, _check_sandbox(sandbox_id)))
        if found is None:
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        return found

    async def _find_snapshot(self, snapshot_id: str) -> _Volume | None:
        """One that is made."""
        found = (await self._volumes()).get((LvmKind.SNAPSHOT, _check_snapshot(snapshot_id)))
        return found if found is not None and found.checksum else None

    async def _made_snapshot(self, snapshot_id: str) -> _Volume:
        found = await self._find_snapshot(snapshot_id)
        if found is None:
            raise NotFoundError(f"snapshot {snapshot_id} has no disk", code="snapshot_disk_not_found")
        return found

    async def _snapshot_disk(self, snapshot_id: str) -> SnapshotDisk:
        found = await self._made_snapshot(snapshot_id)
        return SnapshotDisk(await self._expose_snapshot(snapshot_id), found.used_bytes, found.checksum)

    async def _expose_snapshot(self, snapshot_id: str) -> Disk:
        exposed = await self._privileges.ask("expose", kind=LvmKind.SNAPSHOT, id=snapshot_id)
        return _disk(Path(exposed["path"]), read_only=True)

    async def _checksum(self, path: Path, size_bytes: int) -> str:
        return await run_in_thread(lambda given_up: checksum_of_disk(path, size_bytes, given_up=given_up))


def _disk(path: Path, *, read_only: bool = False) -> Disk:
    return Disk(ROOT_DISK_SERIAL, DiskFile(path, "raw"), read_only=read_only)


def _check_sandbox(sandbox_id: str) -> str:
    if not is_sandbox_id(sandbox_id):
        raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
    return sandbox_id


def _check_snapshot(snapshot_id: str) -> str:
    if not is_snapshot_id(snapshot_id):
        raise InvalidRequestError(f"{snapshot_id!r} is not a snapshot id", code="invalid_id")
    return snapshot_id


def _check_none_under_way(sandbox_id: str, volume: _Volume) -> None:
    if volume.freezing:
        raise ConflictError(
            f"the volume of sandbox {sandbox_id} is just being frozen for a snapshot",
            code="layer_under_way",
            hint="try again when that snapshot is taken",
        )


def _write_file(path: Path, pieces: Callable[[], Iterator[bytes]]) -> None:
    """Read-only, with holes, on the disk."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        write_sparsely(file, pieces())
        os.fchmod(file.fileno(), 0o400)
        file.flush()
        os.fsync(file.fileno())
