"""Manager and gateway killed while clients create and destroy real sandboxes: nothing acknowledged is lost, no guest
that ran is disturbed, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kill_under_load import Moment, create_witnesses, kill_again_and_again
from tests.leftovers import leftovers
from tests.running_manager import LocalInstallation, local_installation

CREATES = 4
MOMENTS = (
    # While requests are answered; while disks are made and the first machines start; while guests boot.
    Moment(3),
    Moment(CREATES, 0.7),
    Moment(CREATES, 5),
)


@pytest.fixture(scope="module")
def installation() -> Iterator[LocalInstallation]:
    with local_installation() as made:
        yield made


def test_a_kill_under_load_loses_and_leaks_nothing(installation: LocalInstallation) -> None:
    victim, *witnesses = create_witnesses(installation, 2)
    kill_again_and_again(installation, witnesses, [victim.sandbox_id], CREATES, MOMENTS)
    assert leftovers(installation.folder) == []
