"""Manager and gateway killed while clients create and destroy real sandboxes: nothing acknowledged is lost, no guest
that ran is disturbed, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kill_under_load import Promises, Witness, check_promises, destroy_all, kill_in_the_middle
from tests.leftovers import leftovers
from tests.running_manager import LocalInstallation, local_installation

CREATES = 14
WITNESSES = 2


@pytest.fixture(scope="module")
def installation() -> Iterator[LocalInstallation]:
    with local_installation() as made:
        yield made


def test_a_kill_under_load_loses_and_leaks_nothing(installation: LocalInstallation) -> None:
    witnesses = [Witness.create(installation, f"witness-{number}") for number in range(WITNESSES)]
    victim = installation.create("victim")["id"]
    promises = Promises()
    victims = [victim]
    # While requests are answered; while disks are made and the first machines start; while guests boot.
    for number, (answers, then_seconds) in enumerate(((6, 0), (CREATES, 0.7), (CREATES, 5))):
        names = [f"load-{number}-{each}" for each in range(CREATES)]
        kill_in_the_middle(installation, promises, names, victims, answers=answers, then_seconds=then_seconds)
        installation.start()
        for witness in witnesses:
            witness.check(installation)
        check_promises(installation, promises)
        # What is still waiting to boot goes with the next load.
        victims = list(promises.owed.values())
    assert promises.owed, "else the last kill came too late to show anything"
    destroy_all(installation)
    assert leftovers(installation.folder) == []
