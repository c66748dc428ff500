"""Caddy in front of Atelier, where the host has none of its own: with a configuration beside the one that Debian's package
brings, which is not touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from atelier.config.errors import InvalidSettingError
from atelier.config.host import HostSettings
from atelier.config.settings import Settings
from atelier.host_setup.changes import (
    THERE,
    Change,
    Check,
    FileChange,
    FolderChange,
    Look,
    Note,
    UndoOptions,
    foreign,
    missing,
)
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Journal, Record
from atelier.host_setup.system_changes import installed_packages
from atelier.host_setup.units import deploy_folder

FOLDER = "/etc/atelier/caddy"
EDGE_FOLDER = "/run/atelier-edge"
_DROP_IN = "/etc/systemd/system/caddy.service.d"


@dataclass(frozen=True, slots=True)
class CaddyCheck(Check):
    """A Caddy that Atelier has not installed serves others."""

    kind: ClassVar[str] = "caddy"

    @property
    def key(self) -> str:
        return "installed"

    async def look(self, host: Host, own: Record | None) -> Look:
        if "caddy" not in await installed_packages(host):
            return THERE
        came_with = Journal.open(host).find("packages", "debian") or {"installed": []}
        if "caddy" in came_with["installed"]:
            return THERE
        return foreign(
            "this host has a Caddy of its own",
            "set host.caddy = false, and let yours import deploy/caddy/Caddyfile (docs/how-to/previews.md)",
        )


@dataclass(frozen=True, slots=True)
class CaddyServiceChange:
    """Caddy started anew with Atelier's configuration: ``marks`` is what of it the running one has."""

    marks: str

    kind: ClassVar[str] = "caddy service"

    @property
    def key(self) -> str:
        return "caddy"

    async def look(self, host: Host, own: Record | None) -> Look:
        return (
            THERE if own is not None and own["marks"] == self.marks else missing("start Caddy with its configuration")
        )

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        await host.run("systemctl", "daemon-reload")
        await host.run("systemctl", "enable", "caddy.service")
        await host.run("systemctl", "restart", "caddy.service")
        note({"marks": self.marks})


async def undo_caddy_service(host: Host, record: Record, options: UndoOptions) -> str:
    if await host.ask("systemctl", "cat", "caddy.service") is not None:
        await host.run("systemctl", "disable", "--now", "caddy.service")
    return ""


def caddy_changes(settings: Settings, host: HostSettings) -> Sequence[Change]:
    """Raises InvalidSettingError where it is not said what Caddy is to serve."""
    domain = settings.public_url.removeprefix("https://")
    if not settings.public_url.startswith("https://"):
        raise InvalidSettingError(
            "ATELIER_PUBLIC_URL",
            settings.public_url,
            message="host.caddy is true, and server.public_url does not say what Caddy is to serve",
            hint='server.public_url = "https://atelier.example.org"',
        )
    source = deploy_folder() / "caddy"
    files = [FileChange(f"{FOLDER}/{each.name}", each.read_bytes()) for each in sorted(source.iterdir())]
    drop_in = (
        "# Written by: atelier host caddy.\n[Service]\n"
        f"Environment=ATELIER_DOMAIN={domain} ATELIER_SANDBOX_DOMAIN={settings.previews.domain}\n"
        f"Environment=ATELIER_TLS={host.caddy_tls} ATELIER_MANAGER={settings.listen}\n"
        # What tls-acme-dns wants of its provider, and other secrets.
        f"EnvironmentFile=-{FOLDER}.env\n"
        f"ExecStart=\nExecStart=/usr/bin/caddy run --config {FOLDER}/Caddyfile --adapter caddyfile\nExecReload=\n"
    ).encode()
    edge = f"# Written by: atelier host caddy.\nd {EDGE_FOLDER} 2750 {host.user} caddy -\n".encode()
    after = ("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/atelier.conf")
    marks = hashlib.sha256(b"".join([drop_in, edge, *(each.content for each in files)])).hexdigest()
    return [
        FolderChange(FOLDER),
        *files,
        FileChange("/etc/tmpfiles.d/atelier.conf", edge, after=after),
        FolderChange(_DROP_IN, is_shared=True),
        FileChange(f"{_DROP_IN}/atelier.conf", drop_in),
        CaddyServiceChange(marks),
    ]
