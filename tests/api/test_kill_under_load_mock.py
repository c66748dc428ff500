"""A manager killed while it has fifty fake sandboxes and as many requests: nothing acknowledged is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.disturbed_manager import EVERYWHERE, MODULE
from tests.kill_under_load import Moment, create_witnesses, kill_again_and_again
from tests.leftovers import leftovers
from tests.running_manager import LocalInstallation, stop_manager


@pytest.fixture
def installation() -> Iterator[LocalInstallation]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:  # short: sockets lie below it
        # Real steps take their time, too; else hardly one would be under way at the kill.
        slow = (MODULE, "slow=0.03", EVERYWHERE)
        made = LocalInstallation(Path(folder), mode="mock", program=slow)
        try:
            yield made
        finally:
            if made.manager.process.poll() is None:
                stop_manager(made.manager)


def test_a_kill_under_load_loses_and_leaks_nothing(installation: LocalInstallation) -> None:
    witnesses = create_witnesses(installation, 50)
    kill_again_and_again(installation, witnesses, [], 40, (Moment(5), Moment(30), Moment(60)))
    assert leftovers(installation.folder) == []
