"""Kernels and initial file systems that do not come up: the sandbox fails in words, with the end of its console, and
nothing of it is left. One that hangs can be destroyed while it is waited for, and a client that goes away stops nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.footprint import left_of, processes_naming
from tests.real_machines import INIT_PREPARES, NO_QEMU, get_base_image, get_boot_files, with_init
from tests.running_manager import RunningManager, running_local_manager

from atelier.config.settings import load_settings
from atelier.model.machine import BootFiles

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

SANDBOXES = "/api/v1/sandboxes"
PATIENCE_SECONDS = 120.0
HANGING = "THIS GUEST ONLY WAITS"


@dataclass(frozen=True)
class Kitchen:
    """A cache whose images are the real one's, and whose kernel and initramfs a test may spoil."""

    manager: RunningManager
    kernel: Path
    initramfs: Path
    good: BootFiles

    def boot_with(self, *, kernel: bytes | None = None, initramfs: bytes | None = None) -> None:
        self.kernel.write_bytes(self.good.kernel.read_bytes() if kernel is None else kernel)
        self.initramfs.write_bytes(self.good.initramfs.read_bytes() if initramfs is None else initramfs)


@pytest.fixture(scope="module")
def good_boot_files() -> BootFiles:
    asyncio.run(get_base_image())
    return asyncio.run(get_boot_files())


@pytest.fixture(scope="module")
def kitchen(good_boot_files: BootFiles) -> Iterator[Kitchen]:
    real = load_settings().cache_dir
    with tempfile.TemporaryDirectory(prefix="atl-cache-") as folder:
        cache = Path(folder)
        for name in ("images", "tools", "packages"):
            (cache / name).symlink_to(real / name)
        (cache / "kernel").mkdir()
        for manifest in (real / "kernel").glob("*.json"):
            (cache / "kernel" / manifest.name).write_bytes(manifest.read_bytes())
        # A kernel of our own without them is taken for spoilt, and another in its place.
        for parts in (real / "kernel").glob("parts-*"):
            (cache / "kernel" / parts.name).symlink_to(parts)
        good = good_boot_files
        with running_local_manager({"ATELIER_CACHE_DIR": folder}) as manager:
            made = Kitchen(manager, cache / "kernel" / good.kernel.name, cache / "kernel" / good.initramfs.name, good)
            made.boot_with()
            yield made
    assert processes_naming(str(manager.run_dir.parent)) == []


def assert_failed_and_clean(manager: RunningManager, code: str) -> dict:
    """Create a sandbox that cannot come up; returns it as the API shows it. Only its row and kept console are left, and
    they go with it."""
    with manager.client() as api:
        created = api.post(
            SANDBOXES, params={"wait": True}, json={"name": "never", "memory_mib": 256}, timeout=PATIENCE_SECONDS
        )
        assert created.status_code == 201, created.text
        sandbox = created.json()
        assert sandbox["state"] == "failed"
        assert set(sandbox["failure"]) == {"code", "message", "hint"}
        assert sandbox["failure"]["code"] == code, sandbox["failure"]
        assert sandbox["failure"]["hint"]
        left = [path for path in left_of(manager, sandbox["id"]) if Path(path).parent.name != "consoles"]
        assert left == []
        assert api.get(f"{SANDBOXES}/never").json() == sandbox
        assert api.delete(f"{SANDBOXES}/never", params={"wait": True}).status_code == 204
    assert left_of(manager, sandbox["id"]) == []
    return sandbox


def test_a_kernel_that_panics(kitchen: Kitchen) -> None:
    kitchen.boot_with(initramfs=os.urandom(100_000))
    failed = assert_failed_and_clean(kitchen.manager, "vmm_ended")
    assert "Kernel panic" in failed["console_tail"]


@pytest.mark.parametrize("kept_bytes", [1000, 2_000_000])
def test_a_truncated_kernel(kitchen: Kitchen, kept_bytes: int) -> None:
    kitchen.boot_with(kernel=kitchen.good.kernel.read_bytes()[:kept_bytes])
    with kitchen.manager.client() as api:
        assert api.get("/health").status_code == 200
    failed = assert_failed_and_clean(kitchen.manager, "vmm_failed")
    assert "kernel" in failed["failure"]["message"]


def test_a_guest_that_hangs_is_destroyed_while_it_is_waited_for(kitchen: Kitchen, tmp_path: Path) -> None:
    hanging = with_init(kitchen.good, f"{INIT_PREPARES}\necho {HANGING}\nwhile true; do sleep 1000; done", tmp_path)
    kitchen.boot_with(initramfs=hanging.initramfs.read_bytes())
    manager = kitchen.manager
    address = urlsplit(manager.url)
    with manager.client() as api:
        body = b'{"name": "hangs", "memory_mib": 256}'
        with socket.create_connection((address.hostname or "", address.port or 0)) as leaving:
            leaving.sendall(
                f"POST {SANDBOXES}?wait=true HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {manager.key}"
                f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            _until(lambda: api.get(f"{SANDBOXES}/hangs").status_code == 200)
        _until(lambda: HANGING in api.get(f"{SANDBOXES}/hangs/console").text)
        sandbox = api.get(f"{SANDBOXES}/hangs").json()
        assert sandbox["state"] == "creating", "a client that goes away stops nothing"
        refused = api.post(f"{SANDBOXES}/hangs/run", json={"command": ["true"]})
        assert (refused.status_code, refused.json()["code"]) == (409, "not_running")
        assert api.delete(f"{SANDBOXES}/hangs", params={"wait": True}).status_code == 204
        assert httpx.get(f"{manager.url}/health").status_code == 200
    assert left_of(manager, sandbox["id"]) == []


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
