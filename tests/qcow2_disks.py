"""Disks as files for tests of storage: written to and read as a guest would, with no guest."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.model.machine import Disk, DiskFile

IMAGE_NAME = "base-0123456789abcdef.ext4"


def make_image(folder: Path) -> DiskFile:
    """8 MiB, all of the byte 1, as the image cache would hold it."""
    folder.mkdir(exist_ok=True)
    path = folder / IMAGE_NAME
    path.write_bytes(b"\1" * 8 * 2**20)
    path.chmod(0o444)
    return DiskFile(path, "raw")


def write(path: Path, byte: int, at_mib: int) -> None:
    """One MiB full of ``byte``."""
    qemu_io(path, f"write -P {byte} {at_mib}M 1M", "flush")


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for each in commands for word in ("-c", each)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


def content_of(path: Path) -> bytes:
    """The whole disk, as a guest would read it."""
    with tempfile.NamedTemporaryFile() as raw:
        subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), raw.name], check=True)
        return Path(raw.name).read_bytes()


def holds(path: Path, *expected: int) -> bool:
    """Whether the disk's first MiB are full of these bytes, one after another, as a guest would read them."""
    words = [word for at, byte in enumerate(expected) for word in ("-c", f"read -P {byte} {at}M 1M")]
    done = subprocess.run(["qemu-io", "-r", "-U", "-f", "qcow2", *words, str(path)], capture_output=True, text=True)
    # Patterns that differ are told on stdout, some versions' exit status is 0 all the same.
    assert done.returncode == 0 or "Pattern verification failed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("read 1048576/1048576 bytes") == len(expected), done.stdout + done.stderr
    return "Pattern verification failed" not in done.stdout


def files_in(folder: Path) -> dict[str, int]:
    """Their inodes by name."""
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


async def freeze(storage: Qcow2Storage, sandbox_id: str, snapshot_id: str) -> None:
    await storage.begin_layer(sandbox_id, snapshot_id)
    await storage.end_layer(sandbox_id, snapshot_id, switched=True)


async def find_volume(storage: Qcow2Storage, sandbox_id: str) -> Disk:
    disk = await storage.find_volume(sandbox_id)
    assert disk is not None
    return disk
