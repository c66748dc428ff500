"""A manager in mock mode as a process of its own, shared by the tests of this folder, and a client that speaks to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest


@dataclass(frozen=True)
class RunningManager:
    url: str
    key: str
    data_dir: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=30,
            **options,  # type: ignore[arg-type]
        )


def start_manager(folder: Path, *options: str, mode: str = "mock") -> RunningManager:
    """Start ``atelier.manager`` on a free port with everything of its own below ``folder``; ends by ``stop_manager``."""
    environment = {
        **os.environ,
        "ATELIER_DATA_DIR": str(folder / "data"),
        "ATELIER_RUN_DIR": str(folder / "run"),
        "ATELIER_SERVER_MODE": mode,
    }
    environment.pop("ATELIER_API_KEY", None)
    environment.pop("ATELIER_API_URL", None)
    log = (folder / "manager.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "atelier.manager", "--listen", "127.0.0.1:0", *options],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    token_file = folder / "data" / "token.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the manager ended at once: {(folder / 'manager.log').read_text()}")
        try:
            token = json.loads(token_file.read_text())
            if httpx.get(f"{token['api_url']}/health", timeout=1).status_code == 200:
                return RunningManager(token["api_url"], token["api_key"], folder / "data", environment, process)
        except (OSError, ValueError, httpx.HTTPError):
            pass
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the manager does not answer: {(folder / 'manager.log').read_text()}")


def stop_manager(manager: RunningManager) -> int:
    manager.process.send_signal(signal.SIGINT)
    try:
        return manager.process.wait(60)
    except subprocess.TimeoutExpired:
        manager.process.kill()
        raise


@pytest.fixture(scope="session")
def manager() -> Iterator[RunningManager]:
    # Short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        running = start_manager(Path(folder))
        try:
            yield running
        finally:
            stop_manager(running)


@pytest.fixture
def api(manager: RunningManager) -> Iterator[httpx.Client]:
    """A client with the right key; sandboxes that a test leaves are destroyed after it."""
    with manager.client() as client:
        yield client
        for sandbox in client.get("/api/v1/sandboxes", params={"limit": 500}).json()["items"]:
            client.delete(f"/api/v1/sandboxes/{sandbox['id']}", params={"wait": True})


@pytest.fixture
def sandbox(api: httpx.Client) -> str:
    """Id of a running sandbox."""
    answer = api.post("/api/v1/sandboxes", params={"wait": True}, json={})
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "running", answer.text
    return answer.json()["id"]
