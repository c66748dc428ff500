"""A manager in local mode and one running sandbox, real all through, shared by the tests that only work inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.real_machines import NO_QEMU
from tests.running_manager import RunningManager, start_manager, stop_manager

from atelier import Sandbox


@pytest.fixture(scope="session")
def local_manager() -> Iterator[RunningManager]:
    if NO_QEMU:
        pytest.skip(NO_QEMU)
    # Short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        running = start_manager(Path(folder), mode="local")
        try:
            yield running
        finally:
            stop_manager(running)


@pytest.fixture(scope="session")
def sandbox(local_manager: RunningManager) -> Iterator[Sandbox]:
    made = Sandbox.create(name="shared", api_url=local_manager.url, api_key=local_manager.key, timeout_seconds=1200)
    with made:
        yield made
