"""``atelier host doctor``: the checks of ``atelier doctor``, and those that root alone can make. Changes nothing."""

from __future__ import annotations

import json

from atelier.config.settings import NetworkChoice
from atelier.host.checks.edge import check_edge
from atelier.host.checks.local import CheckResult, CheckStatus, check_machine
from atelier.host.privilege import GROUPS, PROGRAM
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Journal
from atelier.host_setup.plan import Plan
from atelier.host_setup.provision import survey
from atelier.host_setup.units import SERVICES

_POOL_ALARM_PERCENT = 80.0


async def check_host(host: Host, journal: Journal, plan: Plan) -> list[CheckResult]:
    settings = plan.settings
    address = (settings.listen.host, settings.listen.port)
    results = [
        each
        for each in check_machine(settings.data_dir, settings.cache_dir, settings.run_dir, address)
        # Its own manager holds the port, and KVM is not for root to use.
        if each.name not in ("listen address", "kvm")
    ]
    results += await _check_changes(host, journal, plan)
    for name in SERVICES:
        if name.startswith("atelier-network") and settings.network is NetworkChoice.CLOSED:
            continue
        results.append(await _check_service(host, name))
    results.append(await _check_new_privileges(host))
    results.append(await _check_sudo(host, plan.host.user))
    results.append(await _check_kvm(host, plan.host.user))
    if group := settings.production.volume_group:
        results.append(await _check_pool(host, group, settings.production.thin_pool))
    if settings.public_url.startswith("https:"):
        results += check_edge(settings.public_url, settings.previews.domain, settings.previews.port)
    return results


async def _check_changes(host: Host, journal: Journal, plan: Plan) -> list[CheckResult]:
    """Whether the host still is as init has made it."""
    found: list[CheckResult] = []
    for area in plan.areas():
        seen = await survey(host, journal, [area])
        for look in seen.conflicts:
            found.append(CheckResult(area.name, CheckStatus.FAILED, look.words, look.remedy))
        for _, words in seen.wanted:
            found.append(
                CheckResult(area.name, CheckStatus.FAILED, f"to be done: {words}", f"atelier host {area.name}")
            )
        if not seen.conflicts and not seen.wanted:
            found.append(CheckResult(area.name, CheckStatus.OK, f"{area.title}: as it should be"))
    if begun := [f"{each.kind} {each.key}" for each in journal.entries if not each.is_done]:
        found.append(
            CheckResult("init", CheckStatus.FAILED, f"was interrupted at {', '.join(begun)}", "atelier host init")
        )
    return found


async def _check_service(host: Host, name: str) -> CheckResult:
    said = (await host.ask("systemctl", "show", "--property=ActiveState,NRestarts", name)) or ""
    values = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if values.get("ActiveState") != "active":
        return CheckResult(
            name, CheckStatus.FAILED, f"it is {values.get('ActiveState', 'not there')}", f"journalctl -u {name}"
        )
    if int(values.get("NRestarts", "0") or 0) > 0:
        return CheckResult(
            name,
            CheckStatus.WARNING,
            f"it runs, and was started again {values['NRestarts']} times",
            f"journalctl -u {name}",
        )
    return CheckResult(name, CheckStatus.OK, "it runs")


async def _check_new_privileges(host: Host) -> CheckResult:
    """Whether the running manager could use sudo. Source: proc(5): NoNewPrivs."""
    name = "manager's rights"
    pid = (await host.ask("systemctl", "show", "--property=MainPID", "--value", SERVICES[-1]) or "").strip()
    status = host.read(f"/proc/{pid}/status") if pid.isdecimal() and pid != "0" else ""
    for line in status.splitlines():
        if line.startswith("NoNewPrivs:"):
            if line.split()[1] == "0":
                return CheckResult(name, CheckStatus.OK, "sudo may become root for it")
            return CheckResult(
                name,
                CheckStatus.FAILED,
                "its service has NoNewPrivileges: sudo cannot become root",
                "systemctl cat atelier-manager: take out what was added to it (docs/how-to/production-host.md)",
            )
    return CheckResult(name, CheckStatus.WARNING, "the manager does not run", "systemctl start atelier-manager")


async def _check_sudo(host: Host, user: str) -> CheckResult:
    name = "sudo"
    for group in GROUPS:
        allowed = await host.ask("runuser", "--user", user, "--", "sudo", "-n", "-l", "--", str(PROGRAM), group)
        if allowed is None:
            return CheckResult(name, CheckStatus.FAILED, f"{user} may not start {PROGRAM} {group}", "atelier host init")
    return CheckResult(name, CheckStatus.OK, f"{user} may start {PROGRAM}, and it alone")


async def _check_kvm(host: Host, user: str) -> CheckResult:
    """As the manager meets it: which groups its user is in decides."""
    name, node = "kvm", "/dev/kvm"
    if not host.path(node).exists():
        return CheckResult(
            name,
            CheckStatus.WARNING,
            f"there is no {node}: sandboxes run in software emulation, about ten times slower",
            "enable virtualization in the firmware, or use a host that offers nested virtualization",
        )
    if await host.ask("runuser", "--user", user, "--", "test", "-r", node, "-a", "-w", node) is None:
        return CheckResult(
            name,
            CheckStatus.FAILED,
            f"{user} may not open {node}: sandboxes run in software emulation",
            f"usermod --append --groups kvm {user} && systemctl restart atelier-manager; ls -l {node} tells its group",
        )
    return CheckResult(name, CheckStatus.OK, f"{user} may open {node}; a test guest decides whether it is used")


async def _check_pool(host: Host, group: str, pool: str) -> CheckResult:
    name = "thin pool"
    said = await host.ask(
        *("lvs", "--reportformat", "json", "--options", "data_percent,metadata_percent", f"{group}/{pool}")
    )
    try:
        row = json.loads(said or "")["report"][0]["lv"][0]
        data, metadata = float(row["data_percent"]), float(row["metadata_percent"])
    except (ValueError, KeyError, IndexError):
        return CheckResult(
            name, CheckStatus.FAILED, f"{group}/{pool} does not answer", f"lvs {group}; atelier host storage"
        )
    words = f"{group}/{pool}: data {data:.0f} %, metadata {metadata:.0f} % full"
    if max(data, metadata) >= _POOL_ALARM_PERCENT:
        return CheckResult(
            name, CheckStatus.WARNING, words, f"vgextend {group} brings another disk; or destroy sandboxes"
        )
    return CheckResult(name, CheckStatus.OK, words)
