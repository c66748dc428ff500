"""The storage drivers that every test of the interface runs on.

LVM takes root and a pool to work in: ``ATELIER_TEST_THIN_POOL=group/pool``, as in an emulated host (``tests/host``).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.real_machines import missing_programs

from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.storage.lvm_thin import LvmThinStorage
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.host_setup.root_settings import RootSettings
from atelier.host_setup.storage_verbs import StorageVerbs

BASE_MIB = 8
"""Of the image that the tests make volumes from."""
THIN_POOL = os.environ.get("ATELIER_TEST_THIN_POOL", "")
NO_QEMU_IMG = missing_programs("qemu-img")
QCOW2 = pytest.param("qcow2", marks=pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG))
LASTING = [QCOW2, "fake in files", *(["lvm"] if THIN_POOL else [])]
"""Whose volumes are there when another driver looks."""
STACKING = [QCOW2, "fake", "fake in files"]
"""Whose disks consist of files over one another."""
KINDS = [QCOW2, "fake", *LASTING[1:]]


class RootInProcess:
    """Root's side of the LVM driver, without the program in between; what passes is JSON all the same. ``lock``: as the
    program hands it on."""

    def __init__(self, settings: RootSettings, *, lock: int | None = None) -> None:
        self._verbs = StorageVerbs(settings, lock=lock).verbs
        self._turn = asyncio.Lock()

    async def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        async with self._turn:
            return json.loads(json.dumps(await self._verbs[verb](json.loads(json.dumps(fields)))))


def lvm_settings(folder: Path) -> RootSettings:
    """Of an installation that is named by ``folder``."""
    group, _, pool = THIN_POOL.partition("/")
    digest = hashlib.sha256(str(folder).encode()).digest()
    return RootSettings("root", base64.b32encode(digest).decode().lower()[:4], group, pool)


def make_storage(kind: str, volumes: Path) -> StorageDriver:
    """One of its own for each folder, the same for the same."""
    match kind:
        case "qcow2":
            return Qcow2Storage(volumes)
        case "lvm":
            return LvmThinStorage(RootInProcess(lvm_settings(volumes)))
        case _:
            volumes.mkdir(exist_ok=True)
            return FakeStorage(base_size_mib=BASE_MIB, folder=volumes if kind == "fake in files" else None)


def files_below(storage: StorageDriver, count: int) -> int:
    """How many files a disk has below it, that has ``count`` where disks are files over one another."""
    return 0 if storage.name == "lvm-thin" else count
