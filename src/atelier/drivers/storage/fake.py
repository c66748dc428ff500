"""Storage whose volumes are words: in memory, and in small files where they are to outlive the manager. For mock mode
and tests; faults by ``faults``."""

from __future__ import annotations

import json
from pathlib import Path

from atelier.drivers.faults import Faults
from atelier.host.files import write_atomically
from atelier.model.errors import DiskFullError, InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, VolumeRequest

_MIB = 1024 * 1024
_NEW_VOLUME_BYTES = 200 * 1024
_SUFFIX = ".fake"


class FakeStorage:
    """``base_size_mib`` is the size that every base has; ``capacity_bytes`` is what new volumes share. ``folder`` holds
    ``<id>.fake``, one file per volume, if given."""

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
        self._folder = folder
        for file in sorted(folder.glob(f"*{_SUFFIX}")) if folder is not None else ():
            self._read(file)

    @property
    def name(self) -> str:
        return "fake"

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        await self.faults.before("ensure_volume")
        _check_id(request.sandbox_id)
        if request.size_mib < self.base_size_mib:
            raise InvalidRequestError(
                f"a disk of {request.size_mib} MiB is too small for the image, which needs {self.base_size_mib} MiB",
                code="disk_too_small",
                hint=f"ask for a disk of at least {self.base_size_mib} MiB",
            )
        if request.sandbox_id not in self.volumes:
            if self._free_bytes() < _NEW_VOLUME_BYTES:
                raise DiskFullError("no space left while creating the volume", hint="remove sandboxes, then try again")
            top = DiskFile(Path("/nonexistent") / f"{request.sandbox_id}.qcow2", "qcow2")
            self.volumes[request.sandbox_id] = Disk(ROOT_DISK_SERIAL, top, (request.base,))
            self.sizes_mib[request.sandbox_id] = request.size_mib
            self._write(request.sandbox_id)
        return self.volumes[request.sandbox_id]

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        await self.faults.before("find_volume")
        _check_id(sandbox_id)
        return self.volumes.get(sandbox_id)

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        await self.faults.before("grow_volume")
        _check_id(sandbox_id)
        present_mib = self.sizes_mib.get(sandbox_id)
        if present_mib is None:
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        if size_mib < present_mib:
            raise InvalidRequestError(
                f"the disk has {present_mib} MiB and cannot shrink to {size_mib} MiB", code="disk_cannot_shrink"
            )
        self.sizes_mib[sandbox_id] = size_mib
        self._write(sandbox_id)

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_volume_absent")
        _check_id(sandbox_id)
        self.volumes.pop(sandbox_id, None)
        self.sizes_mib.pop(sandbox_id, None)
        if self._folder is not None:
            (self._folder / f"{sandbox_id}{_SUFFIX}").unlink(missing_ok=True)

    async def list_volumes(self) -> list[str]:
        await self.faults.before("list_volumes")
        return sorted(self.volumes)

    async def used_bytes(self, sandbox_id: str) -> int:
        await self.faults.before("used_bytes")
        return _NEW_VOLUME_BYTES if sandbox_id in self.volumes else 0

    async def free_bytes(self) -> int:
        await self.faults.before("free_bytes")
        return self._free_bytes()

    def _write(self, sandbox_id: str) -> None:
        if self._folder is None:
            return
        (base,) = self.volumes[sandbox_id].backing
        words = {"base": str(base.path), "format": base.format, "size_mib": self.sizes_mib[sandbox_id]}
        write_atomically(self._folder / f"{sandbox_id}{_SUFFIX}", json.dumps(words).encode(), durable=False)

    def _read(self, file: Path) -> None:
        words = json.loads(file.read_text())
        top = DiskFile(Path("/nonexistent") / f"{file.stem}.qcow2", "qcow2")
        base = DiskFile(Path(words["base"]), words["format"])
        self.volumes[file.stem] = Disk(ROOT_DISK_SERIAL, top, (base,))
        self.sizes_mib[file.stem] = int(words["size_mib"])

    def _free_bytes(self) -> int:
        return max(0, self.capacity_bytes - len(self.volumes) * _NEW_VOLUME_BYTES)


def _check_id(sandbox_id: str) -> None:
    if not is_sandbox_id(sandbox_id):
        raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
