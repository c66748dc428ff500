"""A manager killed while it has a hundred fake sandboxes and as many requests: nothing acknowledged is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.kill_under_load import Promises, Witness, check_promises, destroy_all, kill_in_the_middle
from tests.leftovers import leftovers
from tests.running_manager import LocalInstallation, stop_manager

COUNT = 100


@pytest.fixture
def installation() -> Iterator[LocalInstallation]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:  # short: sockets lie below it
        made = LocalInstallation(Path(folder), mode="mock")
        try:
            yield made
        finally:
            if made.manager.process.poll() is None:
                stop_manager(made.manager)


def test_a_kill_under_load_loses_and_leaks_nothing(installation: LocalInstallation) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = [f"witness-{number}" for number in range(COUNT)]
        witnesses = list(pool.map(lambda name: Witness.create(installation, name), names))
    promises = Promises()
    victims: list[str] = []
    for number, answers in enumerate((5, 30, 60)):
        names = [f"load-{number}-{each}" for each in range(40)]
        kill_in_the_middle(installation, promises, names, victims, answers=answers)
        installation.start()
        for witness in witnesses:
            witness.check(installation)
        check_promises(installation, promises)
        victims = list(promises.owed.values())
    destroy_all(installation)
    assert leftovers(installation.folder) == []
