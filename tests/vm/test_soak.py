"""Real sandboxes created, used and destroyed over and over: manager and gateway grow by nothing."""

from __future__ import annotations

from tests.running_manager import local_installation
from tests.soak import soak

WARM_UP = 2
CYCLES = 5
"""Twenty take too long for every run where guests are emulated; they were run by hand, with the same bounds."""


def test_real_sandboxes_leave_no_cost_behind() -> None:
    with local_installation() as installation:
        soak(installation, WARM_UP, CYCLES)
