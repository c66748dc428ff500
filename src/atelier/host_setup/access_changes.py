"""Changes by which the manager reaches root, and root knows the manager: the installation's id in root's own settings, the
privileged helper program, the entries of sudo; and what only has to be free, or root's own."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from atelier.host.privilege import PROGRAM
from atelier.host_setup.changes import THERE, Check, FileChange, Look, Note, foreign, missing
from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record
from atelier.host_setup.root_settings import ROOT_SETTINGS, RootSettings, root_settings_text
from atelier.host_setup.sudo_access import SUDOERS, program_text, sudoers_text
from atelier.model.errors import CommandError, HostError
from atelier.model.lvm_names import is_installation_id


@dataclass(frozen=True, slots=True)
class RootSettingsChange:
    """``wanted`` without the installation's id: that is the data folder's, which is made with its database first."""

    wanted: RootSettings
    python: Path
    config: Path
    home: str

    kind: ClassVar[str] = "file"

    @property
    def key(self) -> str:
        return str(ROOT_SETTINGS)

    async def look(self, host: Host, own: Record | None) -> Look:
        told = self._told(host)
        known = str(told.get("installation_id", ""))
        if own is not None and is_installation_id(known):
            return await self._file(known).look(host, own)
        if host.path(ROOT_SETTINGS).exists():
            return await self._file("").look(host, own)
        return missing("have the database, and tell root the installation's id")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        said = await host.run(
            *("runuser", "--user", self.wanted.user, "--", "env", f"HOME={self.home}", f"ATELIER_CONFIG={self.config}"),
            *(str(self.python), "-P", "-m", "atelier.manager", "--prepare"),
        )
        installation_id = said.strip()
        if not is_installation_id(installation_id):
            raise HostError(
                f"the manager said {said[:200]!r} when it was asked for the installation's id", code="not_prepared"
            )
        await self._file(installation_id).apply(host, own, note)

    def _told(self, host: Host) -> dict[str, Any]:
        try:
            return dict(json.loads(host.read(ROOT_SETTINGS)))
        except (ValueError, TypeError):
            return {}

    def _file(self, installation_id: str) -> FileChange:
        told = replace(self.wanted, installation_id=installation_id)
        return FileChange(str(ROOT_SETTINGS), root_settings_text(told))


@dataclass(frozen=True, slots=True)
class SudoersChange:
    """A file that sudo cannot read would keep everybody from sudo: visudo reads it first."""

    user: str

    kind: ClassVar[str] = "file"

    @property
    def key(self) -> str:
        return str(SUDOERS)

    async def look(self, host: Host, own: Record | None) -> Look:
        return await self._file.look(host, own)

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        with tempfile.TemporaryDirectory(prefix="atelier-sudoers-") as folder:
            candidate = Path(folder) / "sudoers"
            candidate.write_bytes(self._file.content)
            candidate.chmod(0o440)
            try:
                await host.run("visudo", "--check", f"--file={candidate}")
            except CommandError as error:
                raise HostError(
                    f"sudo would not take the entries: {error.message}",
                    code="sudoers_refused",
                    hint="sudo is older than 1.9.10, or something else is odd: sudo --version",
                ) from error
        await self._file.apply(host, own, note)

    @property
    def _file(self) -> FileChange:
        return FileChange(str(SUDOERS), sudoers_text(self.user).encode(), 0o440)


def helper_program(python: Path) -> FileChange:
    return FileChange(str(PROGRAM), program_text(python).encode(), 0o755)


@dataclass(frozen=True, slots=True)
class RootsOwnCheck(Check):
    """What root will run is nobody else's to change."""

    program: Path

    kind: ClassVar[str] = "roots own"

    @property
    def key(self) -> str:
        return str(self.program)

    async def look(self, host: Host, own: Record | None) -> Look:
        try:
            host.check_roots_own(self.program)
        except HostError as error:
            return foreign(error.message, error.hint)
        return THERE


@dataclass(frozen=True, slots=True)
class BridgeNameCheck(Check):
    """A link of the bridge's name is the network holder's, or in the way."""

    name: str

    kind: ClassVar[str] = "bridge name"

    @property
    def key(self) -> str:
        return self.name

    async def look(self, host: Host, own: Record | None) -> Look:
        listed = await host.ask("ip", "-json", "link", "show", "dev", self.name)
        try:
            (link,) = json.loads(listed or "[]")
        except ValueError:
            return THERE
        if str(link.get("ifalias", "")).startswith("atelier"):
            return THERE
        return foreign(
            f"this host has a link {self.name} already, not of Atelier's making",
            'choose another name in the configuration: [network] bridge_name = "sandbr0"',
        )


@dataclass(frozen=True, slots=True)
class PortCheck(Check):
    """A port that one of Atelier's programs is to serve is theirs, or in the way."""

    address: str
    port: int
    setting: str

    kind: ClassVar[str] = "port"

    @property
    def key(self) -> str:
        return f"{self.address}:{self.port}"

    async def look(self, host: Host, own: Record | None) -> Look:
        listed = await host.ask("ss", "-H", "-ltnp", f"sport = :{self.port}") or ""
        anywhere = ("0.0.0.0", "*", "[::]")
        for line in listed.splitlines():
            words = line.split()
            local = words[3].rpartition(":")[0] if len(words) > 3 else ""
            holder = re.search(r'"([^"]+)",pid=(\d+)', line)
            clashes = local in anywhere or self.address in (*anywhere, local, f"[{local}]")
            if clashes and not (holder and _is_ours(host, int(holder[2]))):
                who = f"{holder[1]} (process {holder[2]})" if holder else "another program"
                return foreign(
                    f"{who} serves port {self.port}, which {self.setting} asks for",
                    f"choose another port: {self.setting}; or end that program",
                )
        return THERE


def _is_ours(host: Host, pid: int) -> bool:
    words = host.read(f"/proc/{pid}/cmdline").split("\0")
    return any(word in ("atelier.manager", "atelier.gateway") for word in words)
