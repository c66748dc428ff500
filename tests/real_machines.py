"""What tests need to boot real machines: whether it can be done here, boot files and base image from the shared cache,
and machines whose init is a script of the test's own.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from atelier.config.settings import load_settings
from atelier.drivers.images.cpio import CpioArchive
from atelier.drivers.images.debian import DebianImages
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.model.image import BuildProgress, Image
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    TOOLS_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    MachineSpec,
    NetworkAttachment,
)
from atelier.model.machine_limits import UNLIMITED, DiskRate

REPOSITORY = Path(__file__).resolve().parents[1]


def missing_programs(*programs: str) -> str:
    """Which of them are not installed, as words for a skip; empty if none."""
    missing = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


NO_QEMU = missing_programs("qemu-system-x86_64", "qemu-img", "mke2fs")


def images_of_this_checkout(*, own_kernel: bool = False) -> DebianImages:
    """Over the cache that ``ATELIER_CACHE_DIR`` or its default names."""
    recipes, package = REPOSITORY / "images", REPOSITORY / "src" / "atelier"
    return DebianImages(load_settings().cache_dir, recipes, package, own_kernel=own_kernel)


async def get_boot_files(*, own_kernel: bool = False) -> BootFiles:
    """Kernel, initramfs and tools image; built if they are not in the cache."""
    return await images_of_this_checkout(own_kernel=own_kernel).ensure_boot_files(_tell)


async def get_base_image() -> Image:
    return await images_of_this_checkout().ensure_image("base", _tell)


def _tell(progress: BuildProgress) -> None:
    """pytest shows it when the build fails."""
    print(progress.phase, progress.message)


def with_init(boot: BootFiles, script: str, folder: Path) -> BootFiles:
    """Boot files whose initramfs runs ``script`` (a busybox shell script) instead of our init.

    The kernel unpacks archives one after another, and the later file of a name wins.
    """
    archive = CpioArchive()
    archive.add_file("init", f"#!/bin/busybox sh\n{script}".encode(), executable=True)
    initramfs = folder / "initramfs-of-the-test.cpio"
    initramfs.write_bytes(boot.initramfs.read_bytes() + archive.finish())
    initramfs.chmod(0o644)
    return BootFiles(boot.kernel, initramfs, boot.tools, boot.kernel_release, boot.tools_id)


INIT_PREPARES = """
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
mount -t sysfs sysfs /sys
for module in /modules/*.ko; do insmod "$module"; done
"""
"""How a script for ``with_init`` begins: console, /proc, /sys and the virtio drivers."""


def make_small_image(path: Path) -> DiskFile:
    """An ext4 file system with nothing in it."""
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(path), "16M"], check=True, capture_output=True)
    return DiskFile(path, "raw")


def make_overlay(path: Path, base: DiskFile) -> Disk:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", base.format, "-b", str(base.path), str(path)], check=True
    )
    return Disk(ROOT_DISK_SERIAL, DiskFile(path, "qcow2"), (base,))


def machine_spec(
    sandbox_id: str,
    installation_id: str,
    boot: BootFiles,
    folder: Path,
    *,
    network: NetworkAttachment | None = None,
    memory_mib: int = 192,
) -> MachineSpec:
    """A machine over small disks of its own below ``folder``; its run directory is ``folder/<sandbox id>``."""
    base = make_small_image(folder / f"{sandbox_id}-base.img")
    return MachineSpec(
        sandbox_id=sandbox_id,
        installation_id=installation_id,
        vcpu_count=1,
        memory_mib=memory_mib,
        boot=boot,
        root=make_overlay(folder / f"{sandbox_id}.qcow2", base),
        tools=Disk(TOOLS_DISK_SERIAL, base, read_only=True),
        network=network or NetworkAttachment("none"),
        run_directory=folder / sandbox_id,
    )


def emulated(installation_id: str, folder: Path, *, disk_rate: DiskRate = UNLIMITED) -> QemuVmm:
    """The real driver, in software emulation, so that it behaves alike everywhere."""
    return QemuVmm(installation_id, cache_dir=folder / "cache", accelerator="tcg", disk_rate=disk_rate)
