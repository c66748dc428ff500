"""Another version of Atelier on a host: installed beside running sandboxes, then the services, one after the other."""

from __future__ import annotations

from pathlib import Path

from atelier.host_setup.host import Host
from atelier.host_setup.plan import Plan
from atelier.host_setup.system_changes import is_enabled
from atelier.host_setup.units import SERVICES
from atelier.model.errors import CommandError, HostError


async def install_release(host: Host, python: Path, source: str) -> None:
    """Raises HostError (``update_failed``): the version that was there is there still, pip replaces only what it could
    build."""
    try:
        await host.run(str(python), "-m", "pip", "install", "--upgrade", source)
    except CommandError as error:
        raise HostError(
            f"{source} cannot be installed: {error.message}", code="update_failed", hint="the present version goes on"
        ) from error


async def restart_services(host: Host, plan: Plan) -> None:
    """The new version sets the host up, then the services are started again: guests' channels and links go on while
    gateway and network holder are away, and the manager finds its machines again."""
    await host.run(str(plan.python), "-P", "-m", "atelier.host_setup", "init", "--yes")
    for name in SERVICES:
        if await is_enabled(host, name):
            await host.run("systemctl", "restart", name)
