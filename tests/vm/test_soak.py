"""Real sandboxes created, used and destroyed over and over: manager and gateway grow by nothing.

As by default, all but the first are restored from a template.
"""

from __future__ import annotations

from tests.running_manager import WITH_TEMPLATES, local_installation, wait_for_template
from tests.soak import soak

WARM_UP = 2
CYCLES = 5
"""Twenty take too long for every run where guests are emulated; they were run by hand, with the same bounds."""


def test_real_sandboxes_leave_no_cost_behind() -> None:
    with local_installation(WITH_TEMPLATES) as installation:
        installation.create("first")
        wait_for_template(installation.manager)
        installation.call("DELETE", "/sandboxes/first?wait=true", expected=204)
        soak(installation, WARM_UP, CYCLES)
