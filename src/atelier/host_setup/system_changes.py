"""Changes that programs of the system make: packages, the account, kernel settings and modules, services."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from atelier.host_setup.changes import KEPT, THERE, Look, Note, UndoOptions, foreign, missing
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record
from atelier.model.errors import CommandError, HostError

_APT = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "--no-install-recommends")
_INSTALLED = re.compile(r"^Inst (\S+)", re.MULTILINE)
_PURGED = re.compile(r"^(?:Purg|Remv) (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PackagesChange:
    """Debian packages. The record has all that came with them."""

    names: tuple[str, ...]

    kind: ClassVar[str] = "packages"

    @property
    def key(self) -> str:
        return "debian"

    async def look(self, host: Host, own: Record | None) -> Look:
        installed = await installed_packages(host)
        if lacking := [name for name in self.names if name not in installed]:
            return missing(f"install {', '.join(lacking)}")
        return THERE

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        installed = await installed_packages(host)
        lacking = [name for name in self.names if name not in installed]
        plan = await host.ask(*_APT, "--simulate", "install", *lacking)
        if plan is None:
            # Its lists may be empty, or old.
            await host.run(*_APT, "update")
            plan = await host.run(*_APT, "--simulate", "install", *lacking)
        before: list[str] = own["installed"] if own else []
        coming = [name for name in _INSTALLED.findall(plan) if name not in installed and name not in before]
        note({"installed": [*before, *coming]})
        await host.run(*_APT, "install", *lacking)


async def undo_packages(host: Host, record: Record, options: UndoOptions) -> str:
    """What others have come to need meanwhile keeps them all."""
    installed = await installed_packages(host)
    names: list[str] = [name for name in record["installed"] if name in installed]
    if not names:
        return ""
    if not options.packages:
        return f"{KEPT}the packages {' '.join(names)}"
    would_go = set(_PURGED.findall(await host.run(*_APT, "--simulate", "purge", *names)))
    if others := sorted(name for name in would_go if name.partition(":")[0] not in names):
        return f"{KEPT}the packages {' '.join(names)}: {', '.join(others)} would go with them"
    await host.run(*_APT, "purge", *names)
    return ""


async def installed_packages(host: Host) -> set[str]:
    listed = await host.ask("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n")
    lines = (line.split() for line in (listed or "").splitlines())
    return {words[0] for words in lines if words[1:] == ["installed"]}


@dataclass(frozen=True, slots=True)
class UserChange:
    """The account that Atelier runs as, with a group of its name, and in the group ``kvm`` where there is one."""

    name: str
    home: str

    kind: ClassVar[str] = "user"

    @property
    def key(self) -> str:
        return self.name

    async def look(self, host: Host, own: Record | None) -> Look:
        has_user, has_group = host.user_id(self.name) is not None, host.group_id(self.name) is not None
        if not has_user and not has_group:
            return missing(f"make the user {self.name}")
        if own is None or not has_user:
            what = f"the {'user' if has_user else 'group'} {self.name}"
            return foreign(
                f"{what} is there, and not of Atelier's making",
                'choose another name in the configuration: [host] user = "..."; or remove it, if nobody needs it: '
                f"{'userdel' if has_user else 'groupdel'} {self.name}",
            )
        return missing(f"let {self.name} use KVM") if self._lacks_kvm(host) else THERE

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        note({"name": self.name})
        if host.user_id(self.name) is None:
            # The range of ids below it is what images are built with.
            await host.run(
                *("useradd", "--system", "--user-group", "--add-subids-for-system", "--no-create-home"),
                *("--home-dir", self.home, "--shell", "/usr/sbin/nologin", "--comment", "Atelier", self.name),
            )
        if self._lacks_kvm(host):
            await host.run("usermod", "--append", "--groups", "kvm", self.name)

    def _lacks_kvm(self, host: Host) -> bool:
        return host.group_id("kvm") is not None and self.name not in host.members("kvm")


async def undo_user(host: Host, record: Record, options: UndoOptions) -> str:
    if host.user_id(record["name"]) is None:
        return ""
    if not options.data:
        return f"{KEPT}the user {record['name']}, who owns the data"
    try:
        await host.run("userdel", record["name"])
    except CommandError as error:
        return f"{KEPT}the user {record['name']}: {error.message}"
    return ""


@dataclass(frozen=True, slots=True)
class LiveSettingChange:
    """A kernel setting as it is now; a file in /etc/sysctl.d has it after a reboot. ``needed_by_others``: a folder of
    /sys whose presence says that somebody else needs it by now."""

    name: str
    value: str
    needed_by_others: str = ""

    kind: ClassVar[str] = "setting"

    @property
    def key(self) -> str:
        return self.name

    async def look(self, host: Host, own: Record | None) -> Look:
        now = host.read(_setting_file(self.name)).strip()
        return THERE if now == self.value else missing(f"set {self.name} to {self.value}")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        before = own["before"] if own else host.read(_setting_file(self.name)).strip()
        note({"name": self.name, "value": self.value, "before": before, "needed_by_others": self.needed_by_others})
        await host.run("sysctl", "--quiet", "--write", f"{self.name}={self.value}")


async def undo_live_setting(host: Host, record: Record, options: UndoOptions) -> str:
    name: str = record["name"]
    if host.read(_setting_file(name)).strip() != record["value"] or not record["before"]:
        return ""
    others: str = record["needed_by_others"]
    if others and host.path(others).exists():
        return f"{name} stays {record['value']}: {Path(others).name} needs it, too"
    await host.run("sysctl", "--quiet", "--write", f"{name}={record['before']}")
    return ""


def _setting_file(name: str) -> str:
    return f"/proc/sys/{name.replace('.', '/')}"


@dataclass(frozen=True, slots=True)
class ModulesChange:
    """Modules loaded now; a file in /etc/modules-load.d loads them at boot. They stay when Atelier goes: unloading is no
    way back to what was, and a reboot is."""

    names: tuple[str, ...]

    kind: ClassVar[str] = "modules"

    @property
    def key(self) -> str:
        return "loaded"

    async def look(self, host: Host, own: Record | None) -> Look:
        lacking = self._lacking(host)
        return missing(f"load the kernel's modules {', '.join(lacking)}") if lacking else THERE

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        # One that is built in is no failure of modprobe's.
        await host.run("modprobe", "--all", *self._lacking(host))

    def _lacking(self, host: Host) -> list[str]:
        return [each for each in self.names if not host.path(f"/sys/module/{each}").exists()]


@dataclass(frozen=True, slots=True)
class ServicesChange:
    """Services that run, and are started at boot, in this order. ``run_folders``: what they leave where
    nothing outlives a reboot."""

    names: tuple[str, ...]
    run_folders: tuple[str, ...] = ()

    kind: ClassVar[str] = "services"

    @property
    def key(self) -> str:
        return " ".join(self.names)

    async def look(self, host: Host, own: Record | None) -> Look:
        lacking = [name for name in self.names if not await is_active(host, name) or not await is_enabled(host, name)]
        return missing(f"start {', '.join(lacking)}") if lacking else THERE

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        note({"names": list(self.names), "run_folders": list(self.run_folders)})
        await host.run("systemctl", "daemon-reload")
        for name in self.names:
            try:
                await host.run("systemctl", "enable", "--now", name)
            except CommandError as error:
                tail = await host.ask("journalctl", "--unit", name, "--lines", "5", "--output", "cat", "--no-pager")
                raise HostError(
                    f"the service {name} does not start: {(tail or error.message).strip()}",
                    code="service_failed",
                    hint=f"its log: journalctl -u {name}; when it is mended: atelier host init",
                ) from error


async def undo_services(host: Host, record: Record, options: UndoOptions) -> str:
    for name in reversed(record["names"]):
        if await host.ask("systemctl", "cat", name) is not None:
            await host.run("systemctl", "disable", "--now", name)
    for folder in record["run_folders"]:
        shutil.rmtree(host.path(folder), ignore_errors=True)
    return ""


async def is_active(host: Host, service: str) -> bool:
    return (await host.ask("systemctl", "is-active", service) or "").strip() == "active"


async def is_enabled(host: Host, service: str) -> bool:
    return (await host.ask("systemctl", "is-enabled", service) or "").strip() in ("enabled", "static")
