"""Fixtures of the contract tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from agent_fixture import RunningAgent, running_agent


@pytest.fixture(scope="module")
def agent() -> Iterator[RunningAgent]:
    """A guest agent on loopback, one per test module, whose default user is root."""
    with running_agent() as started:
        yield started
