"""How large a file a process may write, and how that is raised while it runs.

Called by the VMM drivers. A soft limit may be raised up to the hard one by whoever runs as the process's user; a hard
limit only with CAP_SYS_RESOURCE in the first user namespace, which a root inside a container mostly has not got.
Source: prlimit(2), getrlimit(2).
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from atelier.host import command
from atelier.host.processes import ProcessUser, is_alive, privilege_dropper
from atelier.model.errors import CommandError, HostError
from atelier.model.machine import ProcessIdentity

_RAISING_ATTEMPT = ["prlimit", "--core=0:0", "prlimit", "--core=1:1", "true"]


async def may_raise_hard_limits() -> bool:
    """Found out by doing it: a capability may be there and not count."""
    try:
        await command.run(_RAISING_ATTEMPT, package_hint="util-linux")
    except CommandError:
        return False
    return True


def highest_inherited_file_size() -> int | None:
    """The hard limit that this process hands on; None: there is none."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


async def raise_file_size_limit(identity: ProcessIdentity, size_bytes: int) -> None:
    """Let the running process write files of up to ``size_bytes``. A limit that is higher already stays.

    Raises HostError (``limit_not_raised``) above its hard limit, where that may not be raised.
    """
    try:
        if not is_alive(identity):
            raise ProcessLookupError
        soft, hard = _read_limits(identity.pid)
        if soft is None or soft >= size_bytes:
            return
        raised = (size_bytes, resource.RLIM_INFINITY if hard is None else max(hard, size_bytes))
        try:
            resource.prlimit(identity.pid, resource.RLIMIT_FSIZE, raised)
        except PermissionError:
            if os.geteuid() != 0:
                raise
            # Root without CAP_SYS_RESOURCE may not, but the process's own user may, as far as the hard limit.
            as_its_user = privilege_dropper(_user_of(identity.pid))
            await command.run([*as_its_user, "prlimit", f"--pid={identity.pid}", f"--fsize={size_bytes}:"])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HostError(f"process {identity.pid} is gone", code="process_gone") from error
    except (CommandError, PermissionError, ValueError) as error:
        raise HostError(
            f"process {identity.pid} cannot be allowed to write files of {size_bytes} bytes: {error}",
            code="limit_not_raised",
            hint="start it anew with the larger size",
        ) from error


def _read_limits(pid: int) -> tuple[int | None, int | None]:
    """(soft, hard), None: unlimited. From /proc, which shows them to everybody."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max file size"):
            soft, hard = (None if word == "unlimited" else int(word) for word in line.split()[3:5])
            return soft, hard
    raise HostError("/proc does not show the limits of processes")


def _user_of(pid: int) -> ProcessUser:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    ids = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if name in ("Uid", "Gid")
    }
    return ProcessUser(ids["Uid"], ids["Gid"])
