"""Storage whose volumes are words: in memory, or in small files that outlive it as disks outlive a manager.

For mock mode and tests; faults by ``faults``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from atelier.drivers.faults import Faults
from atelier.host.files import write_atomically
from atelier.model.errors import ConflictError, DiskFullError, HostError, InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id, is_snapshot_id
from atelier.model.layout import DiskLayout
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, SnapshotDisk, VolumeRequest

_MIB = 1024 * 1024
_FILE_BYTES = 200 * 1024
"""What each file counts."""
_LONGEST_CHAIN, _LONGEST_SNAPSHOT_CHAIN = 8, 4
_SUFFIX = ".fake.json"
_SNAPSHOT_SUFFIX = ".fake-snapshot.json"
_NAMES = DiskLayout(Path("/nonexistent"))


@dataclass(frozen=True, slots=True)
class FakeSnapshot:
    """``below``: the layer that was frozen and what it stands over; ``made``: whether it has a disk of its own."""

    below: tuple[DiskFile, ...]
    size_mib: int
    made: bool = False


class FakeStorage:
    """``base_size_mib`` is the size that every image has; ``capacity_bytes`` is what new files share. ``folder``, which
    must exist: where the words are kept, and found again by the next that is made over it. Snapshots in
    ``damaged_snapshots`` do not pass their verification."""

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        base_size_mib: int = 1,
        capacity_bytes: int = 1024 * 1024 * _MIB,
        folder: Path | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.base_size_mib = base_size_mib
        self.capacity_bytes = capacity_bytes
        self.volumes: dict[str, Disk] = {}
        self.sizes_mib: dict[str, int] = {}
        self.freezing: dict[str, str] = {}
        self.snapshots: dict[str, FakeSnapshot] = {}
        self.damaged_snapshots: set[str] = set()
        self._folder = folder
        if folder is not None:
            self._load(folder)

    @property
    def name(self) -> str:
        return "fake"

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        await self.faults.before("ensure_volume")
        sandbox_id = _sandbox(request.sandbox_id)
        below, smallest_mib = self._find_base(request.base)
        if request.size_mib < smallest_mib:
            raise InvalidRequestError(
                f"a disk of {request.size_mib} MiB is too small for the image, which needs {smallest_mib} MiB",
                code="disk_too_small",
                hint=f"ask for a disk of at least {smallest_mib} MiB",
            )
        if sandbox_id not in self.volumes:
            self._take_room("creating the volume")
            self._set_volume(sandbox_id, below, request.size_mib)
        return self.volumes[sandbox_id]

    def _find_base(self, base: DiskFile) -> tuple[tuple[DiskFile, ...], int]:
        """What a volume over ``base`` stands over, and how large it must be at least."""
        if base.path.parent != _NAMES.snapshots:
            return (base,), self.base_size_mib
        snapshot = self.snapshots.get(base.path.stem)
        if snapshot is None or not snapshot.made:
            raise HostError(f"the disk file {base.path} is missing", code="disk_file_missing")
        return (base, *snapshot.below), snapshot.size_mib

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        await self.faults.before("find_volume")
        return self.volumes.get(_sandbox(sandbox_id))

    @property
    def grows_open_volumes(self) -> bool:
        return False

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        await self.faults.before("grow_volume")
        disk = self._get(sandbox_id)
        self._check_not_freezing(sandbox_id)
        present_mib = self.sizes_mib[sandbox_id]
        if size_mib < present_mib:
            raise InvalidRequestError(
                f"the disk has {present_mib} MiB and cannot shrink to {size_mib} MiB", code="disk_cannot_shrink"
            )
        self._keep_volume(sandbox_id, disk.backing, size_mib)
        self.sizes_mib[sandbox_id] = size_mib

    async def shorten_volume(self, sandbox_id: str) -> None:
        await self.faults.before("shorten_volume")
        disk = self._get(sandbox_id)
        self._check_not_freezing(sandbox_id)
        if self._layers_of(disk):
            shared = tuple(file for file in disk.backing if not _NAMES.is_layer(file.path))
            self._set_volume(sandbox_id, shared, self.sizes_mib[sandbox_id])

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_volume_absent")
        _sandbox(sandbox_id)
        if self._folder is not None:
            (self._folder / f"{sandbox_id}{_SUFFIX}").unlink(missing_ok=True)
        self.volumes.pop(sandbox_id, None)
        self.sizes_mib.pop(sandbox_id, None)
        self.freezing.pop(sandbox_id, None)

    async def list_volumes(self) -> list[str]:
        await self.faults.before("list_volumes")
        return sorted(self.volumes)

    async def used_bytes(self, sandbox_id: str) -> int:
        await self.faults.before("used_bytes")
        disk = self.volumes.get(sandbox_id)
        return (1 + self._layers_of(disk)) * _FILE_BYTES if disk else 0

    async def free_bytes(self) -> int:
        await self.faults.before("free_bytes")
        return self._free_bytes()

    async def begin_layer(self, sandbox_id: str, snapshot_id: str) -> DiskFile:
        await self.faults.before("begin_layer")
        disk = self._get(sandbox_id)
        _snapshot(snapshot_id)
        if self.freezing.get(sandbox_id) != snapshot_id:
            self._check_not_freezing(sandbox_id)
            if snapshot_id in self.snapshots and self.snapshots[snapshot_id].made:
                raise ConflictError(f"snapshot {snapshot_id} has its disk already", code="snapshot_exists")
            if len(disk.backing) + 2 > _LONGEST_CHAIN:
                raise ConflictError(
                    f"the disk of sandbox {sandbox_id} consists of {_LONGEST_CHAIN} files, as many as there may be",
                    code="disk_chain_too_long",
                )
            self._take_room("freezing the volume")
            size_mib = self.sizes_mib[sandbox_id]
            below = (_next_layer(sandbox_id, snapshot_id, disk), *disk.backing)
            self._set_snapshot(snapshot_id, FakeSnapshot(below, size_mib))
            self.freezing[sandbox_id] = snapshot_id
            self._keep_volume(sandbox_id, disk.backing, size_mib)
        return DiskFile(_NAMES.next_top(sandbox_id, snapshot_id), "qcow2")

    async def freeze_layer(self, sandbox_id: str, snapshot_id: str) -> None:
        await self.faults.before("freeze_layer")
        _sandbox(sandbox_id)
        _snapshot(snapshot_id)

    async def end_layer(self, sandbox_id: str, snapshot_id: str, *, switched: bool) -> None:
        await self.faults.before("end_layer")
        _sandbox(sandbox_id)
        if self.freezing.get(sandbox_id) != _snapshot(snapshot_id):
            return
        del self.freezing[sandbox_id]
        disk, size_mib = self.volumes[sandbox_id], self.sizes_mib[sandbox_id]
        if switched:
            layer = _next_layer(sandbox_id, snapshot_id, disk)
            self._set_volume(sandbox_id, (layer, *disk.backing), size_mib)
        else:
            self._keep_volume(sandbox_id, disk.backing, size_mib)
            self._remove_snapshot(snapshot_id)

    async def ensure_snapshot_disk(self, snapshot_id: str, sandbox_id: str) -> SnapshotDisk:
        await self.faults.before("ensure_snapshot_disk")
        snapshot = self.snapshots.get(_snapshot(snapshot_id))
        if self.freezing.get(_sandbox(sandbox_id)) == snapshot_id:
            raise ConflictError(
                f"the volume of sandbox {sandbox_id} is just being frozen for snapshot {snapshot_id}",
                code="layer_under_way",
            )
        if snapshot is None:
            raise NotFoundError(f"no volume was frozen for snapshot {snapshot_id}", code="layer_not_found")
        if not snapshot.made:
            self._take_room("making the snapshot disk")
            shared = tuple(file for file in snapshot.below if not _NAMES.is_layer(file.path))
            below = shared if len(shared) < _LONGEST_SNAPSHOT_CHAIN else shared[-1:]
            self._set_snapshot(snapshot_id, replace(snapshot, below=below, made=True))
        return self._get_snapshot_disk(snapshot_id)

    async def find_snapshot_disk(self, snapshot_id: str) -> Disk | None:
        await self.faults.before("find_snapshot_disk")
        return self._disk_of(_snapshot(snapshot_id))

    async def verify_snapshot_disk(self, snapshot_id: str) -> None:
        await self.faults.before("verify_snapshot_disk")
        if self._disk_of(_snapshot(snapshot_id)) is None:
            raise _no_disk(snapshot_id)
        if snapshot_id in self.damaged_snapshots:
            raise HostError(
                f"the disk of snapshot {snapshot_id} is not what it was when it was made",
                code="disk_file_damaged",
                hint="delete the snapshot and take another",
            )

    async def export_snapshot_disk(self, snapshot_id: str, target: Path) -> str:
        await self.faults.before("export_snapshot_disk")
        disk = self._disk_of(_snapshot(snapshot_id))
        if disk is None:
            raise _no_disk(snapshot_id)
        if len(disk.backing) != 1:
            raise ConflictError(
                f"the disk of snapshot {snapshot_id} stands over another snapshot's", code="snapshot_disk_not_alone"
            )
        words = json.dumps({"size_mib": self.snapshots[snapshot_id].size_mib, "snapshot": snapshot_id}).encode()
        write_atomically(target, words, mode=0o400)
        return hashlib.sha256(words).hexdigest()

    async def import_snapshot_disk(self, snapshot_id: str, source: Path, base: DiskFile, checksum: str) -> SnapshotDisk:
        await self.faults.before("import_snapshot_disk")
        if self._disk_of(_snapshot(snapshot_id)) is None:
            try:
                words = source.read_bytes()
            except FileNotFoundError as error:
                raise HostError(f"the disk file {source} is missing", code="disk_file_missing") from error
            if hashlib.sha256(words).hexdigest() != checksum:
                raise HostError(f"{source} is not what was written there", code="disk_file_damaged")
            self._take_room("making the snapshot disk")
            self._set_snapshot(snapshot_id, FakeSnapshot((base,), int(json.loads(words)["size_mib"]), made=True))
        return self._get_snapshot_disk(snapshot_id)

    async def ensure_snapshot_disk_absent(self, snapshot_id: str) -> None:
        await self.faults.before("ensure_snapshot_disk_absent")
        self._remove_snapshot(_snapshot(snapshot_id))

    async def snapshot_used_bytes(self, snapshot_id: str) -> int:
        await self.faults.before("snapshot_used_bytes")
        return _FILE_BYTES if self._disk_of(_snapshot(snapshot_id)) else 0

    async def list_snapshot_disks(self) -> list[str]:
        await self.faults.before("list_snapshot_disks")
        return sorted(self.snapshots)

    def _get_snapshot_disk(self, snapshot_id: str) -> SnapshotDisk:
        disk = self._disk_of(snapshot_id)
        assert disk is not None, "it was just made"
        checksum = hashlib.sha256(f"{snapshot_id} {self.snapshots[snapshot_id]}".encode()).hexdigest()
        return SnapshotDisk(disk, _FILE_BYTES, checksum)

    def _disk_of(self, snapshot_id: str) -> Disk | None:
        snapshot = self.snapshots.get(snapshot_id)
        if snapshot is None or not snapshot.made:
            return None
        top = DiskFile(_NAMES.snapshot_disk(snapshot_id), "qcow2")
        return Disk(ROOT_DISK_SERIAL, top, snapshot.below, read_only=True)

    def _get(self, sandbox_id: str) -> Disk:
        if _sandbox(sandbox_id) not in self.volumes:
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        return self.volumes[sandbox_id]

    def _check_not_freezing(self, sandbox_id: str) -> None:
        if sandbox_id in self.freezing:
            raise ConflictError(
                f"the volume of sandbox {sandbox_id} is just being frozen for a snapshot", code="layer_under_way"
            )

    def _layers_of(self, disk: Disk) -> int:
        return sum(_NAMES.is_layer(file.path) for file in disk.backing)

    def _set_volume(self, sandbox_id: str, backing: tuple[DiskFile, ...], size_mib: int) -> None:
        self._keep_volume(sandbox_id, backing, size_mib)
        self._remember_volume(sandbox_id, backing, size_mib)

    def _remember_volume(self, sandbox_id: str, backing: tuple[DiskFile, ...], size_mib: int) -> None:
        self.volumes[sandbox_id] = Disk(ROOT_DISK_SERIAL, DiskFile(_NAMES.volume(sandbox_id), "qcow2"), backing)
        self.sizes_mib[sandbox_id] = size_mib

    def _set_snapshot(self, snapshot_id: str, snapshot: FakeSnapshot) -> None:
        words = {"below": _to_json(snapshot.below), "size_mib": snapshot.size_mib, "made": snapshot.made}
        self._keep(f"{snapshot_id}{_SNAPSHOT_SUFFIX}", words)
        self.snapshots[snapshot_id] = snapshot

    def _remove_snapshot(self, snapshot_id: str) -> None:
        if self._folder is not None:
            (self._folder / f"{snapshot_id}{_SNAPSHOT_SUFFIX}").unlink(missing_ok=True)
        self.snapshots.pop(snapshot_id, None)
        self.damaged_snapshots.discard(snapshot_id)

    def _keep_volume(self, sandbox_id: str, backing: tuple[DiskFile, ...], size_mib: int) -> None:
        freezing = self.freezing.get(sandbox_id)
        self._keep(f"{sandbox_id}{_SUFFIX}", {"backing": _to_json(backing), "size_mib": size_mib, "freezing": freezing})

    def _keep(self, name: str, words: Mapping[str, object]) -> None:
        if self._folder is not None:
            # Words about nothing: they need not outlive a power cut.
            write_atomically(self._folder / name, json.dumps(words).encode(), durable=False)

    def _load(self, folder: Path) -> None:
        for half_written in (*folder.glob(f".*{_SUFFIX}.*"), *folder.glob(f".*{_SNAPSHOT_SUFFIX}.*")):
            half_written.unlink()
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            kept = json.loads(path.read_bytes())
            # A file of before there were snapshots names its base alone.
            backing = kept.get("backing") or [[kept["base"], kept["base_format"]]]
            sandbox_id = path.name.removesuffix(_SUFFIX)
            self._remember_volume(sandbox_id, _from_json(backing), int(kept["size_mib"]))
            if freezing := kept.get("freezing"):
                self.freezing[sandbox_id] = freezing
        for path in sorted(folder.glob(f"*{_SNAPSHOT_SUFFIX}")):
            kept = json.loads(path.read_bytes())
            snapshot = FakeSnapshot(_from_json(kept["below"]), int(kept["size_mib"]), bool(kept["made"]))
            self.snapshots[path.name.removesuffix(_SNAPSHOT_SUFFIX)] = snapshot

    def _take_room(self, doing: str) -> None:
        if self._free_bytes() < _FILE_BYTES:
            raise DiskFullError(f"no space left while {doing}", hint="remove sandboxes, then try again")

    def _free_bytes(self) -> int:
        files = sum(1 + self._layers_of(disk) for disk in self.volumes.values())
        files += len(self.freezing) + sum(snapshot.made for snapshot in self.snapshots.values())
        return max(0, self.capacity_bytes - files * _FILE_BYTES)


def _next_layer(sandbox_id: str, snapshot_id: str, disk: Disk) -> DiskFile:
    number = 1
    while (layer := DiskFile(_NAMES.layer(sandbox_id, snapshot_id, number), "qcow2")) in disk.backing:
        number += 1
    return layer


def _to_json(files: tuple[DiskFile, ...]) -> list[list[str]]:
    return [[str(file.path), file.format] for file in files]


def _from_json(files: list[list[str]]) -> tuple[DiskFile, ...]:
    return tuple(DiskFile(Path(path), "raw" if form == "raw" else "qcow2") for path, form in files)


def _sandbox(sandbox_id: str) -> str:
    if not is_sandbox_id(sandbox_id):
        raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
    return sandbox_id


def _snapshot(snapshot_id: str) -> str:
    if not is_snapshot_id(snapshot_id):
        raise InvalidRequestError(f"{snapshot_id!r} is not a snapshot id", code="invalid_id")
    return snapshot_id


def _no_disk(snapshot_id: str) -> NotFoundError:
    return NotFoundError(f"snapshot {snapshot_id} has no disk", code="snapshot_disk_not_found")
