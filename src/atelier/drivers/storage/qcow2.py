"""Volumes as qcow2 overlays: a few hundred KiB at first, growing by what the guest writes, over a read-only base.

Used by the lifecycle in ``local`` mode. Owns ``volumes_dir`` (mode 0700, files 0600: the VMM receives opened
descriptors). It never writes to a base, and relies on bases never changing: they are named by their content, and kept
beside the volumes (``pinned_bases``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from atelier.drivers.storage.pinned_bases import PinnedBases
from atelier.host import command
from atelier.host.disk_files import find_backing, virtual_size_bytes
from atelier.host.files import disk_full, disk_full_as_error, ensure_private_folder, free_bytes
from atelier.model.errors import CommandError, HostError, InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, VolumeRequest

_SUFFIX = ".qcow2"
_UNFINISHED_SUFFIX = ".qcow2.new"
_MIB = 1024 * 1024
_LONGEST_CHAIN = 16


class Qcow2Storage:
    def __init__(self, volumes_dir: Path) -> None:
        self._volumes_dir = volumes_dir.absolute()
        self._bases = PinnedBases(self._volumes_dir)

    @property
    def name(self) -> str:
        return "qcow2"

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        if present := await self.find_volume(request.sandbox_id):
            return present
        ensure_private_folder(self._volumes_dir)
        async with self._bases.pinned(request.base) as base:
            base_bytes = virtual_size_bytes(base)
            size_bytes = request.size_mib * _MIB
            if size_bytes < base_bytes:
                raise InvalidRequestError(
                    f"a disk of {request.size_mib} MiB is too small for the image, which needs "
                    f"{-(-base_bytes // _MIB)} MiB",
                    code="disk_too_small",
                    hint=f"ask for a disk of at least {-(-base_bytes // _MIB)} MiB",
                )
            volume = DiskFile(self._volume(request.sandbox_id), "qcow2")
            await self._create(volume.path, base, size_bytes)
            return Disk(ROOT_DISK_SERIAL, volume, self._chain_below(volume))

    async def _create(self, volume: Path, base: DiskFile, size_bytes: int) -> None:
        unfinished = volume.with_suffix(_UNFINISHED_SUFFIX)
        doing = f"creating the volume {volume}"
        try:
            with disk_full_as_error(doing):
                unfinished.unlink(missing_ok=True)
                # Made here, so that its mode is right from the first instant.
                descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            # -u: do not open the base; its size is known and stated.
            overlay = ["create", "-q", "-u", "-f", "qcow2", "-F", base.format, "-b", str(base.path)]
            try:
                # Open, not by its name: one that comes to it after this process's death must not make the file again.
                arguments = [*overlay, f"/proc/self/fd/{descriptor}", str(size_bytes)]
                await self._run_qemu_img(arguments, doing, pass_descriptors=[descriptor])
            finally:
                os.close(descriptor)
            with disk_full_as_error(doing):
                # A volume that has its name is whole.
                unfinished.rename(volume)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        volume = DiskFile(self._volume(sandbox_id), "qcow2")
        if not volume.path.exists():
            return None
        return Disk(ROOT_DISK_SERIAL, volume, self._chain_below(volume))

    def _chain_below(self, volume: DiskFile) -> tuple[DiskFile, ...]:
        chain: list[DiskFile] = []
        file = volume
        while found := find_backing(file):
            if len(chain) == _LONGEST_CHAIN:
                raise HostError(
                    f"{volume.path} has a chain of more than {_LONGEST_CHAIN} files", code="disk_file_damaged"
                )
            self._bases.check(found)
            chain.append(found)
            file = found
        return tuple(chain)

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        volume = self._volume(sandbox_id)
        if not volume.exists():
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        present_bytes = virtual_size_bytes(DiskFile(volume, "qcow2"))
        size_bytes = size_mib * _MIB
        if size_bytes < present_bytes:
            raise InvalidRequestError(
                f"the disk has {present_bytes // _MIB} MiB and cannot shrink to {size_mib} MiB",
                code="disk_cannot_shrink",
                hint="a disk only grows",
            )
        if size_bytes > present_bytes:
            await self._run_qemu_img(
                ["resize", "-q", "-f", "qcow2", str(volume), str(size_bytes)], f"growing the volume {volume}"
            )

    async def _run_qemu_img(self, arguments: list[str], doing: str, *, pass_descriptors: Sequence[int] = ()) -> None:
        try:
            await command.run(
                ["qemu-img", *arguments],
                environment={"LC_ALL": "C"},
                pass_descriptors=pass_descriptors,
                package_hint="qemu-utils",
            )
        except CommandError as error:
            if "No space left on device" in error.message or "Disk quota exceeded" in error.message:
                raise disk_full(doing) from error
            raise

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        volume = self._volume(sandbox_id)
        volume.unlink(missing_ok=True)
        volume.with_suffix(_UNFINISHED_SUFFIX).unlink(missing_ok=True)
        self._bases.drop_unused()

    async def list_volumes(self) -> list[str]:
        if not self._volumes_dir.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self._volumes_dir))
        ids = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return sorted(sandbox_id for sandbox_id in ids if is_sandbox_id(sandbox_id))

    async def used_bytes(self, sandbox_id: str) -> int:
        try:
            # Source: stat(2): st_blocks counts 512 bytes each, whatever the file system's block size.
            return self._volume(sandbox_id).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    async def free_bytes(self) -> int:
        ensure_private_folder(self._volumes_dir)
        return free_bytes(self._volumes_dir)

    def _volume(self, sandbox_id: str) -> Path:
        if not is_sandbox_id(sandbox_id):
            raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
        return self._volumes_dir / f"{sandbox_id}{_SUFFIX}"
