"""The machine that is set up, as its changes see it: files below a root, programs that are run, accounts.

Root is ``/`` but for tests, which set up a folder instead, with programs of their own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from atelier.host import command
from atelier.host_setup.sudo_access import check_roots_own
from atelier.host_setup.thin_pool import ensure_thin_pool
from atelier.model.errors import CommandError, HostError, MissingProgramError

Runner = Callable[[Sequence[str]], Awaitable[str]]

_COMMAND_SECONDS = 1800.0
"""The longest: packages that come over a slow line."""


async def run_command(arguments: Sequence[str]) -> str:
    done = await command.run(arguments, timeout_seconds=_COMMAND_SECONDS)
    return done.stdout.decode(errors="replace")


class Host:
    def __init__(self, root: Path = Path("/"), runner: Runner = run_command) -> None:
        self.root = root
        self._runner = runner

    def path(self, absolute: str | Path) -> Path:
        return self.root / str(absolute).lstrip("/")

    async def run(self, *arguments: str) -> str:
        """What the program prints. Raises CommandError, MissingProgramError."""
        return await self._runner(arguments)

    async def ask(self, *arguments: str) -> str | None:
        """As ``run``; None when the program is not there, or says no."""
        try:
            return await self.run(*arguments)
        except (CommandError, MissingProgramError):
            return None

    def read(self, absolute: str | Path) -> str:
        """Empty where there is no such file."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return ""

    def user_id(self, name: str) -> int | None:
        return self._id_in("/etc/passwd", name)

    def group_id(self, name: str) -> int | None:
        return self._id_in("/etc/group", name)

    def members(self, group: str) -> set[str]:
        for line in self.read("/etc/group").splitlines():
            fields = line.split(":")
            if fields[0] == group and len(fields) == 4:
                return set(filter(None, fields[3].split(",")))
        return set()

    def set_owner(self, path: Path, owner: str, group: str) -> None:
        """Raises HostError (``user_missing``)."""
        user_id, group_id = self.user_id(owner), self.group_id(group)
        if user_id is None or group_id is None:
            raise HostError(
                f"this host has no user {owner} or no group {group}", code="user_missing", hint="atelier host init"
            )
        os.chown(path, user_id, group_id, follow_symlinks=False)

    def is_owned(self, found: os.stat_result, owner: str, group: str) -> bool:
        return (found.st_uid, found.st_gid) == (self.user_id(owner), self.group_id(group))

    def check_roots_own(self, path: Path) -> None:
        """That nobody but root can change it. Raises HostError (``program_not_roots``)."""
        check_roots_own(path)

    async def ensure_thin_pool(self, group: str, pool: str) -> None:
        await ensure_thin_pool(group, pool)

    def is_block_device(self, absolute: Path) -> bool:
        try:
            return stat.S_ISBLK(self.path(absolute).stat().st_mode)
        except OSError:
            return False

    def _id_in(self, table: str, name: str) -> int | None:
        for line in self.read(table).splitlines():
            fields = line.split(":")
            if fields[0] == name and len(fields) > 2 and fields[2].isdecimal():
                return int(fields[2])
        return None
