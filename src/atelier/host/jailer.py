"""The jailer's words for one machine. Pure: a request and places in, an argument list out.

Called by ``host.jails``. The jailer closes every descriptor but the first three, makes its own device nodes, takes ``/``
of the jail for the machine's user alone, and becomes Firecracker under the same pid: neither ``--daemonize`` nor
``--new-pid-ns`` is used, so that the process that was started is the one that lasts. Source: Firecracker docs/jailer.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atelier.model.jail import JAIL_API_SOCKET, JAIL_LOG, JailPlaces, JailStart
from atelier.model.machine_limits import ProcessorAndMemoryLimits

PARENT_CGROUP = "atelier-vm.slice"
"""Beside the manager's own, so that a restart of that one's unit ends no machine."""
_PERIOD_MICROSECONDS = 100_000


def jailer_arguments(
    jailer: Sequence[str],
    executable: Path,
    places: JailPlaces,
    request: JailStart,
    *,
    with_cgroup: bool,
    network_namespace: Path | None,
) -> list[str]:
    user = str(request.user_id)
    arguments = [
        *jailer,
        *("--id", request.machine_id),
        *("--exec-file", str(executable)),
        *("--uid", user, "--gid", user),
        *("--chroot-base-dir", str(places.base)),
        *("--resource-limit", f"fsize={request.file_bytes}"),
        *("--resource-limit", f"no-file={request.open_files}"),
    ]
    if with_cgroup:
        arguments += ["--cgroup-version", "2", "--parent-cgroup", PARENT_CGROUP]
        for setting in _cgroup_settings(request.limits):
            arguments += ["--cgroup", setting]
    if network_namespace is not None:
        arguments += ["--netns", str(network_namespace)]
    # The log from its first line on: without one it goes to the output, which is the guest's console.
    return [
        *arguments,
        "--",
        *("--api-sock", f"/{JAIL_API_SOCKET}"),
        *("--log-path", f"/{JAIL_LOG}", "--level", "Warning"),
    ]


def _cgroup_settings(limits: ProcessorAndMemoryLimits) -> list[str]:
    """Source: Linux Documentation/admin-guide/cgroup-v2.rst."""
    return [
        f"cpu.max={limits.processors * _PERIOD_MICROSECONDS} {_PERIOD_MICROSECONDS}",
        f"memory.max={limits.memory_bytes}",
        f"pids.max={limits.tasks}",
    ]
