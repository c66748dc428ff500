"""What goes before anything of a host is taken back: the sandboxes come to an end in order, by the manager's own code, and
their network with them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from atelier.host.line_server import ask
from atelier.host_setup.host import Host
from atelier.host_setup.journal import FOLDER, Journal
from atelier.host_setup.plan import CONFIG
from atelier.host_setup.system_changes import is_active
from atelier.host_setup.units import SERVICES
from atelier.model.errors import CommandError, HostError
from atelier.model.layout import RunLayout

_CLOSE_SECONDS = 60.0


async def end_sandboxes(
    host: Host, journal: Journal, run_dir: Path, *, destroy: bool, say: Callable[[str], None]
) -> None:
    """Stopped, or destroyed; nothing to do where the services do not run. Raises HostError (``sandboxes_left``)."""
    users = [each.key for each in journal.entries if each.kind == "user"]
    gateway, manager = SERVICES[1], SERVICES[2]
    if not users or not await is_active(host, gateway):
        return
    await host.ask("systemctl", "stop", manager)
    say("ending the sandboxes")
    try:
        await host.run(
            *("runuser", "--user", users[0], "--", "env", f"HOME={FOLDER}", f"ATELIER_CONFIG={CONFIG}"),
            *(sys.executable, "-P", "-m", "atelier.manager", "--down", "destroy" if destroy else "stop"),
        )
    except CommandError as error:
        await host.ask("systemctl", "start", manager)
        raise HostError(
            f"the sandboxes do not come to an end: {error.message}",
            code="sandboxes_left",
            hint="end them by hand (atelier rm, atelier stop), then uninstall again",
        ) from error
    # The holder removes bridge and rules, and ends; its service counts that as done.
    with contextlib.suppress(OSError, ValueError, TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await ask(host.path(RunLayout(run_dir).network_socket), {"operation": "close"})
