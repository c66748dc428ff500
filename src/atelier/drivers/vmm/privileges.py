"""What the Firecracker driver needs root for. Granted by ``host.jails`` where the manager is root, else by the
privileged helper program, which runs the same.

``machine_id`` is as ``model.jail.machine_id`` makes it; an implementation grants only what is the caller's installation's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from atelier.model.jail import Jail, JailPlaces, JailRequest, JailStart
from atelier.model.machine import ProcessIdentity


class VmmPrivileges(Protocol):
    """All raise HostError when the host refuses (``jail_refused`` for a request that nobody may make), DiskFullError."""

    @property
    def places(self) -> JailPlaces: ...

    async def list_jails(self) -> list[Jail]:
        """This installation's, by jail and by live process."""
        ...

    async def prepare_jail(self, request: JailRequest) -> None:
        """Build the jail anew; what is there of an earlier one goes. No process may live in it.

        Raises ConflictError (``jail_user_taken``) when another jail has this user id, HostError
        (``jail_on_other_file_system``), NotFoundError (``jail_file_missing``) for a file that is not there.
        """
        ...

    async def start(self, request: JailStart) -> ProcessIdentity:
        """Run the jailer in the prepared jail; returns once it was executed, and it may still fail after that.

        Raises CommandError when it ends at once, MissingProgramError.
        """
        ...

    async def grant(self, machine_id: str) -> None:
        """Let the manager through to the sockets, log and metrics that are in the jail now. Another process of the same
        machine may have made them since: it is asked for again each time that one appeared."""
        ...

    async def add_files(self, machine_id: str, names: tuple[str, ...]) -> None:
        """Empty files for the VMM to write to; one that is there is made anew."""
        ...

    async def take_file(self, machine_id: str, name: str, target: Path) -> None:
        """Move a file that the VMM has written out of the jail to ``target``, which is not there: the manager's own, mode
        0600, and on the disk."""
        ...

    async def remove_files(self, machine_id: str, names: tuple[str, ...]) -> None: ...

    async def flush_disk(self, machine_id: str) -> None:
        """What the VMM wrote to its disk is on it when this returns, not in the host's cache."""
        ...

    async def set_link(self, machine_id: str, tap: str, *, up: bool) -> None:
        """Connect the host's end of the machine's card, or cut it."""
        ...

    async def kill(self, machine_id: str) -> None:
        """End its process and return when that is proved dead; nothing if there is none."""
        ...

    async def remove_jail(self, machine_id: str) -> None:
        """Remove the jail and the cgroup of a machine whose process is dead; the disk is the manager's again."""
        ...
