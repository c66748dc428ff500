"""A manager in local mode and one running sandbox, real all through, shared by the tests that only work inside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.running_manager import WITH_TEMPLATES, RunningManager, running_local_manager

from atelier import Sandbox


@pytest.fixture(scope="session")
def local_manager() -> Iterator[RunningManager]:
    with running_local_manager(WITH_TEMPLATES) as running:
        yield running


@pytest.fixture(scope="session")
def sandbox(local_manager: RunningManager) -> Iterator[Sandbox]:
    made = Sandbox.create(name="shared", api_url=local_manager.url, api_key=local_manager.key, timeout_seconds=1200)
    with made:
        yield made
