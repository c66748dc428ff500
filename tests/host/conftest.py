"""Hosts for the tests of this folder. They take minutes each, so only ``scripts/test-host`` runs them."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.host.emulated_host import EmulatedHost, SavedHost, save_further, save_host, started_from
from tests.host.host_image import ensure_image, why_not
from tests.host.production_host import Operator, make_production_host

from atelier.config.settings import load_settings

collect_ignore_glob = [] if os.environ.get("ATELIER_TEST_HOST") == "1" else ["test_*.py"]


@pytest.fixture(scope="session")
def saved_host(tmp_path_factory: pytest.TempPathFactory) -> SavedHost:
    if missing := why_not():
        pytest.skip(missing)
    return save_host(ensure_image(load_settings().cache_dir), tmp_path_factory.mktemp("saved-host"))


@pytest.fixture
def emulated_host(saved_host: SavedHost, tmp_path: Path) -> Generator[EmulatedHost]:
    with started_from(saved_host, tmp_path) as host:
        yield host


@pytest.fixture(scope="module")
def shared_host(saved_host: SavedHost, tmp_path_factory: pytest.TempPathFactory) -> Generator[EmulatedHost]:
    """One for all tests of a file that leave it as they find it."""
    with started_from(saved_host, tmp_path_factory.mktemp("shared-host")) as host:
        yield host


@pytest.fixture(scope="session")
def saved_production_host(saved_host: SavedHost, tmp_path_factory: pytest.TempPathFactory) -> SavedHost:
    """Made by ``atelier host init``, without a sandbox."""
    return save_further(saved_host, tmp_path_factory.mktemp("production-host"), make_production_host)


@pytest.fixture
def operator(saved_production_host: SavedHost, tmp_path: Path) -> Generator[Operator]:
    """Of a production host of one's own."""
    with started_from(saved_production_host, tmp_path) as host:
        yield Operator(host)
