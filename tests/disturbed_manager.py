"""A manager that ends or stands still at a place of a saga: ``atelier.manager`` with its steps disturbed.

``python -m tests.disturbed_manager ACTION PLACE OPTION ...``. ACTION ``crash``: end there by ``os._exit``, as a kill
would; ``hold=FILE``: make FILE there and wait until somebody removes it; ``slow=SECONDS``: take so long. With
``,drain=SECONDS`` behind it, an end waits so long for what is under way, and not half a minute; with ``,look=SECONDS``,
guests that met a full disk are looked at so often, and not each ten seconds. PLACE is a ``sabotage.Place``,
``everywhere`` or ``nowhere``; the options are the manager's.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from tests.lifecycle.sabotage import Place, disturb

from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.manager import __main__ as program
from atelier.manager import installation

CRASHED = 77
MODULE = "tests.disturbed_manager"
EVERYWHERE, NOWHERE = "everywhere", "nowhere"
_INTERVALS = {"drain": "_DRAIN_SECONDS", "look": "_FULL_DISK_SECONDS"}


def main(action: str, place: str, options: list[str]) -> int:
    action, *wishes = action.split(",")
    verb, _, value = action.partition("=")
    for wish in wishes:
        name, _, seconds = wish.partition("=")
        assert hasattr(installation, _INTERVALS[name])
        setattr(installation, _INTERVALS[name], float(seconds))

    async def disturbance(reached: Place) -> None:
        if place not in (EVERYWHERE, str(reached)):
            return
        if verb == "crash":
            os._exit(CRASHED)
        elif verb == "slow":
            await asyncio.sleep(float(value))
        elif verb == "hold":
            flag = Path(value)
            flag.touch()
            while flag.exists():
                await asyncio.sleep(0.05)

    build = installation.build_lifecycle

    def build_disturbed(*parts: Any) -> SandboxLifecycle:
        lifecycle = build(*parts)
        disturb(lifecycle, disturbance)
        return lifecycle

    installation.build_lifecycle = build_disturbed
    return program.main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
