"""Storage whose volumes are words: in memory, or in small files that outlive it as disks outlive a manager.

For mock mode and tests; faults by ``faults``.
"""

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
_SUFFIX = ".fake.json"


class FakeStorage:
    """``base_size_mib`` is the size that every base has; ``capacity_bytes`` is what new volumes share. ``folder``, which
    must exist: where volumes are kept, and found again by the next that is made over it."""

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
        for half_written in folder.glob(f".*{_SUFFIX}.*") if folder else ():
            half_written.unlink()
        for path in sorted(folder.glob(f"*{_SUFFIX}")) if folder else ():
            kept = json.loads(path.read_bytes())
            base = DiskFile(Path(kept["base"]), kept["base_format"])
            self._remember(path.name.removesuffix(_SUFFIX), base, int(kept["size_mib"]))

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
            self._keep(request.sandbox_id, request.base, request.size_mib)
            self._remember(request.sandbox_id, request.base, request.size_mib)
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
        self._keep(sandbox_id, self.volumes[sandbox_id].backing[0], size_mib)
        self.sizes_mib[sandbox_id] = size_mib

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_volume_absent")
        _check_id(sandbox_id)
        if self._folder is not None:
            (self._folder / f"{sandbox_id}{_SUFFIX}").unlink(missing_ok=True)
        self.volumes.pop(sandbox_id, None)
        self.sizes_mib.pop(sandbox_id, None)

    async def list_volumes(self) -> list[str]:
        await self.faults.before("list_volumes")
        return sorted(self.volumes)

    async def used_bytes(self, sandbox_id: str) -> int:
        await self.faults.before("used_bytes")
        return _NEW_VOLUME_BYTES if sandbox_id in self.volumes else 0

    async def free_bytes(self) -> int:
        await self.faults.before("free_bytes")
        return self._free_bytes()

    def _remember(self, sandbox_id: str, base: DiskFile, size_mib: int) -> None:
        top = DiskFile(Path("/nonexistent") / f"{sandbox_id}.qcow2", "qcow2")
        self.volumes[sandbox_id] = Disk(ROOT_DISK_SERIAL, top, (base,))
        self.sizes_mib[sandbox_id] = size_mib

    def _keep(self, sandbox_id: str, base: DiskFile, size_mib: int) -> None:
        if self._folder is not None:
            words = {"base": str(base.path), "base_format": base.format, "size_mib": size_mib}
            # Words about nothing: they need not outlive a power cut.
            write_atomically(self._folder / f"{sandbox_id}{_SUFFIX}", json.dumps(words).encode(), durable=False)

    def _free_bytes(self) -> int:
        return max(0, self.capacity_bytes - len(self.volumes) * _NEW_VOLUME_BYTES)


def _check_id(sandbox_id: str) -> None:
    if not is_sandbox_id(sandbox_id):
        raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
