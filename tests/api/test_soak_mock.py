"""Fake sandboxes created, used and destroyed over and over: the manager grows by nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.running_manager import LocalInstallation, stop_manager
from tests.soak import soak

WARM_UP = 50
CYCLES = 200


def test_fake_sandboxes_leave_no_cost_behind() -> None:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:  # short: sockets lie below it
        installation = LocalInstallation(Path(folder), mode="mock")
        try:
            soak(installation, WARM_UP, CYCLES)
        finally:
            stop_manager(installation.manager)
