"""A manager in mock mode, shared by the tests of this folder, and a client that speaks to it; or one of the test's own,
inside of its process."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from tests.preview_stage import PreviewStage, echo_request, preview_stage
from tests.running_manager import RunningManager, start_manager, stop_manager

from .manager_inside import ManagerInside, open_manager_inside


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


@pytest.fixture(scope="module")
def stage() -> Iterator[PreviewStage]:
    """Of the tests of previews: with a server on port 8000 of each sandbox that says what it was sent."""
    with tempfile.TemporaryDirectory(prefix="atl-") as folder, preview_stage(Path(folder)) as made:
        made.channels.servers[8000] = echo_request
        yield made
        assert "Traceback" not in made.logs()


@pytest.fixture
async def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ManagerInside]:
    async with open_manager_inside(tmp_path, monkeypatch) as opened:
        yield opened
