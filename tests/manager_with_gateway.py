"""The manager's program with the fakes of mock mode and a real gateway beside them: what leads into the fake guests is the
test's (tests/preview_stage.py)."""

from __future__ import annotations

import sys
from dataclasses import replace

from atelier.config.settings import Settings
from atelier.db.installation import Installation as Ids
from atelier.manager import installation
from atelier.manager.__main__ import main
from atelier.manager.gateway_process import GatewayProcess
from atelier.manager.wiring import Drivers, choose_drivers
from atelier.model.layout import DataLayout, RunLayout


async def choose(settings: Settings, data: DataLayout, run: RunLayout, ids: Ids) -> Drivers:
    gateway = GatewayProcess(run.root, run.gateway_socket, data.logs / "gateway.log")
    return replace(await choose_drivers(settings, data, run, ids), gateway=gateway)


if __name__ == "__main__":
    installation.choose_drivers = choose
    sys.exit(main())
