"""Clients that leave in the middle, paths that lead nowhere, and a guest whose own disk is full: in a real guest, over the
real API. Each costs its own call only."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from tests.footprint import left_of
from tests.real_machines import NO_QEMU
from tests.running_manager import RunningManager, start_manager, stop_manager

from atelier import Sandbox
from atelier.model.errors import AtelierError

PATIENCE_SECONDS = 60.0


def begin_request(
    manager: RunningManager, method: str, target: str, body: bytes = b"", length: int | None = None
) -> socket.socket:
    """Send a request, or of its body only the beginning (``length`` is what is promised)."""
    address = urlsplit(manager.url)
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE_SECONDS)
    connection.sendall(
        f"{method} {target} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {manager.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode()
        + body
    )
    return connection


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(sandbox: Sandbox, pattern: str) -> bool:
    return sandbox.run(["pgrep", "-f", pattern]).exit_code == 0


def test_half_an_upload_leaves_the_old_file(local_manager: RunningManager, sandbox: Sandbox) -> None:
    sandbox.files.write("kept", b"old")
    before = {entry.name for entry in sandbox.files.list(".")}
    target = f"/api/v1/sandboxes/{sandbox.id}/files?path=kept"
    with begin_request(local_manager, "PUT", target, os.urandom(3_000_000), length=50_000_000):
        time.sleep(1)
    until(lambda: {entry.name for entry in sandbox.files.list(".")} == before)
    assert sandbox.files.read_bytes("kept") == b"old"
    sandbox.files.remove("kept")


def test_a_run_whose_client_leaves_is_ended_and_an_exec_lives_on(
    local_manager: RunningManager, sandbox: Sandbox
) -> None:
    base = f"/api/v1/sandboxes/{sandbox.id}"
    for route, seconds in (("run", 61234), ("exec", 62345)):
        body = json.dumps({"command": ["sleep", str(seconds)]}).encode()
        with begin_request(local_manager, "POST", f"{base}/{route}", body):
            until(lambda pattern=f"sleep {seconds}": is_running(sandbox, pattern))
    until(lambda: not is_running(sandbox, "sleep 61234"))
    assert is_running(sandbox, "sleep 62345"), "whoever comes back can attach to it"
    sandbox.run(["pkill", "-f", "sleep 62345"])


def test_a_download_whose_client_leaves_is_ended(local_manager: RunningManager, sandbox: Sandbox) -> None:
    sandbox.run("truncate -s 2G sparse", check=True)
    for _ in range(5):
        with begin_request(local_manager, "GET", f"/api/v1/sandboxes/{sandbox.id}/files?path=sparse") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert sandbox.run(["echo", "well"]).stdout == "well\n"
    # The agent has let go of the file: nobody has it open any more.
    held = "sudo sh -c 'ls -l /proc/*/fd 2>/dev/null' | grep -c sparse"
    until(lambda: sandbox.run(held).stdout.strip() == "0")
    sandbox.files.remove("sparse")


@pytest.mark.parametrize("path", ["", "a\0b", "\0", "x" * 5000])
@pytest.mark.parametrize("route", ["files", "files/stat", "files/list", "files/archive"])
def test_paths_that_are_none(local_manager: RunningManager, sandbox: Sandbox, route: str, path: str) -> None:
    with local_manager.client() as api:
        answer = api.get(f"/api/v1/sandboxes/{sandbox.id}/{route}?path={quote(path)}")
    assert answer.status_code == 422, answer.text
    assert set(answer.json()) == {"code", "message", "hint"}
    assert answer.json()["code"] == "invalid_path"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/../../../no-such", 404), ("../../../../no-such", 404), ("/etc/passwd/x", 404), ("/" + "a" * 300, 422)],
)
def test_paths_that_lead_nowhere(local_manager: RunningManager, sandbox: Sandbox, path: str, status: int) -> None:
    with local_manager.client() as api:
        answer = api.get(f"/api/v1/sandboxes/{sandbox.id}/files", params={"path": path})
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"code", "message", "hint"}


def test_dots_end_at_the_guests_own_root(sandbox: Sandbox) -> None:
    assert sandbox.files.read_bytes("/../../../../etc/hostname") == sandbox.files.read_bytes("/etc/hostname")


@pytest.mark.parametrize("name", ["..", "a/b", "%2e%2e", "..%2f..%2fetc", "x" * 300, "%00"])
def test_names_that_are_none(local_manager: RunningManager, name: str) -> None:
    answer = httpx.get(
        f"{local_manager.url}/api/v1/sandboxes/{name}", headers={"Authorization": f"Bearer {local_manager.key}"}
    )
    assert answer.status_code in (404, 422), answer.text
    assert set(answer.json()) == {"code", "message", "hint"}


def test_a_guests_full_disk_is_the_guests_matter(sandbox: Sandbox) -> None:
    """Filled with what takes no room on the host."""
    fill = "i=0; for size in 1G 100M 10M 1M 4K; do while fallocate -l $size full.$i; do i=$((i + 1)); done; done; df ."
    sandbox.run(fill, user="root", check=True)
    try:
        with pytest.raises(AtelierError) as refused:
            sandbox.files.write("more", os.urandom(5_000_000))
        assert refused.value.code != "internal"
        assert "space" in refused.value.message
        assert not sandbox.files.exists("more")
        assert sandbox.run(["echo", "well"]).stdout == "well\n"
    finally:
        sandbox.run("rm -f full.*", user="root", check=True)
    sandbox.files.write("more", os.urandom(5_000_000))
    sandbox.files.remove("more")


@pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)
def test_a_host_without_qemu_says_what_to_install(tmp_path: Path) -> None:
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*"):
            link = tmp_path / program.name
            if not program.name.startswith("qemu") and not link.is_symlink():
                link.symlink_to(program)
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        manager = start_manager(Path(folder), mode="local", variables={"PATH": str(tmp_path)})
        try:
            with manager.client() as api:
                sandbox = api.post("/api/v1/sandboxes", params={"wait": True}, json={}, timeout=120).json()
                assert sandbox["state"] == "failed"
                assert sandbox["failure"]["code"] == "missing_program"
                assert sandbox["failure"]["hint"].startswith("apt-get install ")
                assert api.delete(f"/api/v1/sandboxes/{sandbox['id']}", params={"wait": True}).status_code == 204
            assert left_of(manager, sandbox["id"]) == []
        finally:
            assert stop_manager(manager) == 0
