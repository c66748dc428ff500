"""A data folder on a file system that is full: said plainly, nothing half-made stays, and the manager goes on once there
is room again."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.disturbed_manager import MODULE, NOWHERE
from tests.footprint import left_of
from tests.real_machines import NO_QEMU
from tests.running_manager import RunningManager, start_manager, stop_manager

SANDBOXES = "/api/v1/sandboxes"


@pytest.fixture
def small_data_folder() -> Iterator[Path]:
    """A folder whose ``data`` is a file system of 8 MiB."""
    yield from mounted("8m")


@pytest.fixture
def larger_data_folder() -> Iterator[Path]:
    """A folder whose ``data`` is a file system with room for what the host keeps for itself, and for a guest."""
    yield from mounted("1200m")


def mounted(size: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(data)]
        if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
            pytest.skip("mounting needs root")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", str(data)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "data" / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


@contextmanager
def room_of(folder: Path, size_bytes: int) -> Iterator[None]:
    """The file system has so much free space, until the end."""
    filler = folder / "data" / "filler"
    free = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - size_bytes)
    try:
        yield
    finally:
        filler.unlink()


def assert_disk_full(answer: httpx.Response, mode: str) -> None:
    """Told by the answer, or, when only a step of the creation met it, by the sandbox. Where the disk is measured
    before anything is begun, what does not fit is not begun."""
    body = answer.json()
    if mode == "local":
        assert (answer.status_code, body["code"]) == (503, "insufficient_capacity"), body
        assert "disk: 4096 MiB asked for, 0 MiB of 0 MiB free" in body["message"]
        return
    if answer.status_code == 201:
        assert body["state"] == "failed"
        body = body["failure"]
    else:
        assert answer.status_code == 507, answer.text
    assert set(body) == {"code", "message", "hint"}
    assert body["code"] == "disk_full", body
    assert body["hint"]


def created(api: httpx.Client, name: str) -> httpx.Response:
    return api.post(SANDBOXES, params={"wait": True}, json={"name": name, "memory_mib": 256}, timeout=180)


def remove(api: httpx.Client, name: str) -> None:
    assert api.delete(f"{SANDBOXES}/{name}", params={"wait": True}).status_code == 204


def try_snapshots(manager: RunningManager, api: httpx.Client, sandbox: str, folder: Path) -> None:
    """There is too little room to take one, then to bake it: it ends as failed, and nothing of it stays; the sandbox goes
    on, and is saved once there is room."""
    box = api.get(f"{SANDBOXES}/{sandbox}").json()["id"]

    def take(name: str) -> dict[str, Any]:
        path, options = f"{SANDBOXES}/{sandbox}/snapshots", {"wait": True, "timeout_seconds": 300}
        answer = api.post(path, params=options, json={"name": name}, timeout=360)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def delete(name: str) -> None:
        assert api.delete(f"/api/v1/snapshots/{name}", timeout=60).status_code == 204

    whole = take("whole")
    assert whole["state"] == "ready", whole
    memory = whole["memory_bytes"]
    delete("whole")
    # Of a memory that is sent only what a kernel has used is written; what is baked of it is as large as it.
    for room, was_taken in ((memory // 4, False), (memory * 5 // 4, True)):
        with room_of(folder, room):
            failed = take("failed")
            assert (failed["state"], failed["failure"]["code"]) == ("failed", "disk_full"), failed
            assert failed["failure"]["hint"]
            assert bool(failed["stopped_ms"]) == was_taken
            # The sandbox's own disk is named after it too.
            assert [each for each in left_of(manager, failed["id"]) if box not in each] == []
            assert api.get("/api/v1/snapshots").json()["items"] == []
            command = ["sh", "-c", "echo here >after; sync; cat after"]
            ran = api.post(f"{SANDBOXES}/{sandbox}/run", json={"command": command}, timeout=60).json()
            assert (ran["exit_code"], ran["stdout"]) == (0, "here\n"), ran
            assert api.get(f"{SANDBOXES}/{sandbox}").json()["state"] == "running"
    assert take("failed")["state"] == "ready", "its name is free, and there is room"
    delete("failed")


@pytest.mark.parametrize("mode", ["mock", "local"])
def test_a_full_data_folder(small_data_folder: Path, mode: str) -> None:
    if mode == "local" and NO_QEMU:
        pytest.skip(NO_QEMU)
    manager = start_manager(small_data_folder, mode=mode)
    try:
        with manager.client() as api:
            if mode == "mock":
                assert created(api, "before").json()["state"] == "running"
            filler = fill(small_data_folder)
            # The database's journal may have some room of its own left: it fills, too.
            answers = [created(api, f"full-{number}") for number in range(100 if mode == "mock" else 3)]
            assert_disk_full(answers[-1], mode)
            assert api.get("/health").status_code == 200
            filler.unlink()
            for row in api.get(SANDBOXES, params={"limit": 500}).json()["items"]:
                remove(api, row["id"])
                assert left_of(manager, row["id"]) == []
            if mode == "mock":
                assert created(api, "after").json()["state"] == "running"
                remove(api, "after")
            assert "Traceback" not in manager.log.read_text()
    finally:
        assert stop_manager(manager) == 0


def test_a_manager_that_finds_no_room_to_start(small_data_folder: Path) -> None:
    fill(small_data_folder)
    with pytest.raises(RuntimeError) as ended:
        start_manager(small_data_folder)
    said = str(ended.value)
    assert "error: " in said and "hint: " in said, said
    assert "no space left" in said or "disk is full" in said
    assert "Traceback" not in said


@pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)
def test_a_guest_that_met_a_full_host_goes_on_once_there_is_room(larger_data_folder: Path) -> None:
    """It is halted, not told of an error: what it wrote is whole in the end."""
    manager = start_manager(larger_data_folder, mode="local", program=(MODULE, "slow=0,look=1", NOWHERE))
    try:
        with manager.client() as api, ThreadPoolExecutor(1) as pool:
            assert created(api, "writer").json()["state"] == "running"
            filler = fill(larger_data_folder)
            command = (
                "dd if=/dev/urandom of=big bs=1M count=20 conv=fsync 2>/dev/null; sha256sum < big; sha256sum < big"
            )
            writing = pool.submit(
                api.post, f"{SANDBOXES}/writer/run", json={"command": ["sh", "-c", command]}, timeout=180
            )
            deadline = time.monotonic() + 120
            while "no space left on this host" not in manager.log.read_text():
                assert time.monotonic() < deadline and not writing.done()
                time.sleep(0.2)
            assert api.get("/health").status_code == 200
            filler.unlink()
            written = writing.result(180).json()
            assert written["exit_code"] == 0
            first, second = written["stdout"].splitlines()
            assert first == second
            try_snapshots(manager, api, "writer", larger_data_folder)
            remove(api, "writer")
    finally:
        assert stop_manager(manager) == 0
