"""Runs inside an emulated host, as root: makes volumes by the drivers and bare, in turn, and prints the milliseconds as JSON.
Called by ``volume_create``."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.contract.storage_kinds import THIN_POOL, make_storage

from atelier.drivers.storage.interface import StorageDriver
from atelier.model.machine import DiskFile, VolumeRequest

ROUNDS = 11
SIZE_MIB = 64
GROUP = THIN_POOL.partition("/")[0]


async def measure(folder: Path) -> dict[str, dict[str, list[float]]]:
    base = DiskFile(folder / "base-0123456789abcdef.ext4", "raw")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", base.path, f"{SIZE_MIB}M"], check=True)
    lvm, qcow2 = (make_storage(kind, folder / kind) for kind in ("lvm", "qcow2"))
    for driver in (lvm, qcow2):
        # The base is there before the first is timed.
        await driver.ensure_volume(VolumeRequest("aaaaaaaaaaaa", base, SIZE_MIB))
    listed = subprocess.check_output(["lvs", "--noheadings", "-o", "lv_name", GROUP], text=True).split()
    (origin,) = [name for name in listed if "-base-" in name]

    def lvcreate(name: str) -> list[str]:
        return ["lvcreate", "-q", "-s", "-kn", "-ay", "-n", name, f"{GROUP}/{origin}"]

    def qemu_img(name: str) -> list[str]:
        return ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base.path), str(folder / name)]

    return {"lvm": await compare(lvm, base, lvcreate), "qcow2": await compare(qcow2, base, qemu_img)}


async def compare(
    driver: StorageDriver, base: DiskFile, bare_command: Callable[[str], Sequence[str]]
) -> dict[str, list[float]]:
    """The first of each is not counted."""
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS):
        began = time.perf_counter()
        await driver.ensure_volume(VolumeRequest(chr(ord("b") + number) * 12, base, SIZE_MIB))
        between = time.perf_counter()
        subprocess.run(bare_command(f"bare-{number}"), check=True, stderr=subprocess.DEVNULL)
        ours.append((between - began) * 1000)
        bare.append((time.perf_counter() - between) * 1000)
    return {"ours": ours[1:], "bare": bare[1:]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asyncio.run(measure(Path(temporary)))))
