"""What else lives on this host and has to do with Atelier, though it is in nobody's way: said before anything is changed.
Only looks."""

from __future__ import annotations

from atelier.host_setup.host import Host
from atelier.host_setup.system_changes import installed_packages, is_active


async def notes(host: Host) -> list[str]:
    found: list[str] = []
    packages = await installed_packages(host)
    if host.path("/sys/class/net/docker0").exists() or packages & {"docker.io", "docker-ce"}:
        found.append(
            "Docker is here: it drops what it does not know. Atelier's network holder lets the sandboxes' packets pass in "
            "the chain DOCKER-USER, which Docker keeps for others, and touches nothing else of Docker's"
        )
    if "caddy" in packages or host.path("/usr/bin/caddy").exists():
        found.append("Caddy is here: its configuration is not touched (see host.caddy, docs/how-to/previews.md)")
    for service in ("ufw.service", "firewalld.service"):
        if await is_active(host, service):
            found.append(
                f"{service} is active: let it pass what the ports of server.listen and ssh.listen get, and forward what "
                "comes from the sandboxes' bridge"
            )
    if host.path("/proc/sys").exists() and not host.path("/dev/kvm").exists():
        found.append("there is no /dev/kvm: sandboxes run in software emulation, about ten times slower")
    return found
