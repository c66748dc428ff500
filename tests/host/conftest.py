"""Hosts for the tests of this folder. They take minutes each, so only ``scripts/test-host`` runs them."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import pytest
from tests.host.emulated_host import EmulatedHost, SavedHost, save_further, save_host, started_from
from tests.host.host_image import ensure_image, why_not
from tests.host.production_host import Making, Operator, make_firecracker_host, make_production_host

from atelier.config.settings import load_settings

FIRECRACKER_RELEASE = Path(given) if (given := os.environ.get("ATELIER_TEST_FIRECRACKER")) else None
"""A folder with a true Firecracker and its jailer, from ``scripts/test-host --firecracker``."""

collect_ignore_glob = [] if os.environ.get("ATELIER_TEST_HOST") == "1" else ["test_*.py"]

_LONGEST_FIRST = ("test_sandboxes.py", "test_lvm_storage.py")

T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that two workers end at about the same time."""
    first = {Path(__file__).with_name(name): place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def once_per_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What ``make`` makes in a folder, by the first of several workers that needs it; the others wait."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    made = folder / "made"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            made.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def saved_host(tmp_path_factory: pytest.TempPathFactory) -> SavedHost:
    if missing := why_not():
        pytest.skip(missing)

    def save(folder: Path) -> SavedHost:
        return save_host(ensure_image(load_settings().cache_dir), folder, firecracker=FIRECRACKER_RELEASE)

    return once_per_run(tmp_path_factory, "saved-host", save)


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
def made_production_host(saved_host: SavedHost, tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedHost, Making]:
    """By ``atelier host init``, once per run: without a sandbox, but with what they are made from."""
    return once_per_run(
        tmp_path_factory, "production-host", lambda folder: save_further(saved_host, folder, make_production_host)
    )


@pytest.fixture(scope="session")
def made_firecracker_host(
    made_production_host: tuple[SavedHost, Making], tmp_path_factory: pytest.TempPathFactory
) -> SavedHost:
    """The same with Firecracker in place of QEMU."""
    base = made_production_host[0]
    saved, _ = once_per_run(
        tmp_path_factory, "firecracker-host", lambda folder: save_further(base, folder, make_firecracker_host)
    )
    return saved


# Without a Firecracker its run is absent: a skip could be taken for one that passed.
@pytest.fixture(scope="module", params=["qemu", *(["firecracker"] if FIRECRACKER_RELEASE else [])])
def operator(
    request: pytest.FixtureRequest,
    made_production_host: tuple[SavedHost, Making],
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[Operator]:
    """Of a production host for all tests of a file that leave it as they find it."""
    is_qemu = request.param == "qemu"
    saved = made_production_host[0] if is_qemu else request.getfixturevalue("made_firecracker_host")
    with started_from(saved, tmp_path_factory.mktemp("operated-host")) as host:
        yield Operator(host, request.param)


@pytest.fixture(scope="module")
def production_host(
    made_production_host: tuple[SavedHost, Making], tmp_path_factory: pytest.TempPathFactory
) -> Generator[EmulatedHost]:
    """One for all tests of a file that leave it as they find it."""
    with started_from(made_production_host[0], tmp_path_factory.mktemp("shared-production-host")) as host:
        yield host
